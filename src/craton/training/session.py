"""A run from its record to its model in the store: what pretraining and fine-tuning share around the loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from craton.checkpoints.disk import replace_file
from craton.config import Settings
from craton.errors import TrainingError
from craton.modalities.text import Tokenizer
from craton.store.artifacts import publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run
from craton.training.estimate import Estimate, estimate
from craton.training.flops import token_flops
from craton.training.loop import Observer, Outcome, Trainer
from craton.training.parallel import unshard
from craton.training.ranks import Ranks
from craton.training.recording import Recorder
from craton.training.state import checkpoints


@dataclass(frozen=True)
class Job:
    """A run that is ready to start. save: writes what is to be published into a folder. length: tokens of a sequence,
    for its arithmetic. tokenizer: of a model of texts. decisions: what was decided for the user, a sentence each.
    settings: the run's."""

    settings: Settings
    trainer: Trainer
    tokenizer: Tokenizer | None
    dtype: torch.dtype
    length: int
    decisions: tuple[str, ...]
    save: Callable[[Path], None]
    licence: str | None = None
    tensorboard: bool = False


def _nobody(run: Run | None, job: Job, expected: Estimate) -> None:
    """Nobody wants to know."""


@dataclass
class Hooks:
    """How a caller follows a run. on_ready: before the first step, with the estimate (no run: a dry one). observers:
    all steps. on_progress: what is being prepared."""

    on_ready: Callable[[Run | None, Job, Estimate], None] = _nobody
    observers: Sequence[Observer] = field(default_factory=tuple)
    on_progress: Callable[[str], None] = lambda doing: None


@dataclass(frozen=True)
class Result:
    """What came of a run. model: None on ranks that publish nothing."""

    run: Run
    outcome: Outcome
    model: StoredModel | None


def new_run(
    kind: str,
    settings: Settings,
    provenance: dict[str, str],
    *,
    sources: Sequence[str],
    parents: tuple[Parent, ...],
    name: str,
    ranks: Ranks,
) -> Run:
    """The record of a run, the same on every rank; its config holds the settings beside the sources."""
    run_id = "0" * 26
    if ranks.is_first:
        config: dict[str, Any] = {"sources": list(sources), "settings": settings.model_dump(mode="json")}
        origins = {f"settings.{key}": origin for key, origin in provenance.items()}
        run_id = Run.create(kind, config=config, provenance=origins, parents=parents, name=name).id
    return Run.open(ranks.share(run_id))


@contextmanager
def at_work(run: Run, ranks: Ranks) -> Iterator[None]:
    """The first rank holds the run's lock; the others rely on it."""
    if ranks.is_first:
        with run.lock():
            yield
    else:
        yield


def last_checkpoint(run: Run, ranks: Ranks) -> Path | None:
    """Where a run goes on, if it has come to a checkpoint; what was logged after it no longer counts."""
    found = checkpoints(run.checkpoints_folder)
    if ranks.is_first:
        run.rewind(found[-1][0] if found else 0)
    return found[-1][1] if found else None


def check_same_data(digest: str, began_with: str, what: str, sources: Sequence[str]) -> None:
    """Refuse to go on with other data: a resumed run is the run that was not stopped. what: the data.

    Raises TrainingError.
    """
    if digest != began_with:
        raise TrainingError(
            f"this run began with other data: {what} changed",
            where=", ".join(sources),
            remedy="put the files back as they were, or start a new run",
        )


def rehearse(job: Job, hooks: Hooks) -> None:
    """A dry run: estimate and show, and stop before the first step."""
    hooks.on_ready(None, job, estimate(job.trainer, job.dtype))


def carry_out(run: Run, job: Job, ranks: Ranks, hooks: Hooks, checkpoint: Path | None = None) -> Result:
    """Estimate, train (from `checkpoint`, if one is given), take the best weights, publish them with a card."""
    trainer = job.trainer
    expected = estimate(trainer, job.dtype)
    if ranks.is_first:
        run.set_total_steps(trainer.steps)
        flops = token_flops(trainer.model, job.length).training
        recorder = Recorder(run, flops=flops, peak=expected.peak * ranks.world, tensorboard=job.tensorboard)
        trainer.observers += [recorder, *hooks.observers]
        hooks.on_ready(run, job, expected)
    outcome = trainer.fit(checkpoint)
    trainer.load_best()
    unshard(trainer.model)  # every rank takes part
    if not ranks.is_first:
        return Result(run, outcome, None)
    name = run.name
    assert name is not None
    measured = {f"held-out {key}": value for key, value in outcome.evaluation.items() if key != "targets"}

    def write(folder: Path) -> None:
        job.save(folder)
        card = model_card(run, name=name, licence=job.licence, metrics=measured)
        replace_file(folder / "README.md", card.encode())

    stored = publish_model(name, write, source=f"run:{run.id}", parents=run.record.parents, licence=job.licence)
    run.finish("done", {"model": stored.id, "metrics": outcome.evaluation})
    return Result(run, outcome, stored)
