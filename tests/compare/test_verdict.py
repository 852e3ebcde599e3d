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
