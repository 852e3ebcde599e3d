"""The loss law: recovered where it is known, and intervals that hold as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from craton.errors import UsageError
from craton.pretraining.scaling import LEVEL, LossLaw, Trial, fit

TRUE = LossLaw(floor=1.7, a=400.0, alpha=0.34)
TRUE_BOTH = LossLaw(floor=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28)  # Hoffmann 2022, section D.3
LADDER = [500_000, 1_000_000, 2_000_000, 4_000_000]


def trials(law, sizes, per_parameter=(20,), noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        Trial(n, n * d, law(n, n * d) * float(np.exp(noise * random.standard_normal())))
        for n in sizes
        for d in per_parameter
    ]


def test_the_law_is_recovered_from_losses_without_noise():
    law = fit(trials(TRUE, LADDER)).law
    assert (law.floor, law.a, law.alpha) == pytest.approx((1.7, 400.0, 0.34), rel=1e-4)
    assert (law.b, law.beta) == (0.0, 0.0)


def test_tokens_have_a_term_of_their_own_where_they_vary_apart_from_the_sizes():
    law = fit(trials(TRUE_BOTH, [*LADDER, 16_000_000], per_parameter=(5, 20, 80))).law
    expected = (1.69, 406.4, 0.34, 410.7, 0.28)
    assert (law.floor, law.a, law.alpha, law.b, law.beta) == pytest.approx(expected, rel=1e-3)


def test_where_tokens_follow_from_the_sizes_one_term_holds_both():
    fitted = fit(trials(TRUE_BOTH, [n << k for n in (500_000,) for k in range(8)]))
    assert fitted.law.b == 0.0
    assert 0.28 < fitted.law.alpha < 0.34
    assert fitted.law(128_000_000, 1) == pytest.approx(TRUE_BOTH(128_000_000, 20 * 128_000_000), rel=0.01)


def test_one_bad_run_does_not_bend_the_law():
    sizes = [500_000 << k for k in range(8)]
    measured = trials(TRUE, sizes)
    measured[4] = Trial(measured[4].parameters, measured[4].tokens, 1.3 * measured[4].loss)
    assert fit(measured).law(sizes[-1] * 2, 1) == pytest.approx(TRUE(sizes[-1] * 2, 1), rel=0.005)


@pytest.mark.parametrize("sizes", [LADDER, [*LADDER, 8_000_000, 16_000_000]])
def test_the_next_size_falls_in_the_interval_as_often_as_it_says(sizes):
    noise, runs, target = 0.005, 30, 2 * sizes[-1]
    random, held = np.random.default_rng(1), 0
    for seed in range(runs):
        forecast = fit(trials(TRUE, sizes, noise=noise, seed=seed), seed=seed).forecast(target, 20 * target)
        measured = TRUE(target, 20 * target) * np.exp(noise * random.standard_normal())
        held += forecast.low <= measured <= forecast.high
        assert forecast.low < forecast.loss < forecast.high
        assert forecast.high / forecast.low < 1.2
    assert held / runs >= LEVEL - 0.1  # two standard deviations of so many runs


def test_intervals_hold_the_true_law_and_widen_with_noise_and_distance():
    noisy, clean = (fit(trials(TRUE, LADDER, noise=noise, seed=3)) for noise in (0.02, 0.0))
    for quantity, true in ((lambda law: law.floor, 1.7), (lambda law: law.alpha, 0.34)):
        low, high = clean.interval(quantity)
        assert low < true < high
    near, far, vague = clean.forecast(8_000_000, 1), clean.forecast(512_000_000, 1), noisy.forecast(8_000_000, 1)
    assert near.high / near.low < min(far.high / far.low, vague.high / vague.low)


def test_the_same_trials_give_the_same_interval():
    first, second = (fit(trials(TRUE, LADDER, noise=0.01)).forecast(8_000_000, 1) for _ in range(2))
    assert first == second


def test_too_few_sizes_and_losses_of_no_meaning_are_refused():
    with pytest.raises(UsageError, match="cannot be fitted on 2 sizes"):
        fit(trials(TRUE, LADDER[:2], per_parameter=(10, 20)))
    for loss in (float("nan"), float("inf"), 0.0, -1.0):
        with pytest.raises(UsageError, match=f"a loss of {loss} cannot be fitted"):
            fit([*trials(TRUE, LADDER), Trial(8_000_000, 1, loss)])
