"""A run's numbers as TensorBoard's event files, for people who look at theirs there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from craton.checkpoints.disk import disk_errors
from craton.errors import UsageError

_NOT_CURVES = ("step", "time")


class TensorBoardLog:
    """Writes scalars into `folder`, made if it is not there; each log adds an event file of its own.

    Raises UsageError if the package `tensorboard` is not installed, StoreError if the folder cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "the package tensorboard is not installed", remedy="pip install 'craton[tensorboard]'"
            ) from None
        self._folder = Path(folder)
        with disk_errors("write TensorBoard's events", self._folder):
            self._writer: Any = SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a step, at the moment values["time"] (seconds since 1970) if that is among them."""
        for name, value in values.items():
            if name not in _NOT_CURVES and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step, values.get("time"))

    def close(self) -> None:
        """Write what is waiting."""
        with disk_errors("write TensorBoard's events", self._folder):
            self._writer.close()

    def __enter__(self) -> TensorBoardLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
