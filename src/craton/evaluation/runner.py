"""Answering items one after another, each answer kept at once, and what comes of it: figures with their intervals."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from craton.evaluation.calibration import expected_calibration_error
from craton.evaluation.class_metrics import macro_f1
from craton.evaluation.intervals import Estimate, estimate, estimate_quantile, estimate_statistic
from craton.evaluation.items import Answer, Answerer, Item
from craton.evaluation.ranking_metrics import ndcg_at, recall_at
from craton.evaluation.tasks import Kind, Metric
from craton.evaluation.text_metrics import contains, exact_match, rouge, token_f1
from craton.store.run_files import append_row, read_rows

# Slices with fewer items than this say nothing; they are counted together.
SMALLEST_SLICE: Final = 5
MOST_SLICES: Final = 12


@dataclass(frozen=True)
class Row:
    """One item answered. score: by the task's metric, 0 to 1. exact: exact match as SQuAD counts it. passages: names of
    the documents of the passages that were shown, best first. gold: of those that hold the answer, where known."""

    id: str
    group: str
    input: str
    expected: tuple[str, ...]
    answer: str
    score: float
    exact: float
    confidence: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    passages: tuple[str, ...] = ()
    gold: tuple[str, ...] = ()


def score(answer: str, item: Item, metric: Metric) -> float:
    """How right an answer is, from 0 to 1; the best over the item's forms of the right answer."""
    match metric:
        case "accuracy":
            return float(any(_plain(answer) == _plain(right) for right in item.answers))
        case "exact_match":
            return exact_match(answer, item.answers)
        case "f1":
            return token_f1(answer, item.answers)
        case "contains":
            return contains(answer, item.answers)
        case "rouge_l":
            return max(rouge(answer, right, "rougeL") for right in item.answers)


def evaluate(
    items: Sequence[Item],
    answerer: Answerer,
    metric: Metric,
    *,
    rows: Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[Row]:
    """Every item's row, in order. rows: a file of JSON lines that each row is added to at once; items that it holds
    already are not asked again, so an interrupted evaluation goes on where it stopped.

    stop: asked before each item; True ends early, with the rows so far.
    """
    done = {row["id"]: _row(row) for row in read_rows(rows)} if rows is not None else {}
    found = []
    for number, item in enumerate(items, 1):
        row = done.get(item.id)
        if row is None:
            if stop():
                break
            row = make_row(item, answerer(item), metric)
            if rows is not None:
                append_row(rows, asdict(row))
        found.append(row)
        on_progress(number, len(items))
    return found


def make_row(item: Item, answer: Answer, metric: Metric) -> Row:
    """An answer with what it is worth."""
    return Row(
        id=item.id,
        group=item.group,
        input=item.input,
        expected=item.answers,
        answer=answer.text,
        score=score(answer.text, item, metric),
        exact=exact_match(answer.text, item.answers),
        confidence=answer.confidence,
        seconds=answer.seconds,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        passages=answer.passages,
        gold=item.gold,
    )


def summary(rows: Sequence[Row], metric: Metric, *, kind: Kind | None = None, seed: int = 0) -> dict[str, Estimate]:
    """The figures of an evaluation: quality, latency, tokens, and where they can be told macro-F1, calibration, and
    recall@k and nDCG@k of the documents of the k passages shown. Intervals resample source documents.

    kind: of the task; "answer", or none and a metric other than accuracy, brings F1 and exact match beside the metric.
    """
    clusters = [row.group for row in rows]

    def mean(values: Sequence[float]) -> Estimate:
        return estimate(values, clusters, seed=seed)

    found: dict[str, Estimate] = {metric: mean([row.score for row in rows])}
    if kind == "answer" or (kind is None and metric != "accuracy"):
        found |= {
            "f1": mean([token_f1(row.answer, row.expected) for row in rows]),
            "exact_match": mean([row.exact for row in rows]),
        }
    if metric == "accuracy":
        pairs = [(row.answer, row.expected[0]) for row in rows]
        found["macro_f1"] = estimate_statistic(
            pairs,
            lambda some: macro_f1([p[0] for p in some], [p[1] for p in some]),
            clusters,
            seed=seed,
            resamples=200,
            bounds=(0, 1),
        )
        confidences = [(row.confidence, row.score) for row in rows if row.confidence is not None]
        if len(confidences) == len(rows):
            table = np.array(confidences, dtype=float)
            found["brier"] = mean(((table[:, 0] - table[:, 1]) ** 2).tolist())
            found["calibration_error"] = estimate_statistic(
                table, _calibration_error, clusters, seed=seed, resamples=500, bounds=(0, 1)
            )
    k = max(len(row.passages) for row in rows)
    known = [row for row in rows if row.gold]
    if known and k:
        for name, at in (("recall", recall_at), ("ndcg", ndcg_at)):
            # A document of which several passages were shown has its best place.
            values = [at(tuple(dict.fromkeys(row.passages)), row.gold, k) for row in known]
            found[f"{name}@{k}"] = estimate(values, [row.group for row in known], seed=seed)
    for name, q in (("latency_p50", 0.5), ("latency_p95", 0.95)):
        found[name] = estimate_quantile([row.seconds for row in rows], q, clusters, seed=seed, resamples=500)
    for name, values in (
        ("seconds", [row.seconds for row in rows]),
        ("prompt_tokens", [float(row.prompt_tokens) for row in rows]),
        ("completion_tokens", [float(row.completion_tokens) for row in rows]),
    ):
        found[name] = estimate(values, clusters, seed=seed, score=False)
    return found


def slices(rows: Sequence[Row], items: Sequence[Item], keys: Sequence[str] = ()) -> dict[str, dict[str, Estimate]]:
    """The quality by length of the input, script, right answer, and the record's keys: slice -> value -> figure."""
    by_id = {item.id: item for item in items}
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    lengths = np.array([len(row.input) for row in rows])
    edges = np.unique(np.quantile(lengths, [1 / 3, 2 / 3])) if len(rows) else lengths
    for row in rows:
        place = int(np.searchsorted(edges, len(row.input)))
        found["length"][_length_name(place, edges)].append(row)
        found["script"][script_of(row.input)].append(row)
        if len({r.expected[0] for r in rows}) <= len(rows) // SMALLEST_SLICE:
            found["answer"][row.expected[0]].append(row)
        for key in keys:
            found[key][by_id[row.id].fields.get(key, "(none)")].append(row)
    return {
        name: {value: estimate([r.score for r in some], [r.group for r in some]) for value, some in _largest(values)}
        for name, values in found.items()
        if len(values) > 1
    }


def script_of(text: str) -> str:
    """The script that most letters of a text belong to: "Latin", "Arabic", "Han" ..., "none" without letters."""
    counts: dict[str, int] = defaultdict(int)
    for character in text:
        if character.isalpha():
            counts[unicodedata.name(character, "OTHER").split()[0].title()] += 1
    name = max(counts, key=lambda one: counts[one], default="none")
    return {"Cjk": "Han"}.get(name, name)


def _largest(values: Mapping[str, list[Row]]) -> list[tuple[str, list[Row]]]:
    kept = sorted(values.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:MOST_SLICES]
    return sorted((pair for pair in kept if len(pair[1]) >= SMALLEST_SLICE), key=lambda pair: pair[0])


def _length_name(place: int, edges: npt.NDArray[Any]) -> str:
    low = f"{int(edges[place - 1]) + 1}" if place else "0"
    high = f"{int(edges[place])}" if place < len(edges) else "more"
    return f"{low} to {high} characters" if high != "more" else f"{low} characters and more"


def _calibration_error(table: npt.NDArray[Any]) -> float:
    return expected_calibration_error(table[:, 0], table[:, 1])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _row(value: dict[str, Any]) -> Row:
    # Rows that an older version wrote have other fields: an interrupted evaluation goes on with those that both know.
    names = {field.name for field in fields(Row)}
    known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items() if k in names}
    return Row(**known)
