"""Successive halving: it finds the better candidate, keeps to its budget, and a lucky first look wins nothing."""

from __future__ import annotations

import numpy as np
import pytest

from craton.errors import DataError
from craton.evaluation.items import Answer, Item
from craton.prompting.search import Budget, successive_halving

ITEMS = [Item(str(i), f"question {i}", ("yes",), str(i)) for i in range(64)]


class Coin:
    """Answers rightly with probability p, costing 10 tokens."""

    def __init__(self, p, seed=0):
        self.p, self.rng, self.asked = p, np.random.default_rng(seed), []

    def __call__(self, item):
        self.asked.append(item.id)
        return Answer("yes" if self.rng.random() < self.p else "no", None, 9, 1, 0.001)


def test_the_best_is_found_and_no_item_is_asked_twice():
    coins = {}

    def make(p):
        coins[p] = Coin(p, seed=int(100 * p))
        return coins[p]

    found = successive_halving([0.2, 0.3, 0.9, 0.4, 0.1, 0.5], make, ITEMS, "accuracy")
    assert found.best.candidate == 0.9
    assert all(len(set(coin.asked)) == len(coin.asked) for coin in coins.values())
    assert len(coins[0.9].asked) == len(coins[0.2].asked) == 64  # the winner and the default saw everything
    assert len(coins[0.1].asked) < 64


def test_the_default_wins_ties():
    found = successive_halving(["plain", "fancy"], lambda _: Coin(1.0), ITEMS, "accuracy")
    assert found.best.candidate == "plain"


@pytest.mark.parametrize("budget", [40, 200, 2000])
def test_a_token_budget_is_kept(budget):
    found = successive_halving([0.1, 0.9, 0.5], Coin, ITEMS, "accuracy", budget=Budget(tokens=budget))
    assert found.tokens <= budget + 10
    assert found.stopped == "tokens" or found.tokens < budget
    assert len(found.best.rows) == max(len(t.rows) for t in found.trials)


def test_without_items_there_is_nothing_to_choose_by():
    with pytest.raises(DataError):
        successive_halving([1], Coin, [], "accuracy")
