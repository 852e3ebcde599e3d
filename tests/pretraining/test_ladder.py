"""The ladder: what is trained, in which order, and that the forecast is written before it can be known."""

from __future__ import annotations

import pytest

from craton.errors import UsageError
from craton.pretraining.ladder import climb, plan_ladder
from craton.pretraining.scaling import LossLaw
from craton.pretraining.sizing import short

SIZES = ("2m", "0.5m", "4m", "1m")
TRUE = LossLaw(floor=1.7, a=400.0, alpha=0.34)


def plan(sizes=SIZES, predict=None, **options):
    return plan_ladder(sizes, predict, vocab=4096, context=256, **options)


def dials(ladder):
    return [short(rung.dial) for rung in (*ladder.rungs, ladder.target)]


def test_rungs_stand_in_order_and_the_next_one_is_foretold():
    ladder = plan()
    assert dials(ladder) == ["500k", "1M", "2M", "4M", "8M"]
    assert not ladder.measure
    assert [rung.tokens for rung in ladder.rungs] == [10_000_000, 20_000_000, 40_000_000, 80_000_000]
    named = plan(predict="16m")
    assert dials(named)[-1] == "16M"
    assert named.measure


@pytest.mark.parametrize("predict", [None, "8m"])
def test_a_budget_lowers_the_tokens_of_every_rung_alike(predict):
    flops = 1e14
    ladder = plan(predict=predict, flops=flops)
    trained = [*ladder.rungs, ladder.target] if predict else ladder.rungs
    assert sum(6 * rung.dial * rung.tokens for rung in trained) == pytest.approx(flops, rel=0.01)
    assert len({round(rung.tokens / rung.dial, 3) for rung in (*ladder.rungs, ladder.target)}) == 1
    assert plan(predict=predict, flops=1e30) == plan(predict=predict)
    # Batch and learning rate are those of the shorter training.
    assert ladder.target.batch_tokens < plan(predict=predict).target.batch_tokens


@pytest.mark.parametrize("off", [1.0, 1.5])
def test_the_forecast_is_on_record_before_the_target_is_trained(off):
    events = []

    def train(plan):
        events.append(("train", plan.dial))
        return TRUE(plan.parameters, plan.tokens) * (off if plan.dial == 8_000_000 else 1.0)

    report = climb(train, plan(predict="8m"), lambda kind, /, **data: events.append((kind, data)))
    kinds = [kind for kind, _ in events]
    assert kinds == ["train", "trial"] * 4 + ["forecast", "train", "measured"]
    assert events[-3][1]["forecast"]["loss"] == pytest.approx(TRUE(report.forecast.parameters, 1), rel=1e-3)
    assert events[-3][1]["measured"] is None
    assert events[-1][1] == {"loss": report.measured, "held": off == 1.0}
    assert report.as_dict()["held"] is (off == 1.0)
    assert set(report.as_dict()["intervals"]) == {"floor", "alpha"}


def test_nothing_beyond_the_ladder_is_trained_unless_asked_for():
    trained = []
    report = climb(lambda p: trained.append(p.dial) or TRUE(p.parameters, 1), plan(), lambda kind, /, **data: None)
    assert len(trained) == 4
    assert report.measured is None
    assert report.held is None
    assert report.forecast.low < report.forecast.loss < report.forecast.high


@pytest.mark.parametrize(
    ("sizes", "predict", "message"),
    [
        (("1m", "2m"), None, "cannot be fitted"),
        ((), None, "cannot be fitted"),
        (("1m", "2m", "2000k"), None, "cannot be fitted"),
        (("1m", "2m", "4m"), "4m", "4m, is not larger"),
        (("1m", "2m", "x"), None, "is not a size"),
        (("100k", "1m", "2m"), None, "too few for a vocabulary"),
    ],
)
def test_what_makes_no_ladder_is_refused_before_anything_is_trained(sizes, predict, message):
    with pytest.raises(UsageError, match=message):
        plan(sizes, predict)
