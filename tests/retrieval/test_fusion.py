"""Fusing is chosen on a development split, and only where it helps."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import DataError, UsageError
from craton.retrieval.fusion import DENSE, LEXICAL, Fusion, Run, candidates, ndcg, tune_fusion

NAN = math.nan


def world(
    seed: int, questions: int, lexical: float, dense: float, candidates: int = 40
) -> tuple[list[Run], list[set[int]]]:
    """Runs in which each side sees the one relevant document through noise of its own; its quality is its signal."""
    dice = np.random.default_rng(seed)
    runs, relevant = [], []
    for _ in range(questions):
        answer = int(dice.integers(candidates))
        sides = []
        for signal in (lexical, dense):
            scores = dice.standard_normal(candidates)
            scores[answer] += signal
            scores[dice.random(candidates) < 0.2] = NAN
            sides.append(scores)
        runs.append(Run(list(range(candidates)), *sides))
        relevant.append({answer})
    return runs, relevant


def mean(fusion: Fusion, runs: list[Run], relevant: list[set[int]]) -> float:
    return float(np.mean([ndcg(fusion, run, answers) for run, answers in zip(runs, relevant, strict=True)]))


class TestTuning:
    def test_two_good_sides_are_fused(self) -> None:
        runs, relevant = world(0, 200, lexical=2.0, dense=2.0)
        tuned = tune_fusion(runs, relevant)
        assert tuned.fusion.kind in ("linear", "rrf")
        assert mean(tuned.fusion, runs, relevant) > max(mean(one, runs, relevant) for one in (DENSE, LEXICAL)) + 0.05
        assert "over" in tuned.reason
        fresh = world(1, 400, lexical=2.0, dense=2.0)
        assert mean(tuned.fusion, *fresh) > max(mean(one, *fresh) for one in (DENSE, LEXICAL))

    @pytest.mark.parametrize(("lexical", "dense", "expected"), [(0.0, 3.0, DENSE), (3.0, 0.0, LEXICAL)])
    def test_a_side_without_a_signal_is_left_out(self, lexical: float, dense: float, expected: Fusion) -> None:
        tuned = tune_fusion(*world(2, 200, lexical, dense))
        assert tuned.fusion == expected
        assert "alone" in tuned.reason

    def test_a_gain_within_the_noise_is_none(self) -> None:
        runs, relevant = world(3, 8, lexical=1.0, dense=2.5)
        tuned = tune_fusion(runs, relevant)
        best = max(trial.ndcg for trial in tuned.trials)
        assert best > mean(DENSE, runs, relevant)
        assert tuned.fusion in (DENSE, LEXICAL)

    @given(st.integers(0, 10_000), st.integers(1, 12), st.floats(0, 3), st.floats(0, 3))
    @settings(max_examples=20, deadline=None)
    def test_it_is_never_below_the_better_single_one(
        self, seed: int, questions: int, lexical: float, dense: float
    ) -> None:
        runs, relevant = world(seed, questions, lexical, dense, candidates=12)
        tuned = tune_fusion(runs, relevant)
        single = max(mean(one, runs, relevant) for one in (DENSE, LEXICAL))
        assert mean(tuned.fusion, runs, relevant) >= single - 1e-12

    def test_the_report_has_every_trial(self) -> None:
        tuned = tune_fusion(*world(4, 50, 1.0, 1.0))
        assert {trial.fusion for trial in tuned.trials} == set(candidates())
        assert [t.ndcg for t in tuned.trials] == sorted((t.ndcg for t in tuned.trials), reverse=True)
        table = tuned.table(rows=3)
        assert "dense " in table
        assert "lexical " in table
        assert tuned.reason in table
        assert sum(line.startswith("*") for line in table.splitlines()) == 1

    def test_wrong_input_is_said(self) -> None:
        runs, relevant = world(5, 3, 1.0, 1.0)
        with pytest.raises(DataError, match="no questions"):
            tune_fusion([], [])
        with pytest.raises(DataError, match="1 of 3 questions"):
            tune_fusion(runs, [*relevant[:2], set()])
        with pytest.raises(UsageError):
            tune_fusion(runs, relevant[:2])

    def test_equal_reciprocal_ranks_are_never_a_default(self) -> None:
        assert Fusion() == DENSE


class TestFuse:
    lexical = np.array([4.0, 2.0, NAN, 0.0])
    dense = np.array([0.1, NAN, 0.5, 0.3])

    def test_single_sides_look_at_nothing_else(self) -> None:
        assert DENSE.fuse(self.lexical, self.dense).tolist() == [0.1, -math.inf, 0.5, 0.3]
        assert LEXICAL.fuse(self.lexical, self.dense).tolist() == [4.0, 2.0, -math.inf, 0.0]

    def test_linear_with_minmax(self) -> None:
        score = Fusion(kind="linear", weight=0.25).fuse(self.lexical, self.dense)
        np.testing.assert_allclose(score, [0.75, 0.375, 0.25, 0.125])

    def test_linear_in_standard_deviations(self) -> None:
        score = Fusion(kind="linear", weight=0.0, normal="z").fuse(self.lexical, self.dense)
        spread = np.std([4, 2, 0])
        np.testing.assert_allclose(score, np.array([2, 0, -2, -2]) / spread)

    def test_reciprocal_ranks(self) -> None:
        score = Fusion(kind="rrf", weight=0.5, constant=1).fuse(self.lexical, self.dense)
        np.testing.assert_allclose(score, [(1 / 4 + 1 / 2) / 2, 1 / 3 / 2, 1 / 2 / 2, (1 / 3 + 1 / 4) / 2])

    @pytest.mark.parametrize("fusion", candidates(), ids=str)
    def test_one_sided_and_empty_runs(self, fusion: Fusion) -> None:
        for count in (0, 1, 3):
            nothing, something = np.full(count, NAN), np.ones(count)
            for lexical, dense in ((nothing, something), (something, nothing), (nothing, nothing)):
                assert fusion.fuse(lexical, dense).shape == (count,)
                assert not np.isnan(fusion.fuse(lexical, dense)).any()


class TestNdcg:
    def test_it_is_that_of_the_definition(self) -> None:
        run = Run.of({}, {"a": 3.0, "b": 2.0, "c": 1.0})
        assert ndcg(DENSE, run, {"a"}) == 1
        assert ndcg(DENSE, run, {"b"}) == pytest.approx(1 / math.log2(3))
        assert ndcg(DENSE, run, {"b", "x"}) == pytest.approx((1 / math.log2(3)) / (1 + 1 / math.log2(3)))
        assert ndcg(DENSE, run, {"x"}) == 0
        assert ndcg(LEXICAL, run, {"a"}) == 0

    def test_a_document_counts_once(self) -> None:
        run = Run.of({}, {1: 3.0, 2: 2.0, 3: 1.0}, {1: "a", 2: "a", 3: "b"})
        assert ndcg(DENSE, run, {"b"}) == pytest.approx(1 / math.log2(3))
        assert ndcg(DENSE, run, {"a"}) == 1
