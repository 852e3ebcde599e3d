"""How fast Craton trains, and in how much memory, beside transformers' Trainer and peft, in the same run.

Cases
    pretrain/SIZE         tokens/s of whole steps (forward, backward, clipping, AdamW) on windows of 512 tokens
    lora/smollm2          trained tokens/s of LoRA, rank 8 on all linear layers of SmolLM2-135M, on conversations of 50
                          to 900 tokens: only tokens that the assistant writes count, no padding and no questions
    memory/...            peak resident memory in MB of the process that stands in the case above
    share/pretrain/SIZE   Craton's arithmetic in TFLOP/s; limit: this machine's own products of large square matrices in
                          the same dtype, measured once in every round

Contenders
    Craton                its own loop and loader with the defaults of `craton pretrain`, with and without --compile;
                          the faster one counts and is named. For LoRA the frozen base is in bf16, nothing is compiled
                          (batches of real conversations hardly ever have a shape twice).
    transformers as installed   Trainer with TrainingArguments as they come: no bf16, no compile; a checkpoint keeps
                          its dtype. For LoRA: peft, batches padded to their longest conversation.
    transformers at its best    bf16 autocast, torch_compile, fused AdamW, no logging, and glibc told to keep its large
                          buffers, as Craton tells it. For LoRA: bf16 weights, and batches of conversations sorted by
                          length, so that hardly anything is padded (this beats its own group_by_length, which sorts
                          parts of the data only); not compiled, as hardly two batches have one shape.

How the figures are made
    All start from the same weights and read the same tokens with the same targets in the same steps; a peer whose loss
    of the first step is not Craton's is not counted. Every contender is a process of its own, a single long run that
    pauses between its turns. The first steps, which compile and touch all memory, are not timed; settings say how long
    compiling took. Turns interleave (A B C A B C ...); the figure is the median of the rounds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from contenders.train_chats import docstring_sequences
from contenders.train_models import Job, write_fresh
from contenders.train_pace import WARMUP_STEPS
from contenders.train_race import BEST, DATA_STEPS, INSTALLED, OURS, Key, Results, pretraining_entrants, race
from contenders.train_sequences import random_windows, save_sequences, sorted_within
from contenders.weights import plain_folder
from harness import Case, Document, machine, parser, report

from craton.checkpoints.checkpoint import Checkpoint
from craton.data.example import UNTRAINED, TokenSequence
from craton.pretraining.sizing import Shape
from craton.store import find
from craton.training.hardware import compute_dtype, gemm_peak

PACKAGES = ("craton", "torch", "transformers", "accelerate", "peft")
MODEL = "smollm2-135m-instruct"
SEED = 0
RANK = 8
CONVERSATIONS = 4  # of a LoRA step; padded batches of more, in fp32 logits, do not fit beside one another in 24 GB
MICRO_TOKENS = 4096  # Craton's default
CPU = torch.device("cpu")

# 135m is SmolLM2's shape, in steps of half as many tokens.
JOBS = {
    "30m": Job(Shape(width=384, layers=10, heads=6, kv_heads=6, hidden=1024), vocab=32_000, batch=8, length=512),
    "135m": Job(Shape(width=576, layers=30, heads=9, kv_heads=3, hidden=1536), vocab=49_152, batch=4, length=512),
}


@dataclass(frozen=True)
class Turns:
    """How much of a case is measured: `rounds` turns of `steps` steps."""

    rounds: int
    steps: int


@dataclass(frozen=True)
class Scope:
    """What a run measures. pretrain: by size. lora_best: variants of transformers at its best ("sorted", "sorted,
    compiled", "flattened": unpadded conversations one behind the other)."""

    pretrain: Mapping[str, Turns]
    lora: Turns
    lora_best: tuple[str, ...]


FULL = Scope({"30m": Turns(4, 2), "135m": Turns(3, 2)}, lora=Turns(4, 2), lora_best=("sorted",))
QUICK = Scope({"30m": Turns(2, 2)}, lora=Turns(2, 2), lora_best=("sorted",))


def pretrain_race(job: Job, turns: Turns) -> Results:
    """Fresh models of one shape on random tokens."""
    dtype, _ = compute_dtype("auto", CPU)
    with tempfile.TemporaryDirectory() as name:
        folder = write_fresh(job.config, Path(name))
        windows = random_windows(job.batch * DATA_STEPS, job.length, job.vocab, SEED)
        data = save_sequences(folder / "data.npz", windows)
        entrants = pretraining_entrants(job, folder, data, bf16=dtype == torch.bfloat16)
        counted = [job.step_tokens * turns.steps] * turns.rounds
        return race(entrants, steps=turns.steps, counted=counted, peak=partial(gemm_peak, dtype, CPU))


def lora_race(folder: Path, sequences: list[TokenSequence], turns: Turns, best: Iterable[str]) -> Results:
    """Adapters on the model in `folder`. sequences: conversations for the warm-up and for all turns, CONVERSATIONS for
    each step; of transformers at its best the variants `best`."""
    # Within the first step, the warm-up and each turn conversations may be sorted; each of them holds the same ones.
    parts = [CONVERSATIONS * n for n in (1, WARMUP_STEPS - 1, *[turns.steps] * turns.rounds)]
    dtype, _ = compute_dtype("auto", CPU)
    data = str(save_sequences(folder / "as-drawn.npz", sequences))
    ordered = str(save_sequences(folder / "sorted.npz", sorted_within(sequences, parts)))
    common = {"folder": str(folder), "batch": CONVERSATIONS, "lora": RANK}
    theirs = common | {"best": True, "bf16": dtype == torch.bfloat16}
    variants = {
        "sorted": theirs | {"data": ordered, "collate": "pad"},
        "sorted, compiled": theirs | {"data": ordered, "collate": "pad", "compile": True},
        "flattened": theirs | {"data": data, "collate": "flatten"},
    }
    entrants: dict[Key, tuple[str, dict[str, Any]]] = {
        (OURS, "packed"): ("train_craton", common | {"data": data, "micro_tokens": MICRO_TOKENS}),
        (INSTALLED, "padded"): ("train_transformers", common | {"data": data, "collate": "pad"}),
        **{(BEST, variant): ("train_transformers", variants[variant]) for variant in best},
    }
    borders = list(accumulate(parts))[1:]
    counted = [sum(trained(s) for s in sequences[a:b]) for a, b in pairwise(borders)]
    return race(entrants, steps=turns.steps, counted=counted)


def trained(sequence: TokenSequence) -> int:
    """How many of its positions have a target."""
    return int((sequence.targets != UNTRAINED).sum())


def measure(model: str, scope: Scope) -> dict[str, Case]:
    """All cases of the scope. model: what LoRA adapts, a name of the store or a path."""
    cases: dict[str, Case] = {}
    for size, turns in scope.pretrain.items():
        print(f"pretrain/{size}", file=sys.stderr, flush=True)
        results = pretrain_race(JOBS[size], turns)
        cases[f"pretrain/{size}"] = results.speed()
        cases[f"memory/pretrain/{size}"] = results.footprint()
        assert results.peak is not None
        cases[f"share/pretrain/{size}"] = results.share(JOBS[size].flops, results.peak)
    print("lora/smollm2", file=sys.stderr, flush=True)
    published = find(model).path
    tokenizer = Checkpoint.open(published).tokenizer()
    steps = WARMUP_STEPS + scope.lora.rounds * scope.lora.steps
    with tempfile.TemporaryDirectory() as folder:
        sequences = docstring_sequences(CONVERSATIONS * steps, tokenizer, SEED)
        results = lora_race(plain_folder(published, Path(folder)), sequences, scope.lora, scope.lora_best)
    cases |= {"lora/smollm2": results.speed(), "memory/lora/smollm2": results.footprint()}
    order = ("pretrain", "lora", "memory", "share")
    return dict(sorted(cases.items(), key=lambda item: order.index(item[0].partition("/")[0])))


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--model", default=MODEL, metavar="NAME|PATH", help="the model that LoRA adapts")
    arguments = flags.parse_args()
    facts = machine(PACKAGES)
    cases = measure(arguments.model, QUICK if arguments.quick else FULL)
    report(Document(machine=facts, cases=cases), arguments.json)


if __name__ == "__main__":
    main()
