"""Faithfulness: the share of each answer's sentences that the passages shown prove."""

from __future__ import annotations

import pytest

from craton.evaluation.faithfulness import faithfulness
from craton.evaluation.items import Answer, Item
from craton.evaluation.runner import make_row


def rows(*answers, group=str):
    return [
        make_row(Item(str(i), "q", ("a",), group(i)), Answer(text, None, 1, 1, 0.1, passages), "f1")
        for i, (text, passages) in enumerate(answers)
    ]


def proven(row):
    """A sentence that begins with a plus is proven."""
    return [sentence.startswith("+") for sentence in row.answer.split(".") if sentence]


def test_it_is_the_mean_share_of_proven_sentences_of_answers_with_passages():
    given = rows(("+a.+b", ("d",)), ("+a.-b.-c.-d", ("d",)), ("-a", ("d",)), ("+a", ()), ("", ("d",)))
    found = faithfulness(given, proven)
    assert found is not None
    assert found.n == 3  # one was given without passages, and one says nothing
    assert found.value == pytest.approx((1 + 0.25 + 0) / 3)
    assert 0 <= found.low < found.value < found.high <= 1


def test_its_interval_resamples_source_documents():
    answers = [("+a", ("d",))] * 10 + [("-a", ("d",))] * 10
    alone = faithfulness(rows(*answers), proven)
    together = faithfulness(rows(*answers, group=lambda i: str(i // 5)), proven)
    assert alone is not None
    assert together is not None
    assert (alone.clusters, together.clusters) == (20, 4)
    assert together.high - together.low > alone.high - alone.low


def test_without_passages_there_is_none():
    assert faithfulness(rows(("+a", ()), ("", ("d",))), proven) is None
