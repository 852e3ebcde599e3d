"""Training a ladder of small models, and saying what the next one's loss will be before it is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Protocol

from pydantic import Field, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.config.sizes import parse_size
from craton.errors import UsageError
from craton.pretraining.scaling import LEVEL, Fit, Forecast, Trial, fit
from craton.pretraining.sizing import TOKENS_PER_PARAMETER, SizeOverrides, SizePlan, size

LEAST_RUNGS: Final = 3
NEXT: Final = 2  # what is foretold where nothing is named: a model of twice the largest one's size

Train = Callable[[SizePlan], float]
"""Trains a plan's model from scratch on the plan's tokens and gives its held-out loss in nats per token."""


class Record(Protocol):
    """Keeps what happened in the record of a run: `Run.event`."""

    def __call__(self, kind: str, /, **data: Any) -> None:
        """Note it, so that it stays whatever comes after."""


class LadderSettings(Settings):
    """What `craton scaling` may be told."""

    sizes: str = Field(default="0.5m,1m,2m,4m", description="parameters of the models to train, three or more")
    predict: str | None = Field(
        default=None, description="a larger size to foretell and then to train (none: foretell twice the largest)"
    )
    minutes: PositiveFloat | None = Field(
        default=None, description="take about so long in all, on fewer tokens a parameter (none: 20 a parameter)"
    )
    tokenizer: str | None = Field(
        default=None, description="a model or a folder whose tokeniser is used (none: one is trained on the data)"
    )
    vocab: str = Field(default="4k", description="tokens of a tokeniser that is trained on the data")
    context: PositiveInt = Field(default=512, description="tokens of a training window")


@dataclass(frozen=True)
class Ladder:
    """What to train, from the smallest up, and what to foretell. measure: whether to train the target, too."""

    rungs: tuple[SizePlan, ...]
    target: SizePlan
    measure: bool


@dataclass(frozen=True)
class LadderReport:
    """What was trained, the law it follows, what this says of the target, and the target's loss if it was measured."""

    trials: tuple[Trial, ...]
    fit: Fit
    forecast: Forecast
    measured: float | None = None

    @property
    def held(self) -> bool | None:
        """Whether the measured loss lies in the interval that was foretold; None where nothing was measured."""
        return None if self.measured is None else self.forecast.low <= self.measured <= self.forecast.high

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        law = self.fit.law
        intervals = {
            "floor": self.fit.interval(lambda law: law.floor),
            "alpha": self.fit.interval(lambda law: law.alpha),
        }
        if law.beta:
            intervals["beta"] = self.fit.interval(lambda law: law.beta)
        return {
            "trials": [asdict(trial) for trial in self.trials],
            "law": asdict(law),
            "level": LEVEL,
            "intervals": intervals,
            "forecast": asdict(self.forecast),
            "measured": self.measured,
            "held": self.held,
        }


def plan_ladder(
    sizes: Sequence[str], predict: str | None = None, *, vocab: int, context: int, flops: float | None = None
) -> Ladder:
    """The ladder of these sizes. predict: the size to foretell and to measure; none: the next one, not measured.

    flops: what all trainings together may cost. There are then fewer tokens for each parameter than the law of
    `size` says, and as many at every size: the loss is a function of the size alone only along such a line.

    Raises UsageError for fewer than three sizes, for one that is named twice or makes no model, and for a target that
    is not larger than all of them.
    """
    dials = sorted(parse_size(text) for text in sizes)
    target = parse_size(predict) if predict is not None else NEXT * dials[-1] if dials else 0
    if len(set(dials)) < max(LEAST_RUNGS, len(dials)):
        raise UsageError(
            f"a law cannot be fitted on the sizes {', '.join(sizes) or '(none)'}",
            remedy=f"name {LEAST_RUNGS} or more, each once",
        )
    if target <= dials[-1]:
        raise UsageError(
            f"the size to predict, {predict}, is not larger than those it is predicted from",
            remedy=f"name one above {max(sizes, key=parse_size)}",
        )
    per_parameter = float(TOKENS_PER_PARAMETER)
    if flops is not None:
        trained = [*dials, target] if predict is not None else dials
        per_parameter = min(per_parameter, flops / sum(6.0 * dial**2 for dial in trained))

    def plan(dial: int) -> SizePlan:
        tokens = max(context, round(per_parameter * dial))
        return size(dial, vocab=vocab, context=context, overrides=SizeOverrides(tokens=tokens))

    return Ladder(tuple(plan(dial) for dial in dials), plan(target), predict is not None)


def climb(train: Train, ladder: Ladder, record: Record) -> LadderReport:
    """Train every rung, fit the law, record what it says of the target, and only then train that one, if asked to."""
    trials = []
    for plan in ladder.rungs:
        trials.append(Trial(plan.parameters, plan.tokens, train(plan)))
        record("trial", **asdict(trials[-1]))
    law, target = fit(trials), ladder.target
    report = LadderReport(tuple(trials), law, law.forecast(target.parameters, target.tokens))
    record("forecast", **report.as_dict())
    if ladder.measure:
        report = replace(report, measured=train(target))
        record("measured", loss=report.measured, held=report.held)
    return report
