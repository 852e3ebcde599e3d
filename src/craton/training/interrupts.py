"""Ctrl-C and SIGTERM stop a run at once, but never in the middle of an update or of a file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Raises KeyboardInterrupt for SIGINT and SIGTERM; within `held`, only when the block has ended."""

    def __init__(self) -> None:
        self._held = self._pending = False

    @contextmanager
    def handled(self) -> Iterator[Interrupts]:
        """Handle both signals in the block (in the main thread; elsewhere they are not ours)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before: dict[signal.Signals, Any] = {
            number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off until the block has ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._pending:
            self._pending = False
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._pending = True
        else:
            raise KeyboardInterrupt
