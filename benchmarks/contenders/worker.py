"""A contender in a process of its own: its own threads and its own peak memory, driven over a pipe, one at a time.

The benchmark holds a `Worker`; in the process, `serve` times the contender's steps. The timing is written here once, so
that every contender is timed alike.
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from harness import ContenderError

BENCHMARKS = Path(__file__).parent.parent
REPLY_SECONDS = 600
WARMUP_STEPS = 4
MEMORY_PROMPT, MEMORY_STEPS = 512, 16
# Every vocabulary has these ids, and none of them is special; which ones they are does not change the work.
TOKEN_IDS = range(1000, 20000)


class Contender(Protocol):
    """A language model as the benchmark drives it. A step is one token for every sequence, always the likeliest."""

    facts: dict[str, Any]  # what the benchmark should know of it, such as what it chose for itself

    def use_threads(self, threads: int) -> None:
        """Compute with this many threads from now on."""

    def read(self, prompts: list[list[int]]) -> None:
        """Forget everything, then read these prompts of equal length, as one batch."""

    def rewind(self) -> None:
        """Forget what followed the prompts."""

    def step(self) -> None:
        """Write one token for every sequence."""


class Worker:
    """The benchmark's end: starts the process, asks, and ends it. Use it as a context manager."""

    def __init__(self, module: str, **settings: Any) -> None:
        """module: one of this package, run as a program. settings: the arguments of its contender."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"contenders.{module}", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=BENCHMARKS,
            env=environment(),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def facts(self) -> dict[str, Any]:
        """Wait until it has loaded its model: what it says of itself. Call it once, before `ask`.

        Raises ContenderError if it could not be made.
        """
        return dict(self._reply())

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have it do one of `Session`'s methods. Raises ContenderError with its reason."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([what, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the reply says how
        return self._reply()

    def close(self) -> None:
        """End the process: by closing its input, and after a moment by force."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(5)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _reply(self) -> Any:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], REPLY_SECONDS)[0]:
            self._process.kill()
            raise ContenderError(f"no answer in {REPLY_SECONDS} seconds")
        line = self._process.stdout.readline()
        if not line:
            raise ContenderError(self._last_words())
        result, error = json.loads(line)
        if error is not None:
            raise ContenderError(error)
        return result

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with status {status}: {lines[-1] if lines else 'it printed nothing'}"


class Session:
    """The process's end: what a `Worker` can ask for."""

    def __init__(self, contender: Contender) -> None:
        self._contender = contender
        self._random = random.Random(0)
        self._batch = 0

    def memory(self, threads: int) -> float:
        """The process's peak memory in MB once it has read a prompt and begun to answer: ask for it first."""
        self.read(threads, 1, MEMORY_PROMPT)
        for _ in range(MEMORY_STEPS):
            self._contender.step()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6

    def read(self, threads: int, batch: int, length: int) -> float:
        """Read new prompts, which `decode` then continues: tokens per second, over all sequences."""
        self._contender.use_threads(threads)
        # New ones each time: what a contender has kept of older prompts must not help it.
        prompts = [self._random.choices(TOKEN_IDS, k=length) for _ in range(batch)]
        self._batch = batch
        started = time.perf_counter()
        self._contender.read(prompts)
        return batch * length / (time.perf_counter() - started)

    def decode(self, steps: int) -> float:
        """Tokens per second, over all sequences, of the steps that follow the prompts and a few of warming up."""
        self._contender.rewind()
        for _ in range(WARMUP_STEPS):
            self._contender.step()
        started = time.perf_counter()
        for _ in range(steps):
            self._contender.step()
        return self._batch * steps / (time.perf_counter() - started)


def serve(make: Callable[..., Contender]) -> None:
    """Make the contender and answer until the input ends. `make` imports what it needs: failing is an answer."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the replies

    def reply(result: Any, error: str | None = None) -> None:
        replies.write(json.dumps([result, error]) + "\n")
        replies.flush()

    try:
        contender = make(**json.loads(sys.argv[1]))
    except Exception as error:
        reply(None, _reason(error))
        return
    reply(contender.facts)
    session = Session(contender)
    for line in sys.stdin:
        what, arguments = json.loads(line)
        try:
            reply(getattr(session, what)(**arguments))
        except Exception as error:
            reply(None, _reason(error))


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed ({error})"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def environment() -> dict[str, str]:
    """The environment of a contender: nothing is fetched, and nobody's thread settings are inherited."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
