"""The comparison as one HTML page that opens offline: the verdict first, then what it rests on, threats included."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any, Final

from craton.compare.study import Comparison, Measurement
from craton.compare.verdict import HORIZONS, seconds
from craton.evaluation import page
from craton.evaluation.charts import Bar, Line, Point, interval_chart, log_lines, scatter_chart
from craton.evaluation.intervals import Estimate

MOST_EXAMPLES: Final = 12


def report(found: Comparison) -> str:
    """The page."""
    task, verdict = found.task, found.verdict
    ways = [m for m in found.measurements if not m.diagnostic]
    best = verdict.quality[verdict.recommended]
    lead = (
        f"{len(task.test):,} sealed test items of {task.test.groups:,} source documents · {task.metric} · "
        f"{', '.join(found.settings.models)} · run {found.run.id}"
    )
    body = [
        _verdict(found),
        page.section("The ways", _table(found), page.figure(_quality_chart(found), "Quality with 95 % intervals.")),
        page.section(
            "Quality against time",
            page.figure(
                _pareto(found),
                "Each way by the seconds of an answer; the dashed line joins those that no other "
                "way beats in both. Pale: diagnostics.",
            ),
        ),
        page.section(
            "What it costs",
            _costs(found, ways),
            page.figure(_cost_chart(found, ways), "Set-up and questions together, in seconds of this machine."),
        ),
        page.section("Pairs", _pairs(found)),
        page.section("Where it goes well and where it does not", *(_slices(m, task.metric) for m in ways)),
        page.section("Answers, side by side", _examples(found, ways)),
        page.section("What each way is", *(_recipe(m) for m in ways)),
        page.section("Decided before the run", _list(found.plan)),
        page.section("Threats to validity, answered", _threats(found)),
        page.section("Provenance", _provenance(found)),
    ]
    return page.page(f"{task.name}: prompt, retrieve or fine-tune?", body, lead=lead + f" · best {best.value:.1%}")


def _verdict(found: Comparison) -> str:
    verdict = found.verdict
    flips = "".join(f"<li>{escape(flip)}</li>" for flip in verdict.flips)
    would = f"<p>What would flip it:</p><ul>{flips}</ul>" if flips else ""
    return (
        f'<div class="verdict"><strong>{escape(verdict.sentence)}</strong><p>{escape(verdict.margin)}</p>{would}</div>'
    )


def _table(found: Comparison) -> str:
    metric = found.task.metric
    head = ["way", f"{metric} (95 %)", "seeds ±", "p50", "p95", "tokens", "set-up", "memory", "per right"]
    rows, classes = [], []
    for m in found.measurements:
        f, recipe = m.figures, m.recipe
        spread = _spread(m)
        rows.append(
            [
                m.label,
                interval(f[metric]),
                f"{spread:.1%}" if spread is not None else "–",
                seconds(f["latency_p50"].value) if recipe or m.label != "majority" else "–",
                seconds(f["latency_p95"].value) if recipe or m.label != "majority" else "–",
                f"{f['prompt_tokens'].value:,.0f}",
                seconds(recipe.setup) if recipe else "–",
                f"{m.memory / 1e6:,.0f} MB" if m.memory and recipe else "–",
                _finite(found.verdict.cost_of_pass.get(m.label)),
            ]
        )
        style = "diagnostic" if m.diagnostic else ""
        classes.append("best" if m.label == found.verdict.recommended else style)
    return page.table(head, rows, classes=classes)


def _quality_chart(found: Comparison) -> str:
    bars = []
    for number, m in enumerate(found.measurements):
        one = found.verdict.quality[m.label]
        bars.append(Bar(m.label, one.value, one.low, one.high, number, m.diagnostic))
    return interval_chart(bars, title="Quality of each way", form=lambda v: f"{v:.0%}", top=1.0)


def _pareto(found: Comparison) -> str:
    asked = [m for m in found.measurements if m.label != "majority"]
    known = [(m.figures["seconds"].value, found.verdict.quality[m.label].value) for m in asked]
    points = []
    for number, (m, (x, y)) in enumerate(zip(asked, known, strict=True)):
        one = found.verdict.quality[m.label]
        chosen = [pair for other, pair in zip(asked, known, strict=True) if not other.diagnostic and other is not m]
        frontier = not m.diagnostic and not any(a <= x and b >= y and (a, b) != (x, y) for a, b in chosen)
        points.append(Point(m.label, x, y, one.low, one.high, number, frontier, m.diagnostic))
    return scatter_chart(
        points, title="Quality against time", x_title="seconds of an answer", y_title=found.task.metric
    )


def _costs(found: Comparison, ways: Sequence[Measurement]) -> str:
    price = found.settings.price_per_hour
    head = ["in all over", *(m.label for m in ways)]
    rows = []
    for horizon in HORIZONS[1:]:
        cells = []
        for m in ways:
            spent = found.verdict.totals[m.label][horizon]
            cells.append(seconds(spent) + (f" ({spent / 3600 * price:,.2f})" if price else ""))
        rows.append([f"{horizon:,} questions", *cells])
    broken = [one.sentence for one in found.verdict.break_evens]
    note = "An update is all documents read anew (retrieval) or an adapter trained anew; a prompt holds no facts."
    return page.table(head, rows) + (_list(broken) if broken else "") + page.paragraph(note, "soft")


def _cost_chart(found: Comparison, ways: Sequence[Measurement]) -> str:
    lines = []
    for number, m in enumerate(ways):
        totals = found.verdict.totals[m.label]
        lines.append(Line(m.label, [(n, totals[n]) for n in HORIZONS], number))
    return log_lines(lines, title="Total cost", x_title="questions", y_title="in all")


def _pairs(found: Comparison) -> str:
    rows = []
    for one in found.verdict.comparisons:
        d = one.difference
        says = "better" if (d.p_adjusted or 0.0) < 0.05 else "cannot be told apart"
        rows.append(
            [
                f"{one.better} – {one.other}",
                f"{d.value:+.1%}",
                f"{d.low:+.1%} to {d.high:+.1%}",
                f"{d.p_adjusted:.2g}",
                says,
            ]
        )
    note = (
        "Paired over the same items, by source document; intervals hold all at once, p-values are adjusted by Holm for "
        "all pairs."
    )
    return page.table(["pair", "difference", "interval", "p", ""], rows) + page.paragraph(note, "soft")


def _slices(m: Measurement, metric: str) -> str:
    tables = []
    for name, values in m.slices.items():
        rows = [[value, interval(one), f"{one.n}"] for value, one in values.items()]
        if rows:
            tables.append(page.table([name, metric, "n"], rows))
    return page.details(m.label, *tables) if tables else ""


def _examples(found: Comparison, ways: Sequence[Measurement]) -> str:
    # Where ways disagree most, something can be learnt; every so many items, so that none is picked by hand.
    count = len(ways[0].rows[0])
    spread = {i: len({round(m.rows[0][i].score, 2) for m in ways}) for i in range(count)}
    chosen = sorted(sorted(spread, key=lambda i: (-spread[i], i))[:MOST_EXAMPLES])
    rows = [
        [ways[0].rows[0][i].input, " / ".join(ways[0].rows[0][i].expected[:2])]
        + [("✓ " if m.rows[0][i].score >= 0.5 else "✗ ") + m.rows[0][i].answer for m in ways]
        for i in chosen
    ]
    columns = range(2 + len(ways))
    note = page.paragraph("The items on which the ways disagree most.", "soft")
    return note + page.table(["question", "right", *(m.label for m in ways)], rows, text=columns)


def _recipe(m: Measurement) -> str:
    recipe = m.recipe
    assert recipe is not None
    facts = [
        f"{recipe.tried} candidates tried, {recipe.tokens:,} tokens, set up in {seconds(recipe.setup)} "
        f"({'budget used up: ' + recipe.stopped if recipe.stopped != 'done' else 'within budget'})",
        *([f"{recipe.passages} passages with each question"] if recipe.passages else []),
        *([f"adapters: {', '.join(recipe.adapters)}"] if recipe.adapters else []),
        *([f"bits per byte of general text: {m.forgetting:.3f}"] if m.forgetting is not None else []),
        *recipe.notes,
    ]
    prompt = json.dumps(recipe.prompt.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return page.details(m.label, _list(facts), page.preformatted(prompt))


def threats(found: Comparison) -> list[tuple[str, str]]:
    """What could make the comparison wrong, and what was done about each."""
    task, settings = found.task, found.settings
    by_name = {m.label: m for m in found.measurements}
    leaks = task.leaks
    adapted = [m for m in found.measurements if m.recipe is not None and m.recipe.adapters]
    base = next((m for m in found.measurements if m.recipe is not None and m.recipe.way == "zero-shot"), None)
    forgot = "not measured: there was no adapter or no base among the ways"
    if adapted and base is not None and base.forgetting is not None:
        forgot = "bits per byte of general English text: " + ", ".join(
            f"{m.label} {m.forgetting:.3f}" for m in [base, *adapted] if m.forgetting is not None
        )
    limits = [m.label for m in found.measurements if m.recipe is not None and m.recipe.stopped != "done"]
    oracle, drawn = by_name.get("oracle context"), by_name.get("random context")
    context = "there were no documents"
    if drawn is not None:
        context = (f"with the right passage {_value(found, oracle)}, " if oracle is not None else "") + (
            f"with a random one {_value(found, drawn)}: the difference is what finding is worth"
        )
    return [
        (
            "Was the split made before anything looked at the data?",
            f"Yes: {'; '.join(task.decisions) or 'it came split'}.",
        ),
        (
            "Do training items repeat test items?",
            "Not measured."
            if leaks is None
            else f"{leaks.exact} exact, {leaks.overlap_13} sharing 13 words and {leaks.near} near-duplicates were "
            "found and removed from the training and development items.",
        ),
        (
            "Had the model seen the test already?",
            f"Zero-shot it answers {_value(found, base)}; a high figure would say so. It cannot be excluded for "
            "public data."
            if base is not None
            else "Not measured: zero-shot is not among the ways.",
        ),
        (
            "Was the test looked at while choosing?",
            f"No: it is sealed in the program, and was opened {len(found.opened)} time(s), after every way was written "
            f"down (SHA-256 {task.test.digest[:16]}).",
        ),
        (
            "Did the ways get the same chances?",
            f"Each had at most {settings.trials} candidates and {settings.minutes:g} minutes"
            + (f"; the time ran out for {', '.join(limits)}" if limits else "; none ran out of time")
            + ". An adapter is one candidate, trained from several seeds.",
        ),
        (
            "Do they run on the same model?",
            f"Yes, the same checkpoint and number format ({found.dtype}), adapters merged.",
        ),
        (
            "Could it be the luck of one seed?",
            f"Adapters come from {settings.seeds} seeds; an item counts by its mean over them, and the spread is in "
            "the table. Prompts are chosen once, so their luck is in the intervals only by the items.",
        ),
        (
            "Are questions about one document counted as independent?",
            f"No: intervals and tests count {task.test.groups:,} source documents, not {len(task.test):,} items.",
        ),
        ("Are many comparisons made?", "Yes, and p-values are adjusted by Holm for all pairs of ways."),
        (
            "Could the test see a difference at all?",
            "Before the run: " + next((line for line in found.plan if "can show" in line), "") + ".",
        ),
        ("Is the judge a model?", f"No: {task.metric} is computed from the answer and the right answers alone."),
        (
            "Does the index hold the answers of the test?",
            "It holds documents (or training items), never test questions.",
        ),
        (
            "Do test documents appear in training?",
            "Never where items are split by source document; where the data came split, as its makers split it.",
        ),
        ("Is it the passages that help?", context[:1].upper() + context[1:] + "."),
        ("Does the adapter forget?", forgot[:1].upper() + forgot[1:] + "."),
        (
            "Are times comparable?",
            "All ways answer one question at a time on this machine, one way after another, the first question left "
            "out; other work on the machine would disturb them, so trust ratios more than seconds.",
        ),
        (
            "Does it hold elsewhere?",
            "For this model, task and machine. A larger model gains less from an adapter and more from a prompt: "
            "compare again.",
        ),
    ]


def _threats(found: Comparison) -> str:
    items = "".join(f"<dt>{escape(q)}</dt><dd>{escape(a)}</dd>" for q, a in threats(found))
    return f"<dl>{items}</dl>"


def _provenance(found: Comparison) -> str:
    facts: dict[str, Any] = found.run.environment()
    values = {key: facts[key] for key in ("craton", "torch", "cpu", "threads", "system") if key in facts}
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in values.items())
    settings = json.dumps(found.settings.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return f"<dl>{rows}</dl>" + page.details("Settings", page.preformatted(settings))


def interval(one: Estimate) -> str:
    """ "62.1% (58.0 to 66.0)"."""
    return f"{one.value:.1%} ({100 * one.low:.1f} to {100 * one.high:.1f})"


def _spread(m: Measurement) -> float | None:
    if len(m.rows) < 2:
        return None
    means = [sum(row.score for row in seed) / len(seed) for seed in m.rows]
    middle = sum(means) / len(means)
    return float((sum((one - middle) ** 2 for one in means) / (len(means) - 1)) ** 0.5)


def _value(found: Comparison, m: Measurement | None) -> str:
    return interval(found.verdict.quality[m.label]) if m is not None else "not measured"


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f'<li dir="auto">{escape(line)}</li>' for line in lines) + "</ul>"


def _finite(value: float | None) -> str:
    return "–" if value is None or value == float("inf") else seconds(value)
