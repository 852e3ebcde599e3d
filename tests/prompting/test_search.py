"""Successive halving: it finds the better candidate, keeps to its budget, and a lucky first look wins nothing."""

from __future__ import annotations

import time

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

    @property
    def spent(self):
        return 10 * len(self.asked)


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
    assert found.tokens == sum(coin.spent for coin in coins.values())
    assert found.stopped == "done"


def test_the_default_wins_ties():
    found = successive_halving(["plain", "fancy"], lambda _: Coin(1.0), ITEMS, "accuracy")
    assert found.best.candidate == "plain"


@pytest.mark.parametrize("budget", range(10, 1500, 70))
def test_a_token_budget_is_kept_and_no_other_sees_more_than_the_default(budget):
    found = successive_halving([0.1, 0.9, 0.5], Coin, ITEMS, "accuracy", budget=Budget(tokens=budget))
    assert found.tokens <= budget + 10
    assert found.stopped == "tokens" or found.tokens < budget
    [default] = [trial for trial in found.trials if trial.candidate == 0.1]
    assert all(1 <= len(trial.rows) <= len(default.rows) for trial in found.trials)
    if budget > 3 * 160 + 10:  # all three have had their first look, whatever the default is worth
        assert len(found.trials) == 3
        assert found.best.candidate == 0.9


def test_what_was_spent_before_the_search_counts():
    budget = Budget(tokens=700)
    budget.spend(50)
    found = successive_halving([0.1, 0.9], Coin, ITEMS, "accuracy", budget=budget)
    assert (found.tokens, found.stopped) == (700, "tokens")
    assert sum(len(trial.rows) for trial in found.trials) == 65


def test_the_clock_begins_with_the_budget():
    budget = Budget(seconds=0.01)
    time.sleep(0.02)
    found = successive_halving([0.1, 0.9], Coin, ITEMS, "accuracy", budget=budget)
    assert found.stopped == "seconds"
    assert found.tokens == 10
    assert found.seconds >= 0.02


class Script:
    """Answers the items of its list rightly, in the order that it is asked in."""

    def __init__(self, right):
        self.right, self.spent = right, 0

    def __call__(self, item):
        self.spent += 10
        return Answer("yes" if self.right[self.spent // 10 - 1] else "no", None, 9, 1, 0.001)


def test_a_search_that_was_ended_compares_on_the_same_items():
    # On the first look of 32 items the other one is better, on all of them the default.
    default, other = [False] * 24 + [True] * 40, [True, False] * 32
    for budget, best in ((640, "other"), (640 + 320, "other"), (1280, "default"), (320 + 50, "default")):
        found = successive_halving(
            ["default", "other"],
            lambda name: Script(default if name == "default" else other),
            ITEMS,
            "accuracy",
            budget=Budget(tokens=budget),
        )
        assert found.best.candidate == best


def test_without_items_there_is_nothing_to_choose_by():
    with pytest.raises(DataError):
        successive_halving([1], Coin, [], "accuracy")
