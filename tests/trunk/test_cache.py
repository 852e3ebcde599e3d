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
from craton.trunk.cache import CHUNK, pack_rows, unpack_rows

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


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 70), exponent=st.integers(-30, 30), seed=st.integers(0, 99))
def test_8_bit_rows_are_within_half_a_step(size, exponent, seed):
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    rows = pack_rows(x)
    assert rows.dtype == torch.int8
    assert rows.shape == (3, 5, (size + 3) // 4 * 4 + 4)
    found = unpack_rows(rows, size, torch.float32)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((found - x).abs() <= step * 0.5001).all()
    again = unpack_rows(pack_rows(found), size, torch.float32)
    torch.testing.assert_close(again, found, rtol=1e-6, atol=0)


def test_8_bit_rows_of_zeros_and_of_what_is_no_number():
    assert unpack_rows(pack_rows(torch.zeros(2, 6)), 6, torch.float32).eq(0).all()
    for bad in (torch.nan, torch.inf, -torch.inf):
        rows = pack_rows(torch.tensor([[1.0, bad, 0.0, -3.0], [1.0, 2.0, 3.0, 4.0]]))
        found = unpack_rows(rows, 4, torch.float32)
        assert not found[0].isfinite().any()
        assert found[1].isfinite().all()


def test_a_cache_of_8_bits():
    cache, x = KVCache(CONFIG, 2, dtype=torch.int8), embed(CHUNK + 9)
    assert cache.position_bytes == 2 * (8 + 4) + 2 * (8 + 4) + (4 + 4) + (8 + 4)
    plain = make_cache(2)
    assert [t.shape[:2] for t in cache.keys] == [t.shape[:2] for t in plain.keys]
    whole = read(x, cache, slot=1)
    assert 0 < (whole - alone(x)).abs().max() < 0.05
    # Cut, grown, copied, truncated: the same codes.
    pieces = KVCache(CONFIG, 1, dtype=torch.int8)
    read(x[:7], pieces)
    read(x[7 : CHUNK - 2], pieces)
    pieces.reserve_slots(3)
    pieces.copy(0, 2, 200)
    read(x[200:], pieces, slot=2)
    read(embed(3, 9), pieces, slot=0)
    pieces.truncate(0, CHUNK - 2)
    read(x[CHUNK - 2 :], pieces, slot=0)
    for slot in (0, 2):
        keys, values = pieces.read(1, slice(slot, slot + 1), 0, len(x), torch.float32)
        expected = cache.read(1, slice(1, 2), 0, len(x), torch.float32)
        torch.testing.assert_close((keys, values), expected, rtol=0.02, atol=0.02)


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
