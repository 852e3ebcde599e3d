"""What a run writes into the store while it goes on: its metrics, evaluations and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from craton.store.runs import Run
from craton.training.state import Progress
from craton.training.tensorboard import TensorBoardLog


class Recorder:
    """An observer that keeps everything in the run's folder. Only the first rank has one.

    peak: FLOP/s of this machine's products, and flops: of a token's training, for the share of the peak that a step
    reached. tensorboard: also write TensorBoard's event files.
    """

    def __init__(self, run: Run, *, flops: float, peak: float, tensorboard: bool = False) -> None:
        self._run, self._flops, self._peak = run, flops, peak
        self._board = TensorBoardLog(run.folder / "tensorboard") if tensorboard else None

    def on_step(self, progress: Progress, steps: int, values: Mapping[str, float]) -> None:
        rate = values["tokens"] / values["seconds"]
        trained = values["trained_tokens"] / values["seconds"]
        more = {"tokens_per_second": rate, "trained_tokens_per_second": trained}
        self._log(progress.step, {**values, **more, "share_of_peak": rate * self._flops / self._peak})

    def on_evaluation(self, progress: Progress, values: Mapping[str, float]) -> None:
        self._log(progress.step, {f"held_out/{name}": value for name, value in values.items()})

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        self._run.event("checkpoint", step=progress.step, path=path.name)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log_metrics(step, values)
        if self._board is not None:
            self._board.log(step, values)
