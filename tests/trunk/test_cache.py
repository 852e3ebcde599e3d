"""The cache: it grows without forgetting, forgets what it is told to, and copies a sequence's beginning."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    KVCache,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    Trunk,
    TrunkConfig,
)
from craton.trunk.cache import CHUNK

NORM = NormConfig(kind="rms")
WIDE = AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8))
NARROW = AttentionConfig(heads=2, kv_heads=1, head_size=4, value_size=6, window=4)
LAYERS = tuple(
    LayerConfig(attention=attention, feedforward=FeedForwardConfig(hidden=8, activation="gelu"), norm=NORM)
    for attention in (WIDE, NARROW)
)
CONFIG = TrunkConfig(width=16, layers=LAYERS)


def make_trunk():
    torch.manual_seed(0)
    return Trunk(CONFIG).eval().requires_grad_(False)


TRUNK = make_trunk()


def embed(count, seed=1):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


def make_cache(slots):
    return KVCache(CONFIG, slots, dtype=torch.float32)


def read(x, cache, slot=0):
    """Append x to a slot."""
    start = cache.lengths[slot]
    return TRUNK(x, torch.arange(start, start + len(x)), torch.full((len(x),), slot), cache)


def alone(x):
    return TRUNK(x, torch.arange(len(x)))


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_shapes_are_the_layers_own():
    cache = make_cache(3)
    cache.reserve(1)
    assert [t.shape for t in cache.keys] == [(3, 2, CHUNK, 8), (3, 1, CHUNK, 4)]
    assert [t.shape for t in cache.values] == [(3, 2, CHUNK, 8), (3, 1, CHUNK, 6)]
    assert cache.nbytes == 4 * 3 * CHUNK * (2 * 8 + 4 + 2 * 8 + 6)


def test_an_empty_cache_holds_nothing_and_may_be_given_room():
    cache = make_cache(0)
    assert cache.nbytes == 0
    cache.reserve(5)
    cache.reserve_slots(2)
    assert cache.lengths == [0, 0]
    assert_close(read(embed(4), cache, slot=1), alone(embed(4)))


def test_growing_forgets_nothing():
    cache, x = make_cache(1), embed(CHUNK + 40)
    read(x[: CHUNK - 3], cache)
    small = cache.nbytes
    after = read(x[CHUNK - 3 :], cache)
    assert cache.nbytes > small
    assert_close(after, alone(x)[CHUNK - 3 :])


def test_more_slots_leave_the_old_ones_as_they_were():
    cache, x = make_cache(1), embed(9)
    read(x[:5], cache)
    cache.reserve_slots(4)
    cache.reserve_slots(2)  # never fewer
    assert cache.lengths == [5, 0, 0, 0]
    assert_close(read(embed(6, 2), cache, slot=3), alone(embed(6, 2)))
    assert_close(read(x[5:], cache), alone(x)[5:])


@settings(max_examples=20, deadline=None)
@given(held=st.integers(1, 12), kept=st.integers(0, 14))
def test_after_truncation_the_rest_is_read_as_if_new(held, kept):
    cache, x = make_cache(2), embed(held)
    read(x, cache, slot=1)
    cache.truncate(1, kept)
    kept = min(kept, held)
    assert cache.lengths == [0, kept]
    other = torch.cat((x[:kept], embed(3, 2)))
    assert_close(read(other[kept:], cache, slot=1), alone(other)[kept:])


@settings(max_examples=20, deadline=None)
@given(held=st.integers(1, 12), before=st.integers(0, 12))
def test_a_copy_goes_its_own_way(held, before):
    cache, x = make_cache(3), embed(held)
    if before:
        read(embed(before, 5), cache, slot=2)
    read(x, cache)
    cache.copy(0, 2)
    assert cache.lengths == [held, 0, held]
    for slot, seed in ((0, 2), (2, 3)):
        longer = torch.cat((x, embed(2, seed)))
        assert_close(read(longer[held:], cache, slot), alone(longer)[held:])


def resident() -> int:
    """Bytes of memory that this process has touched and not given back."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and only Linux takes memory back")
def test_one_long_sequence_among_many_slots_costs_what_it_is():
    wide = AttentionConfig(heads=8, kv_heads=8, head_size=64)
    layer = LAYERS[0].model_copy(update={"attention": wide})
    cache, before = KVCache(TrunkConfig(width=16, layers=(layer,)), 64, dtype=torch.float32), resident()
    length = 8192
    cache.reserve(length)
    cache.keys[0][7, :, :length], cache.values[0][7, :, :length] = 1.0, 2.0
    cache.lengths[7] = length
    one = length * cache.position_bytes
    assert cache.nbytes == 64 * one
    assert one <= resident() - before < 2 * one
    cache.reserve_slots(65)  # moved, and still only what was written
    assert (cache.keys[0][7] == 1).all()
    assert resident() - before < 2 * one
    cache.truncate(7, length // 4)
    cache.release(7)
    assert resident() - before < one * 0.6
    assert (cache.keys[0][7, :, : length // 4] == 1).all()
    assert (cache.values[0][7, :, length // 2 :] == 0).all()
    cache.truncate(7, 0)
    cache.release(7)
    assert resident() - before < one * 0.2


def test_a_copy_may_be_of_the_beginning_alone():
    cache, x = make_cache(2), embed(9)
    read(x, cache)
    cache.copy(0, 1, 4)
    assert cache.lengths == [9, 4]
    assert_close(read(x[4:], cache, 1), alone(x)[4:])


def test_released_positions_are_zeros_that_can_be_written():
    cache, x = make_cache(1), embed(CHUNK * 3)
    read(x, cache)
    cache.truncate(0, 5)
    cache.release(0)
    assert_close(read(x[5:], cache), alone(x)[5:])
