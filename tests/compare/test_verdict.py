"""The verdict on planted worlds, over many seeds: where a way must win it does, and noise is a tie."""

from __future__ import annotations

import numpy as np
import pytest

from craton.compare.verdict import Measured, decide, detectable_effect

N, GROUPS = 200, 50
CLUSTERS = [f"document {i % GROUPS}" for i in range(N)]
# Seconds of set-up and of an answer: zero-shot and prompt are cheap to set up, a fine-tuned model cheap to ask.
COSTS = {
    "zero-shot": (0, 0.2),
    "prompt": (20, 0.4),
    "retrieval": (40, 0.6),
    "lora": (120, 0.15),
    "lora+retrieval": (160, 0.6),
}


def world(seed, rates):
    """Ways that are right at these rates, with a difficulty that items and documents share."""
    rng = np.random.default_rng(seed)
    hard = rng.normal(size=GROUPS)[np.arange(N) % GROUPS] * 0.5 + rng.normal(size=N)
    ways = []
    for name, rate in rates.items():
        seeds = 3 if "lora" in name else 1
        noise = rng.normal(size=(seeds, N))
        level = np.quantile(hard + noise, rate)
        scores = (hard + noise < level).astype(float)
        setup, marginal = COSTS.get(name, (0, 0.0))
        seconds = marginal * rng.lognormal(0, 0.1, N)
        ways.append(Measured(name, scores.tolist(), seconds.tolist(), setup, diagnostic=name == "majority"))
    return ways


WORLDS = {
    # What must be looked up: only what reads the documents can answer.
    "fact lookup": (
        {"zero-shot": 0.03, "prompt": 0.05, "retrieval": 0.85, "lora": 0.06, "majority": 0.03},
        {"retrieval"},
    ),
    # A mapping to learn: only training teaches it.
    "label mapping": ({"zero-shot": 0.2, "prompt": 0.3, "retrieval": 0.5, "lora": 0.9, "majority": 0.2}, {"lora"}),
    # What the model knows, once it is asked well.
    "known skill": ({"zero-shot": 0.5, "prompt": 0.9, "retrieval": 0.7, "lora": 0.72, "majority": 0.1}, {"prompt"}),
}


@pytest.mark.parametrize("name", list(WORLDS))
def test_the_way_that_must_win_wins_on_every_seed(name):
    rates, winners = WORLDS[name]
    for seed in range(10):
        verdict = decide(world(seed, rates), CLUSTERS, queries=1000)
        assert verdict.recommended in winners
        assert verdict.kind == "clear"
        assert verdict.beats_majority
        assert "every other way" in verdict.sentence


def test_noise_is_a_tie_and_the_cheapest_is_taken():
    rates = dict.fromkeys(COSTS, 0.4) | {"majority": 0.4}
    clear = 0
    for seed in range(40):
        verdict = decide(world(seed, rates), CLUSTERS, queries=100)
        clear += verdict.kind == "clear"
        if verdict.kind == "tie" and "zero-shot" in verdict.tied:
            assert verdict.recommended == "zero-shot"
            assert "cheaper" in verdict.sentence
    assert clear <= 2  # 5 % would be two


def test_a_tie_turns_with_the_number_of_questions():
    ways = world(0, {"zero-shot": 0.6, "lora": 0.62})
    few, many = (decide(ways, CLUSTERS, queries=n) for n in (10, 1_000_000))
    assert few.kind == many.kind == "tie"
    assert (few.recommended, many.recommended) == ("zero-shot", "lora")
    [one] = many.break_evens
    assert 1500 < one.queries < 4000  # 120 s of set-up against 0.05 s a question
    assert one.low <= one.queries <= one.high
    assert any("fewer than" in flip for flip in many.flips)
    assert any("more than" in flip for flip in few.flips)


def test_updates_count_for_what_holds_facts():
    ways = [
        Measured("retrieval", [[1.0] * N], [0.2] * N, setup=10, update=1),
        Measured("lora", [[1.0] * N], [0.1] * N, setup=10, update=500),
    ]
    assert decide(ways, CLUSTERS, queries=1000).recommended == "lora"
    assert decide(ways, CLUSTERS, queries=1000, updates=10).recommended == "retrieval"


def test_updates_turn_the_break_even():
    ways = [
        Measured("retrieval", [[1.0] * N], [0.2] * N, setup=10, update=1),
        Measured("lora", [[1.0] * N], [0.1] * N, setup=110, update=101),
    ]
    [never_changing] = decide(ways, CLUSTERS, queries=10_000).break_evens
    assert never_changing.queries == pytest.approx(1000)
    [changing] = decide(ways, CLUSTERS, queries=10_000, updates=5).break_evens
    assert changing.queries == pytest.approx(100 / (0.1 - 5 / 10_000 * 100))
    [often] = decide(ways, CLUSTERS, queries=10_000, updates=20).break_evens
    assert often.queries is None


def test_no_way_is_recommended_that_another_one_beats():
    """The best is too unsteady to beat the cheap way; the second, nearly as good, does beat it."""
    cheap, second, best = np.full(N, 0.45), np.full(N, 0.5), np.tile([1.0, 0.04], N // 2)
    ways = [
        Measured("cheap", [cheap.tolist()], [0.1] * N, 0),
        Measured("second", [second.tolist()], [0.2] * N, 10),
        Measured("best", [best.tolist()], [0.3] * N, 10),
    ]
    verdict = decide(ways, [str(i) for i in range(N)], queries=100)
    beats = {(c.better, c.other) for c in verdict.comparisons if c.difference.p_adjusted < 0.05}
    assert beats == {("second", "cheap")}
    assert verdict.best == "best"
    assert verdict.recommended == "second"
    assert "cheap" not in verdict.tied


def test_a_clear_winner_has_its_break_evens():
    verdict = decide(world(0, WORLDS["label mapping"][0]), CLUSTERS, queries=1000)
    assert verdict.kind == "clear"
    assert {one.cheap for one in verdict.break_evens} == {"zero-shot", "prompt", "retrieval"}
    assert all(one.sentence.startswith("lora pays back its set-up against") for one in verdict.break_evens)


def test_a_way_that_never_wins_over_the_majority_says_so():
    ways = [
        *world(1, {"zero-shot": 0.3, "prompt": 0.31}),
        Measured("majority", [[1.0] * 100 + [0.0] * 100], [0.0] * N, 0, diagnostic=True),
    ]
    verdict = decide(ways, CLUSTERS, queries=10)
    assert verdict.beats_majority is False
    assert any("most frequent answer" in flip for flip in verdict.flips)


def test_the_verdict_is_json_and_names_all_pairs():
    import json

    verdict = decide(world(0, WORLDS["fact lookup"][0]), CLUSTERS, queries=10)
    value = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
    assert len(value["comparisons"]) == 6
    assert value["recommended"] == "retrieval"


def test_what_a_test_can_show_shrinks_with_its_size():
    assert detectable_effect(1000, 1000) < detectable_effect(200, 200) < detectable_effect(200, 20) < 1
    assert detectable_effect(3, 3) == float("inf")
    assert detectable_effect(200, 200) < detectable_effect(200, 200, ways=5)


def test_the_difference_that_is_promised_is_shown_four_times_in_five():
    """Five ways, one of them better by what was said before the run: against each of the others it is told."""
    rng = np.random.default_rng(0)
    effect = detectable_effect(N, N, ways=5)
    told = 0
    for _ in range(60):
        rates = [0.5 + effect, 0.5, 0.2, 0.2, 0.2]
        ways = [
            Measured(str(i), [(rng.random(N) < rate).astype(float).tolist()], [0.1] * N, 0)
            for i, rate in enumerate(rates)
        ]
        verdict = decide(ways, [str(i) for i in range(N)], queries=1)
        [pair] = [c for c in verdict.comparisons if {c.better, c.other} == {"0", "1"}]
        told += pair.better == "0" and pair.difference.p_adjusted < 0.05
    assert told >= 0.75 * 60
