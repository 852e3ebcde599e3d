"""What a model costs to run on this machine: bytes on disk, peak memory, speed of reading and of writing.

Each measurement is a process of its own, so memory is the model's alone: python -m craton.compression.footprint MODEL
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from craton.errors import CratonError, UsageError

PROMPT_TOKENS: Final = 256
WRITTEN_TOKENS: Final = 48


@dataclass(frozen=True)
class Footprint:
    """disk: bytes of the weights' files. memory: peak bytes of a process that loads, reads and writes.

    prefill, decode: tokens a second of reading a prompt and of writing at batch 1.
    """

    disk: int
    memory: int
    prefill: float
    decode: float


def footprints(
    models: Sequence[str],
    *,
    rounds: int,
    threads: int | None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Footprint]:
    """The footprint of each model: medians over rounds in which the models take turns, so that what else goes on in
    the machine touches all alike. Raises UsageError for a model that cannot be run, with its own words."""
    turns: list[list[Footprint]] = [[] for _ in models]
    total = rounds * len(models)
    for number in range(total):
        on_progress(number, total)
        turns[number % len(models)].append(_in_own_process(models[number % len(models)], threads))
    on_progress(total, total)
    return [
        Footprint(
            some[0].disk,
            int(statistics.median(one.memory for one in some)),
            statistics.median(one.prefill for one in some),
            statistics.median(one.decode for one in some),
        )
        for some in turns
    ]


def _in_own_process(model: str, threads: int | None) -> Footprint:
    command = [sys.executable, "-m", __name__, model, *([str(threads)] if threads else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"{model} could not be run: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return Footprint(**json.loads(done.stdout))


def measure(model: str, threads: int | None = None) -> Footprint:
    """The footprint of a model in this process, which should have done nothing before."""
    from craton.compression.job import weight_bytes
    from craton.inference.model import load

    loaded = load(model, threads=threads)
    ids = [i % (loaded.module.config.vocab - 1) for i in range(1, 1 + min(PROMPT_TOKENS, loaded.context // 2))]
    settings: dict[str, Any] = {"temperature": 0.0, "logit_bias": dict.fromkeys(loaded.tokenizer.eos_ids, -100.0)}
    written = min(WRITTEN_TOKENS, loaded.context - len(ids) - 1)
    loaded.generate(ids[::-1], max_tokens=2, **settings)  # what is made at the first call is no part of the speed
    one = loaded.generate(ids, max_tokens=written, **settings)
    return Footprint(
        weight_bytes(loaded.checkpoint.path), peak_memory(), len(ids) / one.first_token_seconds, one.tokens_per_second
    )


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says begins with what the parent held
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    try:
        print(json.dumps(vars(measure(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))))
    except CratonError as error:
        sys.exit(str(error))
