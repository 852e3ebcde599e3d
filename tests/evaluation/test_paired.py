"""Paired tests: p-values that are uniform where nothing differs, exact where they can be, and the power as promised."""

from __future__ import annotations

import itertools
import json
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import DataError, UsageError
from craton.evaluation.paired import (
    Difference,
    equivalent,
    holm,
    minimum_detectable_effect,
    paired_difference,
    simultaneous,
)


def binary_pair(rng: np.random.Generator, n: int, lost: float, won: float) -> tuple[np.ndarray, np.ndarray]:
    """Two arms that both pass but for the shares that only a, or only b does."""
    u = rng.random(n)
    return (u >= won).astype(float), (u < 1 - lost).astype(float)


def test_p_is_mcnemars_exact_one_for_right_and_wrong() -> None:
    stats = pytest.importorskip("scipy.stats")
    for won, lost, both in [(5, 1, 20), (0, 0, 5), (12, 3, 0), (1, 0, 3), (400, 330, 2000)]:
        a = [0.0] * won + [1.0] * lost + [1.0] * both
        b = [1.0] * won + [0.0] * lost + [1.0] * both
        expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
        assert paired_difference(a, b).p == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=30), st.sampled_from([1, 0.3]))
def test_p_is_the_share_of_all_flips_of_clusters(items: list[tuple[int, int]], unit: float) -> None:
    gaps = np.array([gap for gap, _ in items]) * unit
    names = [name for _, name in items]
    own = paired_difference(np.zeros(len(gaps)), gaps, names, score=False, resamples=50)
    sums = [sum(g for g, c in zip(gaps, names, strict=True) if c == name) for name in set(names)]
    flips = [
        abs(sum(s * x for s, x in zip(signs, sums, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(sums))
    ]
    assert own.p == pytest.approx(np.mean([flip >= abs(sum(sums)) - 1e-9 for flip in flips]))


def test_random_flips_agree_with_exact_ones_and_are_never_zero() -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(-4, 7, 40).astype(float)
    exact = paired_difference(np.zeros(40), whole).p
    # The same differences in a unit that is no whole number are too many to enumerate.
    sampled = paired_difference(np.zeros(40), whole / np.pi, resamples=40_000).p
    assert sampled == pytest.approx(exact, abs=0.01)
    far = paired_difference(np.zeros(40), np.full(40, 1 / np.pi), resamples=999, score=False)
    assert far.p == pytest.approx(1 / 1000)


def test_the_unit_does_not_matter() -> None:
    gaps = np.array([3.0, -1, 2, 2, 0, 4, 1, -2, 5, 1])
    expected = paired_difference(np.zeros(10), gaps, score=False)
    for unit in (1e-12, 0.1, 1e9):
        own = paired_difference(np.zeros(10), gaps * unit, score=False)
        assert own.p == pytest.approx(expected.p)
        assert (own.low, own.high) == pytest.approx((expected.low * unit, expected.high * unit))


@pytest.mark.parametrize("kind", ["scores", "seconds", "clusters"])
def test_p_is_uniform_where_nothing_differs(kind: str) -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(500):
        names = np.arange(40) // 4 if kind == "clusters" else None
        a, b = rng.random((2, 40)) if kind == "scores" else rng.exponential(2, (2, 40))
        if names is not None:
            a, b = (arm + rng.normal(0, 1, 10)[names] for arm in (a, b))
        found.append(paired_difference(a, b, names, resamples=300, score=False).p)
    for level in (0.05, 0.2, 0.5, 0.8):
        assert np.mean(np.array(found) <= level) == pytest.approx(level, abs=0.05)


def test_ignoring_clusters_finds_differences_that_are_not_there() -> None:
    rng = np.random.default_rng(1)
    names = np.arange(100) // 10
    naive, own = [], []
    for _ in range(200):
        gaps = rng.normal(0, 1, 10)[names] + rng.normal(0, 1, 100)
        naive.append(paired_difference(np.zeros(100), gaps, resamples=300).p)
        own.append(paired_difference(np.zeros(100), gaps, names, resamples=300).p)
    assert np.mean(np.array(naive) < 0.05) > 0.25
    assert np.mean(np.array(own) < 0.05) < 0.1


@pytest.mark.parametrize(("n", "lost", "won"), [(20, 0.1, 0.3), (50, 0.02, 0.02), (50, 0.0, 0.1), (200, 0.05, 0.15)])
def test_coverage_of_scores(n: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(600):
        own = paired_difference(*binary_pair(rng, n, lost, won))
        covered.append(own.low <= won - lost <= own.high)
    assert np.mean(covered) >= 0.93


@pytest.mark.slow
@pytest.mark.parametrize("clusters", [5, 10, 30])
@pytest.mark.parametrize("spread", [0.1, 0.8])
@pytest.mark.parametrize("differ", [0.1, 0.4])
def test_coverage_of_clustered_scores(clusters: int, spread: float, differ: float) -> None:
    rng = np.random.default_rng(3)
    names = np.repeat(np.arange(clusters), 10)
    lean = np.clip(rng.normal(0.1, spread, 1_000_000), -1, 1).mean()
    covered = []
    for _ in range(2000):
        own_lean = np.clip(rng.normal(0.1, spread, clusters), -1, 1)[names]
        u = rng.random(len(names))
        b = np.where(u < differ * (1 + own_lean) / 2, 1.0, np.where(u < differ, 0.0, 0.5 * (u > 0.9) + 0.5))
        a = np.where(u < differ, 1 - b, b)
        own = paired_difference(a, b, names, score=True)
        covered.append(own.low <= differ * lean <= own.high)
    assert np.mean(covered) >= 0.93


@pytest.mark.slow
def test_coverage_of_seconds() -> None:
    rng = np.random.default_rng(4)
    for names in (None, np.arange(120) // 6):
        covered = []
        for _ in range(1500):
            shared = 0 if names is None else rng.gamma(1, 1, 20)[names]
            a = rng.exponential(1, 120)
            own = paired_difference(a, a + shared + rng.exponential(0.5, 120), names, resamples=800, score=False)
            covered.append(own.low <= 0.5 + (0 if names is None else 1) <= own.high)
        assert np.mean(covered) >= 0.92


def test_arms_that_never_differ_are_not_thereby_equivalent() -> None:
    few, many = (paired_difference([1.0] * n, [1.0] * n) for n in (10, 400))
    assert (few.value, few.p) == (0, 1)
    assert not equivalent(few, 0.05)
    assert equivalent(many, 0.05)
    assert not equivalent(paired_difference([1.0] * 400, [1.0] * 400, np.arange(400) // 40), 0.05)
    with pytest.raises(UsageError):
        equivalent(few, 0)


def test_one_cluster_says_nothing() -> None:
    own = paired_difference([0, 0, 0], [1, 1, 0], ["x"] * 3)
    assert (own.low, own.high, own.p) == (-1, 1, 1)
    seconds = paired_difference([1.0], [9.0])
    assert seconds.high == inf
    assert json.loads(json.dumps(seconds.as_dict(), allow_nan=False))["high"] is None


def test_the_sign_and_the_numbers() -> None:
    own = paired_difference([0.2, 0.4, 0.5, 0.1] * 10, [0.3, 0.6, 0.5, 0.2] * 10, np.arange(40) // 2)
    assert own.value == pytest.approx(0.1)
    assert 0 < own.low < 0.1 < own.high
    assert (own.n, own.clusters, own.p_adjusted) == (40, 20, None)
    back = paired_difference([0.3, 0.6, 0.5, 0.2] * 10, [0.2, 0.4, 0.5, 0.1] * 10, np.arange(40) // 2)
    assert (back.value, back.low, back.high) == pytest.approx((-own.value, -own.high, -own.low))
    assert own == paired_difference([0.2, 0.4, 0.5, 0.1] * 10, [0.3, 0.6, 0.5, 0.2] * 10, np.arange(40) // 2)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
    with pytest.raises(UsageError):
        holm([1.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_adjusts_upwards_and_keeps_order(ps: list[float]) -> None:
    adjusted = holm(ps)
    for (p, own), (q, other) in itertools.pairwise(sorted(zip(ps, adjusted, strict=True))):
        assert p <= q
        assert own <= other
    assert all(p <= own <= min(1, len(ps) * p) + 1e-12 for p, own in zip(ps, adjusted, strict=True))
    # By its own procedure: reject step by step until one is not below level / what is left.
    level, rejected = 0.05, set()
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[place] > level / (len(ps) - rank):
            break
        rejected.add(place)
    assert rejected == {i for i, p in enumerate(adjusted) if p <= level}


def test_holm_and_simultaneous_intervals_keep_the_familys_error() -> None:
    rng = np.random.default_rng(5)
    rejected, missed, plain = [], [], []
    for _ in range(400):
        arms = rng.normal(0, 1, (5, 30)) + rng.normal(0, 1, 30)  # all against one baseline, so dependent
        single = [paired_difference(np.zeros(30) + arms[0], arm, resamples=400, score=False) for arm in arms[1:]]
        family = simultaneous(single)
        rejected.append(any(d.p_adjusted is not None and d.p_adjusted < 0.05 for d in family))
        missed.append(any(not d.low <= 0 <= d.high for d in family))
        plain.append(any(d.p < 0.05 for d in single))
    assert np.mean(rejected) < 0.08
    assert np.mean(missed) < 0.08
    assert np.mean(plain) > 0.1


def test_simultaneous_widens_and_adjusts() -> None:
    one = Difference(0.1, 0.02, 0.2, 0.01, 200, 200)
    [alone] = simultaneous([one])
    assert (alone.low, alone.high, alone.p_adjusted) == pytest.approx((0.02, 0.2, 0.01))
    first, _ = simultaneous([one, Difference(0.0, -0.1, 0.1, 0.9, 200, 200)])
    assert first.p_adjusted == pytest.approx(0.02)
    assert first.value - first.low == pytest.approx(0.08 * 2.2414 / 1.96, rel=0.01)
    assert simultaneous([]) == []


def power(n: int, effect: float, differ: float, runs: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    found = [
        paired_difference(*binary_pair(rng, n, (differ - effect) / 2, (differ + effect) / 2)).p for _ in range(runs)
    ]
    return float(np.mean(np.array(found) <= 0.05))


@pytest.mark.parametrize(("n", "differ"), [(100, 0.3), (300, 0.2)])
def test_power_at_the_stated_effect(n: int, differ: float) -> None:
    effect = minimum_detectable_effect(n, discordance=differ)
    assert power(n, effect, differ, 600, n) == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("n", [50, 100, 200, 1000])
@pytest.mark.parametrize("differ", [0.2, 0.3, 0.5])
def test_power_of_many_designs(n: int, differ: float) -> None:
    effect = minimum_detectable_effect(n, discordance=differ)
    if effect == inf:
        assert power(n, differ, differ, 500, 1) < 0.85
    else:
        assert power(n, effect, differ, 3000, n) == pytest.approx(0.8, abs=0.05)


def test_power_of_clusters_and_of_seconds() -> None:
    rng = np.random.default_rng(6)
    names = np.arange(200) // 10
    effect = minimum_detectable_effect(200, clusters=20, intra_cluster=0.3, sd=1.0)
    assert effect > 1.5 * minimum_detectable_effect(200, sd=1.0)
    for groups, size in ((names, effect), (None, minimum_detectable_effect(200, sd=1.0))):
        found = []
        for _ in range(400):
            shared = 0 if groups is None else rng.normal(0, 0.3**0.5, 20)[groups]
            gaps = size + shared + rng.normal(0, 1 if groups is None else 0.7**0.5, 200)
            found.append(paired_difference(np.zeros(200), gaps, groups, resamples=400, score=False).p <= 0.05)
        assert np.mean(found) == pytest.approx(0.8, abs=0.05)


def test_the_effect_falls_with_items_and_agreement() -> None:
    assert minimum_detectable_effect(400) < minimum_detectable_effect(100)
    assert minimum_detectable_effect(200, baseline=0.9) < minimum_detectable_effect(200, baseline=0.5)
    assert minimum_detectable_effect(200, discordance=0.1) < minimum_detectable_effect(200, discordance=0.4)
    assert minimum_detectable_effect(200, power=0.9) > minimum_detectable_effect(200)
    assert minimum_detectable_effect(200, level=0.99) > minimum_detectable_effect(200)
    assert minimum_detectable_effect(5, discordance=0.2) == inf
    assert minimum_detectable_effect(100, clusters=1) == inf
    for wrong in (
        {"n": 0},
        {"n": 10, "clusters": 20},
        {"n": 10, "power": 1},
        {"n": 10, "discordance": 2},
        {"n": 10, "sd": -1},
    ):
        with pytest.raises(UsageError):
            minimum_detectable_effect(**wrong)  # type: ignore[arg-type]


def test_refusals() -> None:
    with pytest.raises(DataError, match="item 1"):
        paired_difference([1.0, float("nan")], [1.0, 1.0])
    with pytest.raises(DataError):
        paired_difference([], [])
    with pytest.raises(UsageError):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(UsageError):
        paired_difference([1.0, 2.0], [1.0, 2.0], ["a"])
