"""Cross-attention against its formula, row by row."""

from __future__ import annotations

import pytest
import torch

from craton.trunk import (
    AttentionConfig,
    Context,
    CrossAttentionConfig,
    FeedForwardConfig,
    KVCache,
    LayerConfig,
    NormConfig,
    Trunk,
    TrunkConfig,
)
from craton.trunk.cross_attention import CrossAttention, Run

NORM = NormConfig(kind="layer", bias=True)


@pytest.fixture
def attention() -> CrossAttention:
    torch.manual_seed(0)
    config = CrossAttentionConfig(heads=4, kv_heads=2, head_size=8, context_width=12, bias=("q", "v", "o"))
    return CrossAttention(config, 16).requires_grad_(False)


def naive(attention: CrossAttention, x_D: torch.Tensor, context_SW: torch.Tensor) -> torch.Tensor:
    q_HK, k_SGK, v_SGK = attention.q(x_D).view(4, 8), attention.k(context_SW), attention.v(context_SW)
    heads = []
    for head in range(4):
        group = slice(head // 2 * 8, head // 2 * 8 + 8)
        weights_S = (k_SGK[:, group] @ q_HK[head] / 8**0.5).softmax(0)
        heads.append(weights_S @ v_SGK[:, group])
    return attention.o(torch.cat(heads))


def test_each_row_sees_its_own_context(attention):
    contexts, rows = torch.randn(3, 5, 12), torch.randn(6, 16)
    numbers = [0, 0, 2, 1, 1, 1]
    found = attention(rows, context_of(attention, contexts).view(numbers), 0)
    expected = torch.stack([naive(attention, x, contexts[n]) for x, n in zip(rows, numbers, strict=True)])
    torch.testing.assert_close(found, expected)


def test_neighbours_with_equally_many_rows_are_one_run(attention):
    context = context_of(attention, torch.randn(4, 5, 12))
    assert context.view([0, 1, 2, 3]).runs == [Run(0, 4, 1)]
    assert context.view([0, 0, 1, 1, 3, 3]).runs == [Run(0, 2, 2), Run(3, 1, 2)]


def test_the_scores_are_those_of_the_weights(attention):
    contexts, rows = torch.randn(1, 5, 12), torch.randn(3, 16)
    context = context_of(attention, contexts)
    view = context.view([0, 0, 0], record=True)
    attention(rows, view, 0)
    (scores,) = view.scores
    q_nHK = attention.q(rows).view(3, 4, 8)
    k_SGK = attention.k(contexts[0]).view(5, 2, 8)
    expected = torch.einsum("nhk,shk->hns", q_nHK, k_SGK.repeat_interleave(2, 1)) / 8**0.5
    torch.testing.assert_close(scores[0], expected)
    assert context.view([0]).scores is None


def test_a_decoder_with_cache_gives_what_a_whole_pass_gives():
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8),
        feedforward=FeedForwardConfig(hidden=20, activation="gelu", bias=True),
        norm=NORM,
        cross_attention=CrossAttentionConfig(heads=2, kv_heads=2, head_size=8, context_width=16),
    )
    config = TrunkConfig(width=16, layers=(layer, layer), final_norm=NORM)
    trunk = Trunk(config).requires_grad_(False)
    context = trunk.read(torch.randn(2, 7, 16))
    x_TD = torch.randn(10, 16)
    numbers = torch.arange(2).repeat_interleave(5)
    whole = trunk(x_TD, torch.arange(5).repeat(2), numbers, context=context.view(numbers.tolist()))
    cache = KVCache(config, 2, dtype=torch.float32)
    steps = [
        trunk(x_TD[i::5], torch.full((2,), i), torch.arange(2), cache, context=context.view([0, 1])) for i in range(5)
    ]
    torch.testing.assert_close(torch.stack(steps, 1).flatten(0, 1), whole)
    other = trunk(x_TD, torch.arange(5).repeat(2), numbers, context=context.view([1 - n for n in numbers.tolist()]))
    assert (other - whole).abs().max() > 0.01


def context_of(attention: CrossAttention, contexts: torch.Tensor):
    return Context([attention.read(contexts)])
