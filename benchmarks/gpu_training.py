"""How much of a GPU's arithmetic training reaches: utilisation (MFU) of Llama shapes, beside transformers' Trainer.

Cases
    pretrain/SIZE   tokens/s of whole steps on windows of 1,024 tokens in bf16; Craton with and without --compile, the
                    faster one counts and is named
    mfu/SIZE        Craton's arithmetic in TFLOP/s (6 FLOPs a parameter of a matrix and token, and attention; nothing
                    recomputed counts). limit: the vendor's dense bf16 peak where the GPU is known, else the products of
                    large square matrices, measured in every round; `settings` says which
    memory/SIZE     peak MB of tensors on the GPU

Contenders, rounds and what is timed are those of training.py, except that each process has the GPU to itself. Without a
GPU there is nothing to measure: the document has no cases, and the exit status is 0.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from contenders.train_models import SEED, Job, write_fresh
from contenders.train_race import DATA_STEPS, pretraining_entrants, race
from contenders.train_sequences import random_windows, save_sequences
from harness import Case, Document, machine, parser, report

from craton.pretraining.sizing import Shape
from craton.training.hardware import compute_dtype, gemm_peak

PACKAGES = ("craton", "torch", "transformers", "accelerate")
JOBS = {
    "135m": Job(Shape(width=576, layers=30, heads=9, kv_heads=3, hidden=1536), vocab=49_152, batch=64, length=1024),
    "360m": Job(Shape(width=960, layers=32, heads=15, kv_heads=5, hidden=2560), vocab=49_152, batch=48, length=1024),
    "1b": Job(Shape(width=2048, layers=16, heads=32, kv_heads=8, hidden=8192), vocab=49_152, batch=24, length=1024),
}
# Dense bf16 products by the vendors' data sheets, in FLOP/s.
DATA_SHEETS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def measure(
    name: str, job: Job, device: torch.device, *, rounds: int, steps: int, limit: float | None
) -> dict[str, Case]:
    """The cases of one shape. limit: the GPU's peak; None: as it is measured."""
    dtype, _ = compute_dtype("auto", device)
    with tempfile.TemporaryDirectory() as place:
        folder = write_fresh(job.config, Path(place))
        windows = random_windows(job.batch * DATA_STEPS, job.length, job.vocab, SEED)
        data = save_sequences(folder / "data.npz", windows)
        entrants = pretraining_entrants(
            job, folder, data, bf16=dtype == torch.bfloat16, device=device.type, best=(False, True)
        )
        counted = [job.step_tokens * steps] * rounds
        peak = partial(gemm_peak, dtype, device)
        results = race(entrants, steps=steps, counted=counted, peak=peak, apart=True)
    assert results.peak is not None
    share = results.share(job.flops, limit or results.peak)
    share["settings"] = {**share.get("settings", {}), "limit": "data sheet" if limit else "measured products"}
    return {f"pretrain/{name}": results.speed(), f"mfu/{name}": share, f"memory/{name}": results.footprint()}


def main() -> int:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__.partition("\n")[0])
    arguments = flags.parse_args()
    document = Document(machine=machine(PACKAGES), cases={})
    if not torch.cuda.is_available():
        print("there is no GPU here: nothing to measure", file=sys.stderr)
    else:
        gpu = torch.cuda.get_device_name()
        document["machine"]["gpu"] = gpu
        limit = next((peak for word, peak in DATA_SHEETS.items() if word in gpu), None)
        rounds, chosen = (2, ("135m",)) if arguments.quick else (5, tuple(JOBS))
        for name in chosen:
            cases = measure(name, JOBS[name], torch.device("cuda"), rounds=rounds, steps=10, limit=limit)
            document["cases"] |= cases
    report(document, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
