"""What every benchmark shares: the machine's facts, interleaved rounds, the JSON document and the table.

A benchmark is `python benchmarks/NAME.py [--quick] [--json PATH]`. It measures Craton beside its peers in one run, in
interleaved rounds (A B C A B C ...), so that a machine whose speed drifts treats all alike, and reports medians.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np
from rich.console import Console
from rich.table import Table

# Instruction sets that decide which kernels run, as Linux names them (x86 "flags", ARM "Features").
ISA_FLAGS = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimddp", "bf16", "i8mm", "sve", "sve2"),
)

Key = TypeVar("Key", bound=Hashable)


class Case(TypedDict):
    """One measured case. ratio > 1 means that Craton is better, whether more or less of the unit is.

    limit: what the machine (or a promise) allows, in the same unit; of_limit: ours / limit. settings: what was chosen
    for a contender. absent: why a peer has no figure.
    """

    ours: float
    peers: dict[str, float]
    ratio: dict[str, float]
    unit: str
    limit: NotRequired[float]
    of_limit: NotRequired[float]
    settings: NotRequired[dict[str, str]]
    absent: NotRequired[dict[str, str]]


class Document(TypedDict):
    """What `--json` writes."""

    machine: dict[str, Any]
    cases: dict[str, Case]


class ContenderError(Exception):
    """A contender that could not be measured; the text is the reason."""


def case(
    ours: float,
    peers: Mapping[str, float],
    unit: str,
    *,
    less_is_better: bool = False,
    limit: float | None = None,
    settings: Mapping[str, str] | None = None,
    absent: Mapping[str, str] | None = None,
) -> Case:
    """A case of the document, with its ratios."""
    ratios = {name: peer / ours if less_is_better else ours / peer for name, peer in peers.items()}
    result = Case(ours=_short(ours), peers=_shorts(peers), ratio=_shorts(ratios), unit=unit)
    if limit is not None:
        result["limit"], result["of_limit"] = _short(limit), _short(ours / limit)
    if settings:
        result["settings"] = dict(settings)
    if absent:
        result["absent"] = dict(absent)
    return result


def interleave(contenders: Mapping[Key, Callable[[], float]], rounds: int) -> tuple[dict[Key, float], dict[Key, str]]:
    """Each contender's median over `rounds` rounds, one turn each in every round, and the reasons of those that failed.

    A contender that raises ContenderError leaves the race; the others go on.
    """
    figures: dict[Key, list[float]] = {name: [] for name in contenders}
    failed: dict[Key, str] = {}
    for _ in range(rounds):
        for name, turn in contenders.items():
            if name not in failed:
                try:
                    figures[name].append(turn())
                except ContenderError as error:
                    failed[name] = str(error)
    return {name: statistics.median(values) for name, values in figures.items() if name not in failed}, failed


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """Facts that explain the figures: CPU, memory, load when the benchmark starts, and versions of `packages`."""
    fields = _cpu_fields()
    has = set((fields.get("flags") or fields.get("Features") or "").split())
    facts = {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "isa": [flag for flag in ISA_FLAGS if flag in has],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "load_at_start": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    return facts | {"versions": {name: _version(name) for name in packages}}


def read_bandwidth(size: int, threads: int, passes: int = 15) -> float:
    """Bytes per second at which `threads` threads read the same `size` bytes again and again: the best of the passes.

    Weights that fit the last cache are read faster than memory, so the limit of a model is measured at its own size.
    """
    # memchr, looking for a byte that is not there, does nothing but read, as fast as the machine can.
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t), ctypes.c_void_p
    data = np.ones(size, dtype=np.uint8)
    share = size // threads
    starts = [data.ctypes.data + i * share for i in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(passes):
            started = time.perf_counter()
            list(pool.map(lambda start: memchr(start, 0, share), starts))
            best = min(best, time.perf_counter() - started)
    return share * threads / best


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark; it may add its own."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--quick", action="store_true", help="fewer cases and rounds: about a minute")
    flags.add_argument("--json", type=Path, metavar="PATH", help="also write the figures to this file")
    return flags


def report(document: Document, path: Path | None) -> None:
    """Print the table for people and, if `path` is given, write the JSON document."""
    show(document, Console())
    if path is not None:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def show(document: Document, console: Console) -> None:
    """The document as a table, the reasons of absent peers below it."""
    cases = document["cases"]
    peers = peer_names(document)
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("case", no_wrap=True)
    for heading in ("unit", "Craton", *peers, *(f"/ {peer}" for peer in peers), "limit", "of it"):
        table.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, one in cases.items():
        settings = one.get("settings", {})
        table.add_row(
            name,
            one["unit"],
            number(one["ours"]),
            *(f"{number(one['peers'].get(peer))} {settings.get(peer, '')}".strip() for peer in peers),
            *(number(one["ratio"].get(peer)) for peer in peers),
            number(one.get("limit")),
            number(one.get("of_limit")),
        )
    console.print(table)
    for peer, reason in absences(document):
        console.print(f"{peer}: {reason}", markup=False)
    facts = document["machine"]
    console.print(f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_at_start']} at the start", markup=False)


def peer_names(document: Document) -> list[str]:
    """Every peer of the document, measured or absent, in the order of its first case."""
    return list(
        dict.fromkeys(peer for one in document["cases"].values() for peer in (*one["peers"], *one.get("absent", {})))
    )


def absences(document: Document) -> list[tuple[str, str]]:
    """(peer, reason), each once."""
    return list(dict.fromkeys(item for one in document["cases"].values() for item in one.get("absent", {}).items()))


def number(value: float | None) -> str:
    """Three digits, for people; a dash for what was not measured."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _shorts(values: Mapping[str, float]) -> dict[str, float]:
    return {name: _short(value) for name, value in values.items()}


def _cpu_fields() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}  # not Linux: the platform module knows a little
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
