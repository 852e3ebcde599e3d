"""An evaluation as one HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from craton.evaluation import page
from craton.evaluation.calibration import reliability_table
from craton.evaluation.charts import Bar, interval_chart, reliability_chart
from craton.evaluation.intervals import Estimate
from craton.evaluation.paired import Difference
from craton.evaluation.runner import Row

SHOWN_ROWS = 20
# By name, without the @k of those that are of the first k.
SHARES = frozenset(
    (
        "accuracy",
        "exact_match",
        "f1",
        "contains",
        "rouge_l",
        "macro_f1",
        "recall",
        "ndcg",
        "faithfulness",
        "calibration_error",
        "brier",
    )
)


@dataclass(frozen=True)
class Evaluation:
    """A model on a task. differences: to the baseline, by metric. rows: the answers, for tasks that have any."""

    task: str
    model: str
    figures: dict[str, Estimate]
    metric: str
    slices: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    difference: Difference | None = None
    baseline: str | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "task": self.task,
            "model": self.model,
            "metric": self.metric,
            "figures": {name: one.as_dict() for name, one in self.figures.items()},
            "slices": {k: {v: one.as_dict() for v, one in some.items()} for k, some in self.slices.items()},
            "baseline": self.baseline,
            "difference": self.difference.as_dict() if self.difference else None,
            "notes": list(self.notes),
        }


def is_share(name: str) -> bool:
    """Whether a figure lies between 0 and 1."""
    return name.partition("@")[0] in SHARES


def figure_text(name: str, one: Estimate) -> tuple[str, str]:
    """A figure and its interval, for people: shares in percent, times in milliseconds."""
    if is_share(name):
        return f"{one.value:.1%}", f"{100 * one.low:.1f} to {100 * one.high:.1f}"
    if name.startswith(("latency", "seconds")):
        return f"{1000 * one.value:,.0f} ms", f"{1000 * one.low:,.0f} to {1000 * one.high:,.0f}"
    return f"{one.value:,.4g}", f"{one.low:,.4g} to {one.high:,.4g}"


def report(evaluations: Sequence[Evaluation]) -> str:
    """The page."""
    body = []
    for one in evaluations:
        rows = [[name.replace("_", " "), *figure_text(name, e), f"{e.n:,}"] for name, e in one.figures.items()]
        parts = [page.table(["figure", "value", "95 % interval", "n"], rows)]
        shares = {name: e for name, e in one.figures.items() if is_share(name)}
        if shares:
            bars = [
                Bar(name.replace("_", " "), e.value, e.low, e.high, i) for i, (name, e) in enumerate(shares.items())
            ]
            parts.append(
                page.figure(interval_chart(bars, title="figures", form=lambda v: f"{v:.0%}", top=1.0), "Shares.")
            )
        if one.difference is not None:
            d = one.difference
            parts.append(
                page.paragraph(
                    f"{d.value:+.1%} over {one.baseline} (95 %: {d.low:+.1%} to {d.high:+.1%}, p = {d.p:.2g}), paired."
                )
            )
        known = [(row.confidence, row.score) for row in one.rows if row.confidence is not None]
        if one.metric == "accuracy" and len(known) == len(one.rows) and known:
            bins = reliability_table([c for c, _ in known], [right for _, right in known])
            points = [(b.confidence, b.accuracy, b.n) for b in bins if b.n]
            parts.append(page.figure(reliability_chart(points, title="calibration"), "On the line: as sure as right."))
        for name, values in one.slices.items():
            table = [[value, *figure_text(one.metric, e), f"{e.n}"] for value, e in values.items()]
            parts.append(page.details(f"by {name}", page.table([name, one.metric, "95 %", "n"], table)))
        if one.rows:
            answers = [[r.input, " / ".join(r.expected[:2]), r.answer, f"{r.score:.2f}"] for r in one.rows[:SHOWN_ROWS]]
            parts.append(
                page.details("answers", page.table(["question", "right", "answer", "score"], answers, text=(0, 1, 2)))
            )
        parts += [page.paragraph(note, "soft") for note in one.notes]
        body.append(page.section(f"{one.model} on {one.task}", *parts))
    return page.page("Evaluation", body)
