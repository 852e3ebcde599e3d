"""The page of an evaluation: shares as shares, and calibration by what the metric counts."""

from __future__ import annotations

import re

import pytest

from craton.evaluation.intervals import estimate
from craton.evaluation.items import Answer, Item
from craton.evaluation.report import Evaluation, figure_text, report
from craton.evaluation.runner import evaluate, summary


@pytest.mark.parametrize("name", ["recall@4", "ndcg@10", "faithfulness", "f1"])
def test_shares_are_told_in_percent(name):
    assert figure_text(name, estimate([0.5, 0.5, 0.25, 0.75]))[0] == "50.0%"


def test_the_reliability_plot_is_of_what_the_metric_counts():
    items = [Item(str(i), "which language", ("C#",), f"d{i}") for i in range(20)]

    def page(answer):
        rows = evaluate(items, lambda item: Answer(answer, 0.9, 1, 1, 0.1), "accuracy")
        return report([Evaluation("task", "model", summary(rows, "accuracy"), "accuracy", rows=rows)])

    def height(html):
        [chart] = re.findall(r"<figure><svg[^>]*calibration.*?</figure>", html, re.DOTALL)
        return [float(y) for y in re.findall(r'<circle[^>]* cy="([\d.]+)"', chart)]

    [wrong], [right] = height(page("C++")), height(page("C#"))
    assert wrong > right  # lower on the page


def test_every_figure_stands_on_the_page():
    figures = {"f1": estimate([0.5, 1.0]), "recall@2": estimate([1.0, 0.0]), "faithfulness": estimate([1.0, 1.0, 0.0])}
    html = report([Evaluation("task", "model", figures, "f1")])
    for name, one in figures.items():
        row = re.search(rf"<td>{name}</td><td>([^<]*)</td><td>[^<]*</td><td>(\d+)</td>", html)
        assert row is not None, name
        assert row.groups() == (figure_text(name, one)[0], str(one.n))
