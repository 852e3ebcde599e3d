"""The texts that a verb reads: counted, with a line that says how far it is, and given up at once on Ctrl-C."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Final, TypeVar

from craton.cli.terminal import size, stderr
from craton.errors import UsageError

T = TypeVar("T")

SAMPLE_CHARACTERS: Final = 1_000_000  # of a corpus that are kept to measure on


class Corpus:
    """The texts of a corpus, one for each record, counted as they are read."""

    def __init__(self, sources: Sequence[str], lines: bool, say: Callable[[str], None], then: str) -> None:
        from craton.data.records import Reading

        self.documents = self.bytes = 0
        self.sample: list[str] = []
        self.say = say
        self._sources, self._lines, self._then = list(sources), lines, then
        self._reading = Reading()

    def __iter__(self) -> Iterator[str]:
        from craton.data.forms import texts_of
        from craton.data.records import read_records

        began, sampled = time.monotonic(), 0
        for record in read_records(self._sources, lines=self._lines, reading=self._reading):
            plain = record.value.get("text")
            text = plain if isinstance(plain, str) else "\n\n".join(texts_of(record.value))
            self.documents += 1
            self.bytes += len(text.encode())
            if sampled < SAMPLE_CHARACTERS:
                self.sample.append(text[: SAMPLE_CHARACTERS - sampled])
                sampled += len(self.sample[-1])
            if self.documents % 64 == 1:
                rate = self.bytes / max(time.monotonic() - began, 1e-3)
                self.say(f"reading · {self.summary()} · {size(int(rate))}/s")
            yield text
        self.say(f"{self._then} · {self.summary()}")

    def summary(self) -> str:
        """What was read, for people."""
        documents = f"{self.documents:,} document{'s' if self.documents != 1 else ''}"
        skipped = ", ".join(f"{count} {why}" for why, count in self._reading.skipped.items())
        return f"{documents}, {size(self.bytes)} of text" + (f" (files skipped: {skipped})" if skipped else "")


@contextmanager
def reading(sources: Sequence[str], lines: bool, then: str) -> Iterator[Corpus]:
    """The texts, with a line on standard error that says how far they are read, and `then` what is done with them."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if not sources:
        raise UsageError("there is no corpus to learn on", remedy="name its files or folders")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=stderr, transient=True) as bar:
            task = bar.add_task("reading", total=None)
            yield Corpus(sources, lines, lambda text: bar.update(task, description=text), then)
    except KeyboardInterrupt:
        stderr.print("stopped; nothing was written")
        raise


def interruptible(work: Callable[[], T]) -> T:
    """What `work` gives, done in a thread: in this one, Ctrl-C would not be heard before the library has finished."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        while not outcome.done():
            # With a limit: a signal that comes just before the wait begins would not end one without.
            wait([outcome], timeout=0.2)
        return outcome.result()
    except KeyboardInterrupt:
        # The thread cannot be stopped, and must not come back to an interpreter that is being taken down.
        atexit.register(os._exit, 130)
        raise
