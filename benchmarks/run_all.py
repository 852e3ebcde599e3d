"""Run every benchmark in this folder and put its figures into the manual and the README (`make bench`).

Benchmark NAME's document is kept as results/NAME.json, and its table stands in docs/benchmarks.md between
`<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->`. The README has the rows that `SUMMARY` names, taken from
there. `--quick` is passed on to the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from harness import Case, Document, absences, number, peer_names

from craton.errors import CratonError, UsageError

HERE = Path(__file__).parent
TABLES, README = HERE.parent / "docs" / "benchmarks.md", HERE.parent / "README.md"
# What the README shows: what it is, benchmark, case, peer.
SUMMARY = (
    ("writing text, 4 bits, 1 request", "decode", "decode/q4_0/batch=1/prompt=32", "llama.cpp"),
    ("writing text, 8 bits, 1 request", "decode", "decode/q8_0/batch=1/prompt=32", "llama.cpp"),
    ("writing text, 4 bits, 16 requests", "decode", "decode/q4_0/batch=16/prompt=32", "llama.cpp"),
    ("reading a prompt of 512, 4 bits", "prefill", "prefill/q4_0/prompt=512", "llama.cpp"),
    ("reading a prompt of 512, 4 bits", "prefill", "prefill/q4_0/prompt=512", "transformers"),
    ("serving 16 clients", "serving", "throughput/clients=16", "transformers serve"),
    ("speech to text, long recording", "transcribe", "long/batched", "faster-whisper int8"),
    ("pretraining, 30M parameters", "training", "pretrain/30m", "transformers at its best"),
    ("fine-tuning with LoRA", "training", "lora/smollm2", "transformers at its best"),
    ("memory of fine-tuning with LoRA", "training", "memory/lora/smollm2", "transformers at its best"),
    ("77 intents, full data", "learning", "banking77/full", "TF-IDF + logistic regression"),
    ("77 intents, 10 examples each", "learning", "banking77/10-shot", "TF-IDF + logistic regression"),
    ("10 kinds of clothes, pictures", "pictures", "fashion/classes", "HOG + linear SVM"),
    ("the same without labels", "pictures", "fashion/self-distilled, knn", "raw pixels, knn"),
    ("cutting out by one click", "segmentation", "stamps/click", "GrabCut"),
    ("cutting out by a box", "segmentation", "stamps/box", "GrabCut"),
    ("77 intents, 2,000 examples: LoRA", "adaptation", "banking77/lora", "zero-shot"),
    ("77 intents: nearest examples shown", "adaptation", "banking77/retrieval", "zero-shot"),
    ("questions about documents: retrieval", "adaptation", "xquad/retrieval", "zero-shot"),
    ("the same with LoRA", "adaptation", "xquad/lora+retrieval", "zero-shot"),
    ("4 bits, tuned", "compression", "4-bit/tuned", "RTN"),
    ("vector search among 100,000", "retrieval", "query/dense/chunks=100000", "NumPy"),
)
NOT_BENCHMARKS = ("harness", "run_all")
THREADS = re.compile(r"/threads=(\d+)")


def main() -> int:
    """Check the markers, run, and rewrite the tables. The exit status is 2 if it cannot be done."""
    flags = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    flags.add_argument("--quick", action="store_true", help="fewer cases and rounds: about a minute a benchmark")
    quick = ["--quick"] if flags.parse_args().quick else []
    names = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in NOT_BENCHMARKS)
    try:
        for name in names:
            between(read(TABLES), name)  # before the long work, not after it
        for name in names:
            print(f"{name} ...", flush=True)
            result = HERE / "results" / f"{name}.json"
            result.parent.mkdir(exist_ok=True)
            subprocess.run([sys.executable, str(HERE / f"{name}.py"), *quick, "--json", str(result)], check=True)
            update(TABLES, name, json.loads(result.read_text(encoding="utf-8")))
            summarise(README, read(TABLES))
    except CratonError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def update(page: Path, name: str, document: Document) -> None:
    """Replace the table of benchmark `name`. Raises UsageError if the page has no place for it."""
    text = read(page)
    start, end = between(text, name)
    page.write_text(f"{text[:start]}\n{render_table(document)}\n{text[end:]}", encoding="utf-8")


def summarise(readme: Path, tables: str) -> None:
    """Replace the README's summary by rows of `tables`."""
    text = read(readme)
    start, end = _marked(text, "<!-- summary -->", "<!-- /summary -->", "the summary")
    readme.write_text(f"{text[:start]}\n{render_summary(tables)}\n{text[end:]}", encoding="utf-8")


def render_summary(tables: str) -> str:
    """The rows that `SUMMARY` names, as they stand in the tables. Raises UsageError for one that is not there."""
    lines = ["| what | unit | Craton | peer | its figure | ratio |", "|---|---|---:|---|---:|---:|"]
    for what, name, case, peer in SUMMARY:
        start, end = between(tables, name)
        rows = [
            [cell.strip() for cell in row.split("|")[1:-1]] for row in tables[start:end].split("\n") if row[:1] == "|"
        ]
        head = rows[0] if rows else []
        found = next((row for row in rows if row[0] == case), None)
        if found is None or peer not in head:
            raise UsageError(f"the table of {name} has no {case} beside {peer}", where=TABLES.name)
        cells = dict(zip(head, found, strict=True))
        shown = (what, cells["unit"], cells["Craton"], peer, cells[peer], cells[f"vs {peer}"])
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def between(text: str, name: str) -> tuple[int, int]:
    """Where the table of `name` begins and ends. Raises UsageError unless its markers stand there once, in order."""
    return _marked(text, f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->", f"the table of {name}")


def _marked(text: str, opening: str, closing: str, what: str) -> tuple[int, int]:
    start, end = text.find(opening) + len(opening), text.find(closing)
    if text.count(opening) != 1 or text.count(closing) != 1 or end < start:
        raise UsageError(
            f"there is no place for {what}",
            where=f"{TABLES.name}, {README.name}",
            remedy=f"put {opening} and {closing} on lines of their own where it should stand",
        )
    return start, end


def read(path: Path) -> str:
    """The text of a page. Raises UsageError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the page cannot be read: {error.strerror}", where=str(path)) from None


def render_table(document: Document) -> str:
    """The document as a Markdown table, with a line about the machine under it.

    Cases that differ only in their threads share a row: "31 / 58" is one figure with 1 thread and one with 2.
    """
    if not document["cases"]:
        return "Not measured: what it needs was not at hand."
    peers = peer_names(document)
    rows: dict[str, list[Case]] = {}
    threads: dict[str, None] = {}
    for name, one in document["cases"].items():
        rows.setdefault(THREADS.sub("", name), []).append(one)
        threads |= dict.fromkeys(THREADS.findall(name))
    lines = [
        "| " + " | ".join(("case", "unit", "Craton", *peers, *(f"vs {peer}" for peer in peers))) + " |",
        "|---|---|" + "---:|" * (1 + 2 * len(peers)),
    ]
    for name, cases in rows.items():
        cells = [name, cases[0]["unit"], _joined(_our_cell(one) for one in cases)]
        cells += [_joined(_peer_cell(one, peer) for one in cases) for peer in peers]
        cells += [_joined(_ratio_cell(one, peer) for one in cases) for peer in peers]
        lines.append("| " + " | ".join(cells) + " |")
    facts = document["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    notes = [
        f"{facts['cpu']} ({', '.join(facts['isa'])}), {facts['cores']} cores, {facts['memory_gb']} GB; {versions}."
    ]
    if threads:
        notes.append(f"Figures with {' / '.join(threads)} threads; medians of interleaved rounds.")
    notes += [f"{peer} is absent: {reason}." for peer, reason in absences(document)]
    return "\n".join([*lines, "", " ".join(notes)])


def _our_cell(one: Case) -> str:
    # Beside peers a row says enough; where there are none, the limit is what it is compared with.
    alone = "of_limit" in one and not one["peers"]
    limit = f"({one['of_limit']:.0%} of {number(one['limit'])})" if alone else ""
    setting = one.get("settings", {}).get("Craton")
    return " ".join(filter(None, (number(one["ours"]), f"({setting})" if setting else "", limit)))


def _peer_cell(one: Case, peer: str) -> str:
    if peer in one.get("absent", {}):
        return "absent"
    setting = one.get("settings", {}).get(peer, "")
    return f"{number(one['peers'].get(peer))} {setting}".strip()


def _ratio_cell(one: Case, peer: str) -> str:
    return f"{number(one['ratio'][peer])}x" if peer in one["ratio"] else "-"


def _joined(cells: Iterable[str]) -> str:
    return " / ".join(cells)


if __name__ == "__main__":
    sys.exit(main())
