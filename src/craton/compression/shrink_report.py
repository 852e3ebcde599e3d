"""The ladder as one HTML page that opens offline: what to take, the Pareto front, and what it rests on."""

from __future__ import annotations

import json
from collections.abc import Callable
from html import escape
from typing import Any

from craton.compression.pareto import Rung, front
from craton.compression.shrink import Shrunk
from craton.evaluation import page
from craton.evaluation.charts import Point, scatter_chart


def report(found: Shrunk) -> str:
    """The page."""
    metric = found.task.metric
    lead = (
        f"{found.rungs[0].quality.n:,} development items chose, {len(found.task.test):,} sealed test items confirmed · "
        f"{metric} · run {found.run.id}"
    )
    said = f"<strong>{escape(found.choice.sentence)}</strong><p>{escape(confirmation(found))}</p>"
    body = [
        f'<div class="verdict">{said}</div>',
        page.section("The ladder", _table(found)),
        page.section(
            "Quality against size",
            page.figure(
                _chart(found, lambda r: float(r.footprint.disk), "bytes on disk", megabytes),
                "The dashed line joins the models that no other beats in quality, bytes and speed.",
            ),
        ),
        page.section(
            "Quality against time",
            page.figure(
                _chart(found, lambda r: 1 / r.footprint.decode, "seconds of a token", None),
                "Writing at batch 1, medians of interleaved processes.",
            ),
        ),
        page.section("Decided before the run", _list(found)),
        page.section("Provenance", _provenance(found)),
    ]
    return page.page(f"{found.task.name}: how small can it be?", body, lead=lead)


def confirmation(found: Shrunk) -> str:
    """What the sealed test said, in a sentence."""
    if found.confirmed is None:
        return "The sealed test stays sealed."
    base, chosen, d = found.confirmed
    return (
        f"On the sealed test: {chosen.value:.1%} against {base.value:.1%}, a difference of {d.value:+.1%} "
        f"(95 %: {d.low:+.1%} to {d.high:+.1%})."
    )


def megabytes(nbytes: float) -> str:
    """ "98.4 MB"."""
    return f"{nbytes / 1e6:.3g} MB"


def _table(found: Shrunk) -> str:
    head = [
        "model",
        f"{found.task.metric} (95 %)",
        "against the base",
        "bits per byte",
        "on disk",
        "peak memory",
        "prefill",
        "decode",
        "front",
    ]
    best = {rung.label for rung in front(found.rungs)}
    rows, classes = [], []
    for rung in found.rungs:
        q, d, f = rung.quality, rung.difference, rung.footprint
        rows.append(
            [
                rung.label,
                f"{q.value:.1%} ({100 * q.low:.1f} to {100 * q.high:.1f})",
                "–" if d is None else f"{d.value:+.1%} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
                f"{rung.bits_per_byte.value:.3f}",
                megabytes(f.disk),
                megabytes(f.memory),
                f"{f.prefill:,.0f} tokens/s",
                f"{f.decode:,.1f} tokens/s",
                "yes" if rung.label in best else "",
            ]
        )
        classes.append("best" if rung.label == found.choice.chosen.label else "")
    note = page.paragraph("Differences are paired, and their intervals hold all at once.", "soft")
    return page.table(head, rows, classes=classes) + note


def _chart(found: Shrunk, x: Callable[[Rung], float], x_title: str, form: Callable[[float], str] | None) -> str:
    best = {rung.label for rung in front(found.rungs)}
    points = [
        Point(rung.label, x(rung), rung.quality.value, rung.quality.low, rung.quality.high, i, rung.label in best)
        for i, rung in enumerate(found.rungs)
    ]
    return scatter_chart(points, title="Pareto front", x_title=x_title, y_title=found.task.metric, form=form)


def _list(found: Shrunk) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in found.plan) + "</ul>"


def _provenance(found: Shrunk) -> str:
    facts: dict[str, Any] = found.run.environment()
    values = {key: facts[key] for key in ("craton", "torch", "cpu", "threads", "system") if key in facts}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    settings = json.dumps(found.settings.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return f"<dl>{rows}</dl>" + page.details("Settings", page.preformatted(settings))
