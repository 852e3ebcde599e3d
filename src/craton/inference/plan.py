"""What the engine decides for the user before it runs: number format, kernel, threads. Each decision has its reason."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.errors import UnknownName, UsageError
from craton.inference import native
from craton.inference.linears import PACKED_KINDS
from craton.inference.settings import KV, Activations
from craton.models import CausalLMConfig
from craton.trunk import KVCache

DTypeChoice = Literal["auto", "float32", "bfloat16"]
DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """dtype: of activations, cache and every weight that is not packed. packed: block-quantised weights stay packed.

    pack_ends, prepack, tiles, parts: see `linears.prepare`. decisions: one sentence for each choice, for people.
    """

    dtype: torch.dtype
    packed: bool
    pack_ends: bool
    prepack: bool
    tiles: bool
    parts: int
    threads: int
    kernel: str
    decisions: tuple[str, ...]


def make_plan(
    checkpoint: Checkpoint,
    dtype: DTypeChoice = "auto",
    threads: int | None = None,
    activations: Activations = "auto",
    kv: KV = "auto",
) -> Plan:
    """Decide how to run `checkpoint`; `dtype`, `threads`, `activations` and `kv` overrule.

    Raises UsageError for a dtype that is not known or a number of threads that is not positive.
    """
    if dtype not in get_args(DTypeChoice):
        raise UnknownName("dtype", dtype, get_args(DTypeChoice))
    thread_count, thread_reason = _threads(threads)
    quantized = checkpoint.quantized_kinds()
    packed, kernel = False, "torch"
    if dtype != "auto":
        chosen, reason = DTYPES[dtype], f"{dtype} as asked"
        if quantized:
            reason += f"; {', '.join(sorted(quantized))} weights unpacked"
    elif quantized and checkpoint.packed_kinds() <= PACKED_KINDS and native.available():
        packed, chosen, kernel = True, torch.float32, f"native {native.isa()}"
        reason = f"{', '.join(sorted(quantized))} weights stay packed"
    else:
        chosen, reason = _auto_dtype(checkpoint, quantized)
    prepack = chosen == torch.bfloat16 and fast_bfloat16()
    tiles = packed and native.has_tiles()
    if tiles:
        kernel += ", AMX bf16 for long prompts"
    if prepack:
        kernel = "oneDNN bf16, prepacked"
    int8 = activations == "int8" or (activations == "auto" and checkpoint.int8_activations)
    if packed and int8:
        kernel += f", int8 activations ({'as asked' if activations == 'int8' else 'the checkpoint asks for them'})"
    dtype_name = str(chosen).removeprefix("torch.")
    pack_ends = packed and checkpoint.plain_ends()
    if pack_ends:
        reason += ", its plain embedding and head in 8 bits beside them"
    decisions: tuple[str, ...] = (
        f"{dtype_name}: {reason}",
        f"kernel: {kernel}",
        f"threads: {thread_count} ({thread_reason})",
    )
    if kv == "int8" and isinstance(checkpoint.config, CausalLMConfig):
        size = KVCache(checkpoint.config.trunk, dtype=torch.int8).position_bytes
        decisions += (f"keys and values: int8, {size / 1000:.1f} kB a token (as asked)",)
    return Plan(chosen, packed, pack_ends, prepack, tiles, 1 if int8 else 2, thread_count, kernel, decisions)


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _auto_dtype(checkpoint: Checkpoint, quantized: frozenset[str]) -> tuple[torch.dtype, str]:
    hardware = "this CPU has AMX" if torch.cpu._is_amx_tile_supported() else "this CPU has AVX512-BF16"
    if quantized:
        why = native.reason() if checkpoint.packed_kinds() <= PACKED_KINDS else "no kernel for them"
        unpacked = f"{', '.join(sorted(quantized))} weights unpacked ({why})"
        if fast_bfloat16():
            return torch.bfloat16, f"{unpacked}; {hardware}"
        return torch.float32, unpacked
    stored = checkpoint.stored_kind()
    if stored == "F32":
        return torch.float32, "as the checkpoint stores it"
    if fast_bfloat16():
        return torch.bfloat16, f"the checkpoint stores {stored}; {hardware}"
    return torch.float32, f"the checkpoint stores {stored}, which this CPU only emulates"


def _threads(asked: int | None) -> tuple[int, str]:
    if asked is not None:
        if asked < 1:
            raise UsageError(f"threads must be at least 1, not {asked}")
        return asked, "as asked"
    if hasattr(os, "sched_getaffinity"):
        cores, reason = len(os.sched_getaffinity(0)), "the cores that this process may use"
    else:
        cores, reason = os.cpu_count() or 1, "the cores of this machine"
    quota = _cgroup_quota()
    if quota is not None and quota < cores:
        return max(1, int(quota)), f"the CPU quota is {quota:g} cores"
    return cores, reason


def _cgroup_quota() -> float | None:
    # cgroup v2: "max 100000" or "<quota> <period>", in microseconds.
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None  # no cgroup v2 here, so no quota that we could know of
