"""The process's end of a contender that trains: its own loop, let on by as many steps as the benchmark asks for.

A training loop cannot be called step by step, as a model can that writes tokens (`worker.Session`): it runs, and calls
back after each step. So here the loop is in charge and its callback answers the benchmark's `Worker`. What is timed is
one long run, paused between turns; no step of it differs from the steps of a user's run.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from contenders.worker import _reason

WARMUP_STEPS = 3  # before the first turn: they compile, make the optimiser's state and touch all memory


class Pace:
    """What a contender's loop reports to: `begin` before its first step, `first_loss` once, `step_done` after each."""

    def __init__(self, questions: TextIO, replies: TextIO) -> None:
        self._questions, self._replies = questions, replies
        self._marks: list[float] = []
        self._loss: float | None = None
        self._left = WARMUP_STEPS
        self._warm = False

    def begin(self, setting: str, device: str = "cpu") -> None:
        """The loop is about to start. setting: what was chosen for this contender, in a few words."""
        self._setting, self._device = setting, device
        self._started = self._now()

    def first_loss(self, loss: float) -> None:
        """The loss of the first step, a mean over its targets; contenders that do the same work agree on it."""
        if self._loss is None:
            self._loss = loss

    def step_done(self) -> None:
        """A whole step has been made. Returns when the next one is wanted and ends the process when none is."""
        self._left -= 1
        if not self._warm:
            self._marks.append(self._now())
        if self._left:
            return
        self._reply(self._now() - self._started if self._warm else self._facts())
        self._warm = True
        self._listen()

    def fail(self, error: Exception) -> None:
        """Say why there is no answer to the last question."""
        self._reply(None, _reason(error))

    def _facts(self) -> dict[str, Any]:
        # What the warm-up took beyond as many steps like its last one is what compiling took.
        last = self._marks[-1] - self._marks[-2]
        extra = self._marks[-1] - self._started - len(self._marks) * last
        return {"setting": self._setting, "loss": self._loss, "extra_seconds": max(0.0, extra)}

    def _listen(self) -> None:
        for line in iter(self._questions.readline, ""):
            what, arguments = json.loads(line)
            if what == "train":
                self._left = arguments["steps"]
                self._started = self._now()
                return
            assert what == "memory", what
            self._reply(self._peak_memory())
        raise SystemExit  # the benchmark has closed our input: it wants no more steps

    def _peak_memory(self) -> float:
        """MB that this process held at most: on a GPU in tensors, else in all."""
        if self._device != "cpu":
            import torch

            return torch.cuda.max_memory_allocated() / 1e6
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024 / 1e6

    def _now(self) -> float:
        if self._device != "cpu":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def _reply(self, result: Any, error: str | None = None) -> None:
        self._replies.write(json.dumps([result, error]) + "\n")
        self._replies.flush()


def run(train: Callable[..., None]) -> None:
    """Call `train(pace, **settings)` with what the benchmark wrote on the command line. `train` imports what it needs:
    failing is an answer."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get among the replies
    pace = Pace(sys.stdin, replies)
    try:
        train(pace, **json.loads(sys.argv[1]))
        raise RuntimeError("the run came to its end before the benchmark did")
    except Exception as error:
        pace.fail(error)
