"""The loader: every example once, the same steps for every world, micro-batches that fit."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data.batch import Batch
from craton.data.example import UNTRAINED, Example, TokenSequence, next_token_targets
from craton.data.loader import ListSource, Loader
from craton.data.plan import permutation
from craton.errors import UsageError

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def example(number: int, length: int) -> Example:
    """An example whose tokens are all its own number."""
    ids = np.full(length, number, dtype=np.int32)
    return Example((next_token_targets(ids, [True] * length),), label=number)


def source_of(lengths: list[int]) -> ListSource:
    return ListSource([example(number, length) for number, length in enumerate(lengths)])


def numbers(batches: list[Batch]) -> list[int]:
    return [int(label) for batch in batches for label in batch.labels]


@settings(deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 4), st.integers(1, 100), st.integers(0, 3))
def test_every_example_reaches_one_rank_once_per_epoch(
    lengths: list[int], batch: int, world: int, micro_tokens: int, epoch: int
) -> None:
    ranks = [
        Loader(source_of(lengths), batch=batch, micro_tokens=micro_tokens, seed=1, rank=rank, world=world)
        for rank in range(world)
    ]
    alone = Loader(source_of(lengths), batch=batch, micro_tokens=10**9, seed=1)
    seen: Counter[int] = Counter()
    for step in range(epoch * alone.steps_per_epoch, (epoch + 1) * alone.steps_per_epoch):
        parts = [loader.step(step) for loader in ranks]
        assert len({len(part) for part in parts}) == 1, "ranks step together"
        here = sorted(itertools.chain.from_iterable(numbers(part) for part in parts))
        assert here == sorted(numbers(alone.step(step))), "the cut does not change what a step holds"
        seen.update(here)
        for micro in itertools.chain.from_iterable(parts):
            assert micro.tokens <= micro_tokens or len(micro.sequences) == 1
            assert micro.tokens == sum(micro.lengths) >= 1
            assert list(micro.lengths) == sorted(micro.lengths, reverse=True)
            assert set(micro.ids_T.tolist()) == (set(micro.labels.tolist()) or {0})
    assert seen == Counter(range(len(lengths)))
    assert ranks[0].epoch_of(step) == epoch


@given(SIZES, st.integers(1, 5))
def test_ranks_are_balanced_by_tokens(lengths: list[int], world: int) -> None:
    loads = []
    for rank in range(world):
        loader = Loader(source_of(lengths), batch=1000, micro_tokens=1000, seed=0, rank=rank, world=world)
        loads.append(sum(sum(lengths[number] for number in numbers([batch])) for batch in loader.step(0)))
    assert max(loads) - min(loads) <= max(lengths)  # what the greedy rule guarantees


def test_a_step_is_a_pure_function_of_its_number() -> None:
    lengths = [3, 9, 4, 4, 7, 1, 2, 8, 6, 5, 5]
    first = Loader(source_of(lengths), batch=4, micro_tokens=12, seed=3)
    forwards = [numbers(first.step(step)) for step in range(12)]
    again = Loader(source_of(lengths), batch=4, micro_tokens=12, seed=3)
    assert [numbers(again.step(step)) for step in reversed(range(12))] == forwards[::-1]
    other_seed = Loader(source_of(lengths), batch=4, micro_tokens=12, seed=4)
    assert [numbers(other_seed.step(step)) for step in range(12)] != forwards
    assert first.steps_per_epoch == 3
    orders = [list(itertools.chain.from_iterable(forwards[3 * e : 3 * e + 3])) for e in range(4)]
    assert len({tuple(order) for order in orders}) == 4, "every epoch has its own order"


def test_the_order_does_not_change_between_versions() -> None:
    assert permutation(8, 0, 0).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]
    assert permutation(8, 1, 2).tolist() == [7, 1, 3, 0, 4, 2, 6, 5]


def test_without_shuffling_the_order_is_the_sources() -> None:
    loader = Loader(source_of([5] * 7), batch=3, micro_tokens=100, seed=0, shuffle=False)
    assert [numbers(loader.step(step)) for step in range(4)] == [[0, 1, 2], [3, 4, 5], [6], [0, 1, 2]]


def test_few_full_micro_batches_rather_than_many() -> None:
    loader = Loader(source_of([6, 4] * 10), batch=20, micro_tokens=10, seed=0)
    assert [batch.tokens for batch in loader.step(0)] == [10] * 10


def test_examples_that_must_meet_share_a_micro_batch() -> None:
    loaders = [
        Loader(source_of([6] * 10), batch=10, micro_tokens=7, seed=0, rank=r, world=2, sequences_together=True)
        for r in range(2)
    ]
    assert [len(batch.sequences) for loader in loaders for batch in loader.step(0)] == [5, 5]


def test_a_rank_without_examples_runs_a_token_that_trains_nothing() -> None:
    loaders = [Loader(source_of([9, 9, 9]), batch=3, micro_tokens=9, seed=0, rank=r, world=2) for r in range(2)]
    long, short = (loader.step(0) for loader in loaders)
    assert [batch.tokens for batch in long] == [9, 9]
    assert [batch.tokens for batch in short] == [9, 1]
    empty = short[1]
    assert (empty.trained, empty.sequences, len(empty.labels), empty.lengths) == (0, (), 0, (1,))
    assert empty.targets_T.tolist() == [UNTRAINED]


class Rows(ListSource):
    """Windows of eight tokens."""

    row: int | None = 8


@pytest.mark.parametrize(
    ("rows", "micro_tokens", "world", "expected"),
    [
        (16, 48, 1, [6, 5, 5]),
        (16, 48, 2, [4, 4]),
        (16, 64, 1, [8, 8]),
        (5, 1, 1, [1] * 5),
        (3, 16, 2, [2]),
    ],
)
def test_windows_make_micro_batches_of_whole_equal_rows(
    rows: int, micro_tokens: int, world: int, expected: list[int]
) -> None:
    windows = Rows([example(number, 8) for number in range(rows)])
    loader = Loader(windows, batch=rows, micro_tokens=micro_tokens, seed=0, world=world)
    batches = loader.step(0)
    assert [batch.tokens // 8 for batch in batches] == expected
    assert all(batch.row == 8 for batch in batches)


def test_a_rank_without_pairs_runs_a_pair_that_trains_nothing() -> None:
    pair = Example((next_token_targets([1, 2, 3], [True] * 3),) * 2)
    [only] = Loader(ListSource([pair]), batch=2, micro_tokens=9, seed=0, rank=1, world=2).step(0)
    assert (only.lengths, only.sequences, only.trained, only.segments_T.tolist()) == ((1, 1), (), 0, [0, 1])


def test_sequences_of_one_example_stay_together_and_in_order() -> None:
    def pair(number: int, chosen: int, rejected: int) -> Example:
        parts = [TokenSequence(np.full(n, number, np.int32), np.full(n, number, np.int32)) for n in (chosen, rejected)]
        return Example(tuple(parts))

    pairs = ListSource([pair(0, 3, 5), pair(1, 5, 3), pair(2, 3, 5), pair(3, 4, 4)])
    [batch] = Loader(pairs, batch=4, micro_tokens=100, seed=5).step(0)
    assert batch.sequences == (2, 2, 2, 2)
    assert batch.lengths == (5, 3, 4, 4, 3, 5, 3, 5)


def test_a_source_that_changes_with_the_epoch_is_asked_for_the_step_s() -> None:
    class Counted(ListSource):
        def at_epoch(self, epoch: int) -> ListSource:
            return source_of([epoch + 1] * 3)

    loader = Loader(Counted([example(0, 9)] * 3), batch=2, micro_tokens=99, seed=0)
    assert [loader.step(step)[0].lengths for step in range(4)] == [(1, 1), (1,), (2, 2), (2,)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"micro_tokens": 0}, "micro_tokens must be at least 1"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_numbers_that_make_no_sense(changes: dict[str, int], message: str) -> None:
    numbers = {"batch": 1, "micro_tokens": 1, "seed": 0} | changes
    with pytest.raises(UsageError, match=message):
        Loader(source_of([1]), **numbers)  # type: ignore[arg-type]


def test_no_examples() -> None:
    with pytest.raises(UsageError, match="no example"):
        Loader(ListSource([]), batch=1, micro_tokens=1, seed=0)
