"""Attention against explicit formulas: masks, soft-cap, packing, and every way through the cache."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    KVCache,
    LatentConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    Trunk,
    TrunkConfig,
)
from craton.trunk.attention import attend
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

WIDTH, RMS = 24, NormConfig(kind="rms")
ATTENTIONS = {
    "grouped": AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8)),
    "window": AttentionConfig(heads=2, kv_heads=1, head_size=8, window=3, rotary=RotaryConfig(dims=4)),
    "softcap": AttentionConfig(heads=4, kv_heads=2, head_size=8, softcap=2.0, window=5, scale=0.4, bias=("q", "v")),
    "normed": AttentionConfig(heads=2, kv_heads=2, head_size=8, qk_norm=RMS, rotary=RotaryConfig(dims=8)),
    "latent": AttentionConfig(
        heads=3,
        kv_heads=3,
        head_size=10,
        value_size=6,
        rotary=RotaryConfig(dims=4, interleaved=True),
        latent=LatentConfig(q_rank=7, kv_rank=9, rotary_size=4, norm=RMS),
    ),
}
FULL = AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full", window=4, rotary=RotaryConfig(dims=8))

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)
few = settings(max_examples=15, deadline=None)


def make_trunk(*attentions):
    """A trunk with one layer for each of `attentions`."""
    torch.manual_seed(0)
    feedforward = FeedForwardConfig(hidden=16, activation="silu", gated=True)
    layers = tuple(LayerConfig(attention=a, feedforward=feedforward, norm=RMS) for a in attentions)
    return Trunk(TrunkConfig(width=WIDTH, layers=layers, final_norm=RMS)).eval().requires_grad_(False)


TRUNKS = {name: make_trunk(attention, attention) for name, attention in ATTENTIONS.items()}
TRUNKS["mixed"] = make_trunk(ATTENTIONS["grouped"], ATTENTIONS["window"], ATTENTIONS["softcap"])
kinds = st.sampled_from(sorted(TRUNKS))


def embed(count, seed=1):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def alone(trunk, x_TD):
    return trunk(x_TD, torch.arange(len(x_TD)))


def assert_close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def brute_force(config, q_THK, k_SGK, v_SGV, start=0):
    """softmax(q.k) v, one query head and one query at a time; the queries stand behind the first `start` keys."""
    out = torch.zeros(len(q_THK), config.heads, v_SGV.shape[-1])
    for i in range(len(q_THK)):
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            seen = [j for j in range(len(k_SGK)) if sees(config, start + i, j)]
            scores = k_SGK[seen, shared] @ q_THK[i, head] * (config.scale or config.head_size**-0.5)
            if config.softcap is not None:
                scores = config.softcap * torch.tanh(scores / config.softcap)
            out[i, head] = scores.softmax(-1) @ v_SGV[seen, shared]
    return out.flatten(1)


def sees(config, query, key):
    if config.mask == "full":
        return config.window is None or abs(query - key) <= config.window // 2
    return key <= query and (config.window is None or query - key < config.window)


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 12),
    mask=st.sampled_from(["causal", "full"]),
    window=st.none() | st.integers(1, 14),
    softcap=st.none() | st.just(1.5),
    scale=st.none() | st.just(0.9),
    heads=st.sampled_from([(1, 1), (4, 2), (4, 1)]),
)
def test_masks_windows_scale_and_softcap_against_brute_force(size, mask, window, softcap, scale, heads):
    config = AttentionConfig(
        heads=heads[0],
        kv_heads=heads[1],
        head_size=4,
        value_size=6,
        mask=mask,
        window=window,
        softcap=softcap,
        scale=scale,
    )
    generator = torch.Generator().manual_seed(size)
    q, k, v = (torch.randn(size, h, s, generator=generator) for h, s in ((heads[0], 4), (heads[1], 4), (heads[1], 6)))
    layout = Layout(torch.arange(size), None, None, torch.float32)
    assert_close(attend(config, q, k, v, layout, 0), brute_force(config, q, k, v))


@settings(max_examples=40, deadline=None)
@given(
    held=st.lists(st.integers(0, 7), min_size=1, max_size=4),
    size=st.integers(1, 5),
    window=st.none() | st.integers(1, 6),
    softcap=st.none() | st.just(1.5),
)
def test_queries_behind_unequal_caches_against_brute_force(held, size, window, softcap):
    config = AttentionConfig(heads=4, kv_heads=2, head_size=4, window=window, softcap=softcap)
    generator = torch.Generator().manual_seed(size)
    sequences = [[torch.randn(n + size, h, 4, generator=generator) for h in (4, 2, 2)] for n in held]
    cache = cache_of(config, len(held))
    expected = []
    for slot, (n, (q, k, v)) in enumerate(zip(held, sequences, strict=True)):
        if n:
            run(config, [q[:n], k[:n], v[:n]], [slot] * n, cache)
        expected.append(brute_force(config, q[n:], k, v, start=n))
    joined = [torch.cat([sequence[i][n:] for n, sequence in zip(held, sequences, strict=True)]) for i in range(3)]
    segments = [slot for slot in range(len(held)) for _ in range(size)]
    assert_close(run(config, joined, segments, cache), torch.cat(expected))


def cache_of(attention, slots):
    layer = LayerConfig(attention=attention, feedforward=FeedForwardConfig(hidden=4, activation="relu"), norm=RMS)
    return KVCache(TrunkConfig(width=WIDTH, layers=(layer,)), slots, dtype=torch.float32)


def run(config, qkv, segments, cache):
    layout = Layout(torch.arange(len(segments)), torch.tensor(segments), cache, torch.float32)
    out = attend(config, *qkv, layout, 0)
    layout.advance()
    return out


@few
@given(kind=kinds, lengths=lengths)
def test_packed_sequences_are_as_if_alone(kind, lengths):
    x = embed(sum(lengths))
    packed = TRUNKS[kind](x, *sequence_layout(lengths))
    assert_close(packed, torch.cat([alone(TRUNKS[kind], part) for part in x.split(lengths)]))


@few
@given(lengths=lengths)
def test_packed_sequences_that_see_both_ways_are_as_if_alone(lengths):
    trunk, x = make_trunk(FULL, FULL.model_copy(update={"window": None})), embed(sum(lengths))
    packed = trunk(x, *sequence_layout(lengths))
    assert_close(packed, torch.cat([alone(trunk, part) for part in x.split(lengths)]))


@few
@given(kind=kinds, chunks=lengths)
def test_a_prompt_read_in_chunks_is_as_if_read_at_once(kind, chunks):
    trunk, x = TRUNKS[kind], embed(sum(chunks))
    cache = KVCache(trunk.config, 1, dtype=torch.float32)
    outs, positions = [], torch.arange(len(x))
    for part, places in zip(x.split(chunks), positions.split(chunks), strict=True):
        outs.append(trunk(part, places, None, cache))
    assert_close(torch.cat(outs), alone(trunk, x))
    assert cache.lengths == [len(x)]


@few
@given(kind=kinds, prompts=lengths, steps=st.integers(1, 4))
def test_decoding_a_batch_is_as_if_each_were_alone(kind, prompts, steps):
    trunk, slots = TRUNKS[kind], torch.arange(len(prompts))
    texts = [embed(n + steps, seed) for seed, n in enumerate(prompts)]
    cache = KVCache(trunk.config, len(prompts), dtype=torch.float32)
    trunk(torch.cat([text[:n] for text, n in zip(texts, prompts, strict=True)]), *sequence_layout(prompts), cache)
    for step in range(steps):
        places = torch.tensor(prompts) + step
        x = torch.stack([text[place] for text, place in zip(texts, places.tolist(), strict=True)])
        out = trunk(x, places, slots, cache)
    assert_close(out, torch.stack([alone(trunk, text)[-1] for text in texts]))


@few
@given(kind=kinds, prompt=st.integers(1, 9), running=st.integers(1, 9))
def test_a_prompt_and_a_running_answer_in_one_pass(kind, prompt, running):
    trunk, answer, question = TRUNKS[kind], embed(running + 1, 1), embed(prompt, 2)
    cache = KVCache(trunk.config, 3, dtype=torch.float32)
    trunk(answer[:-1], torch.arange(running), torch.full((running,), 2), cache)
    places = torch.cat((torch.tensor([running]), torch.arange(prompt)))
    out = trunk(torch.cat((answer[-1:], question)), places, torch.tensor([2] + [0] * prompt), cache)
    assert_close(out, torch.cat((alone(trunk, answer)[-1:], alone(trunk, question))))
    assert cache.lengths == [prompt, 0, running + 1]


def test_joined_projections_give_the_same(monkeypatch):
    for name, trunk in TRUNKS.items():
        x = embed(7)
        expected = alone(trunk, x)
        for layer in trunk.layers:
            attention = layer.attention
            if name != "latent":
                parts = (attention.q, attention.k, attention.v)
                monkeypatch.setattr(attention, "fused", lambda x, parts=parts: torch.cat([p(x) for p in parts], -1))
            gated = layer.feedforward
            monkeypatch.setattr(gated, "fused", lambda x, m=gated: torch.cat((m.gate(x), m.up(x)), -1))
        assert_close(alone(trunk, x), expected)
        monkeypatch.undo()


def test_a_sequence_has_no_say_in_another():
    trunk, x = TRUNKS["mixed"], embed(12)
    before = trunk(x, *sequence_layout([5, 7]))
    x[:5] = 100.0
    after = trunk(x, *sequence_layout([5, 7]))
    assert torch.equal(before[5:], after[5:])
    assert not torch.allclose(before[:5], after[:5])


@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_shifting_all_positions_changes_nothing(name):
    # Rotary positions are relative; that holds only if queries and keys are rotated alike.
    trunk, x, places = TRUNKS[name], embed(9), torch.arange(9)
    torch.testing.assert_close(trunk(x, places + 1000), trunk(x, places), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(trunk(x, places * 2), trunk(x, places), atol=1e-2)
