"""Mixtures: shares are exact in every epoch, nothing is drawn twice before all of a part was, order needs no state."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data.example import Example, next_token_targets
from craton.data.loader import ListSource, Loader
from craton.data.mixture import Mixture, exact_shares, window_source
from craton.data.shard_building import shards_from_documents
from craton.data.shards import Part, Shards, WindowSource
from craton.errors import UsageError
from craton.modalities.text import Tokenizer

WEIGHTS = st.floats(1e-3, 1e3)


def part_of(name: int, size: int) -> ListSource:
    """Examples whose label says which part and number they are."""
    return ListSource([Example((next_token_targets([1, 2], [True] * 2),), label=name * 1000 + i) for i in range(size)])


PARTS = st.lists(st.tuples(st.integers(1, 30), WEIGHTS), min_size=1, max_size=5)


@given(st.integers(0, 10_000), st.lists(WEIGHTS, min_size=1, max_size=8))
def test_shares_add_up_and_are_off_by_less_than_one(total: int, weights: list[float]) -> None:
    shares = exact_shares(total, weights)
    assert sum(shares) == total
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6
    assert exact_shares(100, [0.7, 0.2, 0.1]) == [70, 20, 10]
    assert exact_shares(10, [1, 1, 1]) == [4, 3, 3]


@settings(deadline=None)
@given(PARTS, st.integers(1, 12), st.booleans(), st.integers(0, 3))
def test_every_epoch_draws_each_part_s_share(
    parts: list[tuple[int, float]], batch: int, shuffle: bool, seed: int
) -> None:
    mixture = Mixture([(part_of(number, size), weight) for number, (size, weight) in enumerate(parts)])
    assert len(mixture) == sum(size for size, _ in parts) == len(mixture.lengths)
    loader = Loader(mixture, batch=batch, micro_tokens=8, seed=seed, shuffle=shuffle)
    drawn: Counter[int] = Counter()
    for epoch in range(4):
        steps = range(epoch * loader.steps_per_epoch, (epoch + 1) * loader.steps_per_epoch)
        labels = [int(n) for step in steps for micro in loader.step(step) for n in micro.labels]
        of_part = Counter(label // 1000 for label in labels)
        assert [of_part[number] for number in range(len(parts))] == [share.drawn for share in mixture.shares]
        drawn.update(labels)
        for number, (size, _) in enumerate(parts):
            counts = [drawn[number * 1000 + i] for i in range(size)]
            assert max(counts) - min(counts) <= 1, "every pass through a part ends before the next begins"


def test_passes_are_reported_and_differ_in_order() -> None:
    mixture = Mixture([(part_of(0, 5), 0.5), (part_of(1, 15), 0.5)])
    assert [(share.drawn, share.passes) for share in mixture.shares] == [(10, 2.0), (10, 10 / 15)]
    order = mixture.order(7, 0, True)
    assert mixture.order(7, 0, True).tolist() == order.tolist()
    assert mixture.order(7, 1, True).tolist() != order.tolist()
    streams = [mixture.order(7, epoch, True) for epoch in range(6)]
    assert len({tuple(order[order < 5]) for order in streams}) > 3


def test_parts_are_interleaved() -> None:
    mixture = Mixture([(part_of(0, 100), 1), (part_of(1, 100), 1)])
    order = mixture.order(0, 0, True)
    assert 30 < int((order[:100] < 100).sum()) < 70


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -1.0], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_weights_that_are_none(weights: list[float]) -> None:
    with pytest.raises(UsageError, match="positive numbers"):
        Mixture([(part_of(0, 3), weight) for weight in weights])


def test_parts_that_do_not_mix() -> None:
    with pytest.raises(UsageError, match="needs parts"):
        Mixture([])
    with pytest.raises(UsageError, match="each part an example"):
        Mixture([(part_of(0, 3), 1), (ListSource([]), 1)])
    rows = part_of(0, 3)
    rows.row = 2
    with pytest.raises(UsageError, match="windows of one length"):
        Mixture([(rows, 1), (part_of(0, 3), 1)])


def test_shards_of_a_mixture_are_drawn_by_their_weights(bytes_bpe: Tokenizer) -> None:
    small, large = (shards_from_documents([text * 40], bytes_bpe) for text in ("fox ", "lazy dog jumps "))
    assert isinstance(window_source(small, 8), WindowSource)
    parts = [Part(small, 3.0), Part(large, 1.0)]
    both = Shards([*small._shards, *large._shards], small.tokenizer, small.token_bytes, parts=parts)
    mixture = window_source(both, 8)
    assert isinstance(mixture, Mixture)
    assert mixture.row == 8
    sizes = [(part.tokens - 1) // 8 for part in (small, large)]
    assert [share.examples for share in mixture.shares] == sizes
    assert mixture.shares[0].drawn == pytest.approx(0.75 * sum(sizes), abs=1)
    read = list(itertools.chain.from_iterable(sequence.ids for sequence in mixture[0].sequences))
    assert np.array_equal(read, small.ids(0, 8))
