"""Ranking metrics: trec_eval's figures on random rankings."""

from __future__ import annotations

import random

import pytest

from craton.errors import DataError, UsageError
from craton.evaluation.ranking_metrics import average_precision, ndcg_at, recall_at, reciprocal_rank


@pytest.mark.peer
def test_agreement_with_trec_eval() -> None:
    pytrec_eval = pytest.importorskip("pytrec_eval")
    rng = random.Random(0)
    for _ in range(300):
        ids = [f"d{i}" for i in range(rng.randint(1, 30))]
        gains = {id: rng.choice([0, 0, 1, 1, 2, 3]) for id in rng.sample(ids, rng.randint(1, len(ids)))}
        gains |= {"unranked": rng.randint(0, 2), ids[0]: 1}
        ranked = rng.sample(ids, rng.randint(1, len(ids)))
        run = {"q": {id: float(len(ranked) - place) for place, id in enumerate(ranked)}}
        judge = pytrec_eval.RelevanceEvaluator({"q": gains}, {"recall.1,5,10", "ndcg_cut.1,5,10", "map", "recip_rank"})
        expected = judge.evaluate(run)["q"]
        assert average_precision(ranked, gains) == pytest.approx(expected["map"])
        assert reciprocal_rank(ranked, gains) == pytest.approx(expected["recip_rank"])
        for k in (1, 5, 10):
            assert recall_at(ranked, gains, k) == pytest.approx(expected[f"recall_{k}"])
            assert ndcg_at(ranked, gains, k) == pytest.approx(expected[f"ndcg_cut_{k}"])


def test_sets_and_known_values() -> None:
    assert recall_at(["a", "b", "c"], {"b", "z"}, 2) == 0.5
    assert reciprocal_rank(["a", "b"], {"b"}) == 0.5
    assert reciprocal_rank(["a"], {"b"}) == 0
    assert average_precision(["a", "b", "c"], {"a", "c"}) == pytest.approx((1 + 2 / 3) / 2)
    assert ndcg_at(["a", "b"], {"a", "b"}, 2) == pytest.approx(1)
    assert ndcg_at([], {"a"}, 3) == 0


def test_refusals() -> None:
    with pytest.raises(DataError):
        recall_at(["a"], {"a": 0}, 1)
    with pytest.raises(DataError):
        average_precision(["a", "a"], {"a"})
    with pytest.raises(UsageError):
        ndcg_at(["a"], {"a"}, 0)
