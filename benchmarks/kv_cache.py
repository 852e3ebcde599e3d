"""What a cache of 8 bits costs and saves (`--kv int8`), beside the plain one of the same model in the same run.

Cases
    decode/threads=T/context=N   tokens/s of the engine behind a text of N tokens
    memory/context=N             MB of memory that the keys and values of N tokens take, as the system counts it
    perplexity                   on the first 4,096 tokens of WikiText-2's validation text, in windows of 2,048 (not in
                                 --quick)

Two engines with one model each, SmolLM2-135M-Instruct as published, in one process; turns of 8 tokens interleave, and
the figure is the median of the rounds.
"""

from __future__ import annotations

import gc
import math
import mmap
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from harness import Case, Document, case, interleave, machine, parser, report

import craton
from craton.inference.engine import Request
from craton.inference.model import Model
from craton.trunk import KVCache

SHARED = Path(__file__).parents[2] / "shared" / "data"
MODEL = "smollm2-135m-instruct"
INT8, PLAIN = "int8", "plain"
KINDS = {INT8: "int8", PLAIN: "auto"}  # the name here -> EngineSettings.kv
STEPS = 8  # of a turn
CONTEXTS = (2048, 8000)


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parser(__doc__.partition("\n")[0]).parse_args()
    facts = machine(("craton", "torch"))
    text = (SHARED / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    cases: dict[str, Case] = {}
    for threads in (1,) if arguments.quick else (1, 2):
        models = {
            name: craton.load(MODEL, threads=threads, speculate="off", kv=kv)  # a step is a token
            for name, kv in KINDS.items()
        }
        for model in models.values():
            model.tokenizer.eos_ids = ()  # no answer ends before it is told to
        ids = next(iter(models.values())).tokenizer.encode(text[:60_000])
        for context in CONTEXTS:
            print(f"threads={threads}/context={context} ...", file=sys.stderr, flush=True)
            figures = decode(models, ids[:context], rounds=5 if arguments.quick else 11)
            cases[f"decode/threads={threads}/context={context}"] = compared(figures, "tokens/s")
        if threads == 1:
            figures = {name: memory(model, CONTEXTS[-1]) / 1e6 for name, model in models.items()}
            cases[f"memory/context={CONTEXTS[-1]}"] = compared(figures, "MB", less_is_better=True)
        if threads == 1 and not arguments.quick:
            scored = {name: model.rolling_score(ids[:4096], window=2048) for name, model in models.items()}
            figures = {name: math.exp(-score.logprob / score.tokens) for name, score in scored.items()}
            cases["perplexity"] = compared(figures, "perplexity", less_is_better=True)
        del models
        gc.collect()
    report(Document(machine=facts, cases=cases), arguments.json)


def compared(figures: Mapping[str, float], unit: str, *, less_is_better: bool = False) -> Case:
    """The 8-bit cache as ours, the plain one as the peer."""
    return case(figures[INT8], {PLAIN: figures[PLAIN]}, unit, less_is_better=less_is_better)


def decode(models: Mapping[str, Model], ids: list[int], rounds: int) -> dict[str, float]:
    """Tokens per second behind a text."""
    generations = {name: model.engine.submit(Request(ids)) for name, model in models.items()}
    for name, generation in generations.items():
        while not generation.tokens:
            models[name].engine.step()

    def turn(name: str) -> float:
        started = time.perf_counter()
        for _ in range(STEPS):
            models[name].engine.step()
        return STEPS / (time.perf_counter() - started)

    medians, _ = interleave({name: partial(turn, name) for name in models}, rounds)
    for generation in generations.values():
        generation.cancel()
    return medians


def memory(model: Model, positions: int) -> int:
    """Bytes that the process grows by when as much is kept as a text of so many tokens needs."""
    dtype = model.engine.cache.keys[0].dtype
    before = _resident()
    cache = KVCache(model.module.config.trunk, 1, dtype=dtype)
    cache.reserve(positions)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, :positions] = torch.ones((), dtype=dtype)
    return _resident() - before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


if __name__ == "__main__":
    main()
