"""Costs: sums by hand, and a break-even whose interval holds the true one."""

from __future__ import annotations

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import DataError, UsageError
from craton.evaluation.costs import Cost, break_even, break_even_interval, cost_of_pass, total

amounts = st.floats(0, 1e6)


def test_totals_and_cost_of_pass() -> None:
    assert total(Cost(100, 0.5, 3), 10, updates=2) == 111
    assert cost_of_pass(2.0, 0.8) == 2.5
    assert cost_of_pass(2.0, 0) == inf
    with pytest.raises(UsageError):
        cost_of_pass(2.0, 80)


def test_break_even_by_hand() -> None:
    prompt, tuned = Cost(0, 2.0), Cost(600, 0.5)
    assert break_even(prompt, tuned) == break_even(tuned, prompt) == 400
    assert break_even(Cost(0, 1.0), Cost(600, 1.0)) is None
    assert break_even(Cost(0, 1.0), Cost(600, 1.5)) is None
    assert break_even(Cost(5, 1.0), Cost(5, 3.0)) == 0
    # Training anew with each hundredth query eats up what the queries save.
    assert break_even(prompt, Cost(600, 0.5, update=100), updates_per_query=0.01) == pytest.approx(1200)
    assert break_even(prompt, Cost(600, 0.5, update=200), updates_per_query=0.01) is None


@given(amounts, amounts, amounts, amounts)
def test_both_arms_cost_the_same_at_break_even(a: float, b: float, c: float, d: float) -> None:
    one, other = Cost(a, b), Cost(c, d)
    queries = break_even(one, other)
    if queries is None:
        dear, cheap = (one, other) if a >= c else (other, one)
        assert total(dear, 1e6) >= total(cheap, 1e6)
    elif queries and queries < 1e12:
        assert total(one, queries) == pytest.approx(total(other, queries), rel=1e-6)


def test_the_interval_of_the_break_even() -> None:
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(150):
        base = rng.exponential(1, 40)
        cheap, dear = base + rng.exponential(0.5, 40) + 0.5, base
        value, low, high = break_even_interval(Cost(0, 0), Cost(1000, 0), cheap, dear, seed=seed)
        assert value is not None
        assert low < value < high
        covered.append(low <= 1000 <= high)
    assert np.mean(covered) >= 0.9
    one, other = Cost(0, 0), Cost(1000, 0)
    assert break_even_interval(one, other, cheap, dear) == break_even_interval(other, one, dear, cheap)


def test_a_saving_that_may_be_none_or_is_none() -> None:
    rng = np.random.default_rng(1)
    base = rng.exponential(1, 50)
    noise = rng.normal(0, 1, 50)
    value, low, high = break_even_interval(Cost(0, 0), Cost(100, 0), base + noise - noise.mean() + 0.01, base)
    assert value == pytest.approx(10_000)
    assert low < 1000
    assert high == inf
    assert break_even_interval(Cost(0, 0), Cost(100, 0), base, base + 1 + noise / 9) == (None, inf, inf)
    assert break_even_interval(Cost(7, 0), Cost(7, 0), base, base + 1) == (0, 0, 0)
    with pytest.raises(DataError):
        break_even_interval(Cost(0, 0), Cost(1, 0), [], [])


def test_updates_and_documents_count_in_the_interval() -> None:
    rng = np.random.default_rng(2)
    documents = [str(i // 5) for i in range(100)]
    slow = np.repeat(rng.exponential(0.4, 20), 5)  # the questions of a document are alike
    cheap, dear = 1 + slow, np.ones(100)
    one, other = Cost(0, 0, update=10), Cost(1000, 0, update=100)
    value, low, high = break_even_interval(one, other, cheap, dear, documents, updates_per_query=0.001)
    assert value == pytest.approx(break_even(Cost(0, cheap.mean(), 10), Cost(1000, 1, 100), updates_per_query=0.001))
    plain, near, far = break_even_interval(one, other, cheap, dear, updates_per_query=0.001)
    assert plain == value
    assert high - low > 1.5 * (far - near)
    assert break_even_interval(one, other, cheap, dear, documents, updates_per_query=1)[0] is None
    with pytest.raises(UsageError):
        break_even_interval(one, other, cheap, dear, updates_per_query=-1)


@pytest.mark.parametrize("wrong", [-1, nan, inf])
def test_costs_are_finite_and_not_negative(wrong: float) -> None:
    with pytest.raises(UsageError):
        Cost(wrong, 1)
    with pytest.raises(UsageError):
        break_even(Cost(0, 1), Cost(1, 0), updates_per_query=-1)
