"""Examples: balanced at random, spread widely, nearest last, and never the question itself."""

from __future__ import annotations

import numpy as np
import pytest

from craton.errors import UsageError
from craton.evaluation.items import Item
from craton.prompting.examples import ExamplePool
from craton.prompting.prompt import ExampleSettings

ITEMS = [Item(str(i), f"{i}", ("even" if i % 2 == 0 else "odd",), str(i)) for i in range(20)]


def embed(texts):
    angles = np.array([float(t) for t in texts]) / 20 * np.pi / 2
    return np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)


def test_the_nearest_stand_last_and_the_question_is_not_shown():
    chosen = ExamplePool(ITEMS, embed).choose(ITEMS[7], ExampleSettings(count=4, choose="similar"))
    assert {item.id for item in chosen} == {"5", "6", "8", "9"}
    assert {item.id for item in chosen[2:]} == {"6", "8"}


@pytest.mark.parametrize("choose", ["random", "diverse", "similar"])
def test_counts_hold_for_every_item_and_seed(choose):
    pool = ExamplePool(ITEMS, embed)
    for count in (0, 1, 5, 20, 40):
        for item in ITEMS[:5]:
            chosen = pool.choose(item, ExampleSettings(count=count, choose=choose))
            assert item not in chosen
            assert len(chosen) == len({one.id for one in chosen}) == min(count, 19 if count >= 20 else count)


def test_random_ones_are_of_all_classes_and_the_same_for_all_questions():
    pool, settings = ExamplePool(ITEMS), ExampleSettings(count=4, seed=3)
    chosen = pool.choose(Item("x", "", ("",), ""), settings)
    assert sorted(one.answers[0] for one in chosen) == ["even", "even", "odd", "odd"]
    assert chosen == pool.choose(Item("y", "", ("",), ""), settings)
    assert chosen != pool.choose(Item("x", "", ("",), ""), ExampleSettings(count=4, seed=4))


def test_diverse_ones_reach_from_end_to_end():
    chosen = ExamplePool(ITEMS, embed).choose(Item("x", "", ("",), ""), ExampleSettings(count=3, choose="diverse"))
    ids = sorted(int(one.id) for one in chosen)
    assert ids[0] == 0
    assert ids[-1] == 19


def test_similarity_needs_an_encoder():
    with pytest.raises(UsageError, match="encoder"):
        ExamplePool(ITEMS).choose(ITEMS[0], ExampleSettings(count=2, choose="similar"))
