"""Which models are on the front, and which of them is taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from craton.compression.footprint import Footprint
from craton.compression.pareto import BASE, Rung, choose, front
from craton.evaluation.intervals import Estimate
from craton.evaluation.paired import Difference


def rung(label: str, quality: float, disk: int, decode: float, low: float | None = None) -> Rung:
    one = Estimate(quality, quality - 0.1, quality + 0.1, 50, 50, "x")
    difference = None if low is None else Difference(low + 0.02, low, low + 0.04, 0.5, 50, 50)
    return Rung(
        label, label, one, Estimate(1.0, 0.9, 1.1, 9, 9, "x"), Footprint(disk, 2 * disk, 9.0, decode), difference
    )


def test_the_front_holds_what_nothing_beats_in_all_three() -> None:
    base = rung(BASE, 0.9, 100, 10)
    small = rung("small", 0.9, 50, 20, -0.01)
    worse = rung("worse", 0.8, 60, 15, -0.15)  # beaten by small in everything
    tiny = rung("tiny", 0.5, 10, 12, -0.5)
    assert [one.label for one in front([base, small, worse, tiny])] == ["small", "tiny"]
    assert [one.label for one in front([base, base])] == [BASE, BASE]  # equals do not beat each other


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.8]), st.integers(1, 4), st.integers(1, 4)), min_size=1))
def test_every_model_off_the_front_is_beaten_by_one_on_it(points: list[tuple[float, int, int]]) -> None:
    rungs = [rung(str(i), quality, disk, decode) for i, (quality, disk, decode) in enumerate(points)]
    best = front(rungs)
    assert best
    for one in rungs:
        assert (one in best) != any(other.dominates(one) for other in best)


def test_a_target_decides_among_those_that_keep_the_quality() -> None:
    rungs = [
        rung(BASE, 0.90, 100, 10),
        rung("8 bits", 0.90, 60, 30, -0.01),
        rung("4 bits", 0.89, 40, 25, -0.02),
        rung("3 bits", 0.95, 30, 40, -0.20),
    ]
    assert choose(rungs, "size", 0.03).chosen.label == "4 bits"
    assert choose(rungs, "size", 0.03).kept == ("8 bits", "4 bits")
    assert choose(rungs, "latency", 0.03).chosen.label == "8 bits"
    assert choose(rungs, "quality", 0.03).chosen.label == "3 bits"
    assert choose(rungs, "size", 0.015).chosen.label == "8 bits"


def test_nothing_is_taken_that_is_not_shown_to_keep_the_quality() -> None:
    rungs = [rung(BASE, 0.9, 100, 10), rung("4 bits", 0.9, 40, 25, -0.2), rung("larger", 0.9, 120, 50, 0.0)]
    for target in ("size", "latency"):
        choice = choose(rungs, target, 0.03)
        assert choice.chosen.label == BASE
        assert "within 3.0%" in choice.sentence
