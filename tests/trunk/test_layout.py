"""Which rows go together, which keys they see, and which rotary tables they share."""

from __future__ import annotations

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
    RotaryScaling,
    TrunkConfig,
)
from craton.trunk.attention import attend
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

ATTENTION = AttentionConfig(heads=1, kv_heads=1, head_size=4)


def make_cache(*lengths):
    feedforward = FeedForwardConfig(hidden=4, activation="relu")
    layer = LayerConfig(attention=ATTENTION, feedforward=feedforward, norm=NormConfig(kind="rms"))
    cache = KVCache(TrunkConfig(width=4, layers=(layer,)), len(lengths), dtype=torch.float32)
    cache.reserve(max(lengths))
    cache.lengths = list(lengths)
    return cache


def make_layout(segments, cache=None):
    return Layout(torch.arange(len(segments)), torch.tensor(segments), cache, torch.float32)


def shape(group):
    return (group.size, group.starts)


def test_without_segments_all_rows_are_one():
    layout = Layout(torch.arange(5), None, None, torch.float32)
    assert [shape(group) for group in layout.groups] == [(5, [0])]


def test_neighbours_of_equal_length_are_one_group():
    layout = make_layout([7, 7, 3, 3, 9, 4, 4, 4])
    assert [shape(group) for group in layout.groups] == [(2, [0, 0]), (1, [0]), (3, [0])]


def test_with_a_cache_only_neighbouring_slots_are_one_group():
    layout = make_layout([0, 1, 3, 2], make_cache(5, 6, 7, 8))
    assert [(shape(g), g.slots) for g in layout.groups] == [
        ((1, [5, 6]), slice(0, 2)),
        ((1, [8]), slice(3, 4)),
        ((1, [7]), slice(2, 3)),
    ]


def test_the_cache_learns_what_was_written_only_afterwards():
    cache = make_cache(5, 0, 2)
    layout = make_layout([0, 0, 2], cache)
    assert cache.lengths == [5, 0, 2]
    assert cache.keys[0].shape[2] >= 7
    layout.advance()
    assert cache.lengths == [7, 0, 3]


@settings(max_examples=60, deadline=None)
@given(
    starts=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    size=st.integers(1, 5),
    mask=st.sampled_from(["causal", "full"]),
    window=st.none() | st.integers(1, 9),
)
def test_a_view_is_the_brute_force_mask(starts, size, mask, window):
    layout = make_layout([slot for slot in range(len(starts)) for _ in range(size)], make_cache(*starts))
    (group,) = layout.groups
    view = group.view(AttentionConfig(heads=1, kv_heads=1, head_size=4, mask=mask, window=window))
    keys = range(max(starts) + size)
    expected = torch.tensor(
        [[[sees(mask, window, start, size, start + i, key) for key in keys] for i in range(size)] for start in starts]
    )
    seen = torch.zeros_like(expected)
    if view.mask is not None:
        seen[..., view.first : view.last] = view.mask[:, 0]
    elif view.causal:
        seen[..., view.first : view.last] = torch.ones(size, view.last - view.first, dtype=torch.bool).tril()
    else:
        seen[..., view.first : view.last] = True
    assert torch.equal(seen, expected)


def sees(mask, window, start, size, query, key):
    if mask == "full":
        return key < start + size and (window is None or abs(query - key) <= window // 2)
    return key <= query and (window is None or query - key < window)


def test_an_equal_pass_needs_no_mask():
    # The fast paths of attention: a mask would cost memory and the flash kernel.
    plain, windowed = ATTENTION, ATTENTION.model_copy(update={"window": 3})
    (prefill,) = make_layout([0, 0, 0, 1, 1, 1]).groups
    assert prefill.view(plain).causal
    assert prefill.view(windowed).causal
    (decode,) = make_layout([0, 1], make_cache(9, 9)).groups
    assert (decode.view(plain).first, decode.view(plain).last, decode.view(plain).mask) == (0, 10, None)
    assert (decode.view(windowed).first, decode.view(windowed).last, decode.view(windowed).mask) == (7, 10, None)


def test_sequence_layout():
    positions, segments = sequence_layout([2, 1, 3])
    assert positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert segments.tolist() == [0, 0, 1, 2, 2, 2]


def test_layers_of_one_config_share_a_rotary_table():
    layout, config = make_layout([0, 0]), RotaryConfig(dims=4)
    assert layout.rotary(config) is layout.rotary(config)
    assert layout.rotary(config) is not layout.rotary(RotaryConfig(dims=4, theta=7.0))


@pytest.mark.parametrize("held", [0, 3])
def test_each_sequence_has_the_longrope_factors_of_its_own_length(held):
    scaling = RotaryScaling(
        kind="longrope", factor=4.0, original_context=4, short_factors=(1.0, 2.0), long_factors=(3.0, 5.0)
    )
    short, long = ([*([slot] * size)] for slot, size in ((0, 2), (1, 5 - held)))
    cache = make_cache(0, held)
    positions = torch.cat((torch.arange(2), torch.arange(held, 5)))
    layout = Layout(positions, torch.tensor(short + long), cache, torch.float32)
    rotary = layout.rotary(RotaryConfig(dims=4, theta=100.0, scaling=scaling))
    frequencies = torch.tensor([1.0, 0.1])
    factors = torch.tensor([[1.0, 2.0]] * 2 + [[3.0, 5.0]] * (5 - held))
    angles = positions[:, None] * frequencies / factors
    torch.testing.assert_close(rotary.cos[:, 0], torch.cat((angles, angles), -1).cos())


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=3), min_size=1, max_size=3),
    mask=st.sampled_from(["causal", "full"]),
    window=st.none() | st.integers(1, 9),
)
def test_rows_of_documents_see_what_the_same_documents_see_alone(cuts, mask, window):
    row, segments, positions, number = 8, [], [], 0
    for lengths in cuts:
        borders = sorted({min(row, sum(lengths[: i + 1])) for i in range(len(lengths))} | {row})
        for first, last in zip([0, *borders[:-1]], borders, strict=True):
            segments += [number] * (last - first)
            positions += range(last - first)
            number += 1
    attention = AttentionConfig(heads=2, kv_heads=1, head_size=4, mask=mask, window=window)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(len(segments), heads, 4, generator=generator) for heads in (2, 1, 1))
    tensors = torch.tensor(positions), torch.tensor(segments)
    in_rows = Layout(*tensors, None, torch.float32, row)
    assert len(in_rows.groups) == 1
    together = attend(attention, q, k, v, in_rows, 0)
    alone = attend(attention, q, k, v, Layout(*tensors, None, torch.float32), 0)
    torch.testing.assert_close(together, alone)


def test_rows_of_one_document_each_need_no_mask():
    layout = Layout(torch.arange(8) % 4, torch.tensor([0] * 4 + [1] * 4), None, torch.float32, row=4)
    view = layout.groups[0].view(ATTENTION)
    assert view.causal
    assert view.mask is None
