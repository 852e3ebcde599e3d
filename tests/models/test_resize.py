"""Embeddings and heads with more rows: what the new ones are made of, and that the old ones stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.errors import UsageError
from craton.models import CausalLM, CausalLMConfig, Encoder, EncoderConfig
from craton.models.resize import resize_embeddings
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

OLD, NEW, WIDTH = 11, 15, 8
SOURCES = {11: [0, 1], 12: [2, 2, 5], 14: [10, 3]}  # 13 is left to the mean of all


def trunk() -> TrunkConfig:
    norm = NormConfig(kind="rms")
    attention = AttentionConfig(heads=2, kv_heads=1, head_size=4, rotary=RotaryConfig(dims=4))
    feedforward = FeedForwardConfig(hidden=12, activation="silu", gated=True)
    return TrunkConfig(
        width=WIDTH,
        layers=(LayerConfig(attention=attention, feedforward=feedforward, norm=norm),),
        final_norm=norm,
    )


def causal_lm(*, tied: bool, head_bias: bool = False) -> CausalLM:
    torch.manual_seed(0)
    config = CausalLMConfig(vocab=OLD, context=32, tied=tied, head_bias=head_bias, trunk=trunk())
    model = CausalLM(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def encoder() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(vocab=OLD, context=32, trunk=trunk()))


def assert_rows(new: torch.Tensor, old: torch.Tensor) -> None:
    assert new.shape == (NEW, *old.shape[1:])
    assert torch.equal(new[:OLD], old)
    torch.testing.assert_close(new[11], (old[0] + old[1]) / 2)
    torch.testing.assert_close(new[12], (2 * old[2] + old[5]) / 3)
    torch.testing.assert_close(new[13], old.sum(0) / OLD)
    torch.testing.assert_close(new[14], (old[10] + old[3]) / 2)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head_bias", [True, False])
def test_rows_of_embedding_head_and_bias(tied: bool, head_bias: bool) -> None:
    model = causal_lm(tied=tied, head_bias=head_bias)
    embedding, head = model.embedding.weight.detach().clone(), model.head.weight.detach().clone()
    bias = model.head.bias.detach().clone() if head_bias else None
    resize_embeddings(model, NEW, SOURCES)
    assert_rows(model.embedding.weight, embedding)
    assert_rows(model.head.weight, head)
    if bias is not None:
        assert_rows(model.head.bias, bias)
    assert model.config == causal_lm(tied=tied, head_bias=head_bias).config.model_copy(update={"vocab": NEW})
    assert (model.embedding.num_embeddings, model.head.out_features) == (NEW, NEW)


def test_a_tied_head_stays_tied() -> None:
    model = causal_lm(tied=True)
    resize_embeddings(model, NEW, SOURCES)
    assert model.head.weight is model.embedding.weight
    assert len(list(model.parameters())) == len(list(causal_lm(tied=True).parameters()))
    ids = torch.tensor([1, 12, 14])
    model(ids, torch.arange(3)).sum().backward()
    assert model.embedding.weight.grad is not None
    assert model.embedding.weight.grad.shape == (NEW, WIDTH)


@pytest.mark.parametrize("tied", [True, False])
def test_old_tokens_get_their_old_logits(tied: bool) -> None:
    model = causal_lm(tied=tied)
    ids, positions = torch.tensor([3, 1, 4, 1, 5, 9]), torch.arange(6)
    before = model(ids, positions)
    resize_embeddings(model, NEW, SOURCES)
    after = model(ids, positions)
    assert after.shape == (6, NEW)
    torch.testing.assert_close(after[:, :OLD], before)
    torch.testing.assert_close(after[:, 11], before[:, [0, 1]].mean(1))  # a mean of rows gives the mean of logits


def test_an_encoder() -> None:
    model = encoder()
    embedding = model.embedding.weight.detach().clone()
    resize_embeddings(model, NEW, SOURCES)
    assert_rows(model.embedding.weight, embedding)
    assert model.config.vocab == NEW
    assert model(torch.tensor([14, 0]), torch.arange(2)).shape == (2, WIDTH)


def test_spare_rows_are_taken_into_use() -> None:
    model = causal_lm(tied=False)
    old = model.embedding.weight.detach().clone()
    resize_embeddings(model, OLD, {9: [1, 2], 10: [9, 3]})
    torch.testing.assert_close(model.embedding.weight[9], (old[1] + old[2]) / 2)
    torch.testing.assert_close(model.embedding.weight[10], (old[9] + old[3]) / 2)  # of the row as it was
    assert torch.equal(model.embedding.weight[:9], old[:9])


def test_dtype_and_frozenness_stay_and_means_are_taken_in_fp32() -> None:
    model = causal_lm(tied=True).to(torch.bfloat16).requires_grad_(False)
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
        model.embedding.weight[0] = 256.0
    # In bfloat16, 256 + 1 is 256, again and again.
    resize_embeddings(model, OLD + 1, {OLD: [0] + [1] * 9})
    assert model.embedding.weight.dtype == torch.bfloat16
    assert not model.embedding.weight.requires_grad
    assert model.embedding.weight[OLD, 0] == torch.tensor(26.5).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("vocab", "sources", "words"),
    [
        (10, {}, "cannot shrink"),
        (12, {12: [0, 1]}, "token 12"),
        (12, {11: [0, 11]}, "token 11"),
        (12, {11: []}, "token 11"),
        (12, {-1: [0]}, "token -1"),
        (12, {11: [-1]}, "token 11"),
    ],
)
def test_refusals_change_nothing(vocab: int, sources: dict[int, list[int]], words: str) -> None:
    model = causal_lm(tied=True)
    with pytest.raises(UsageError, match=words):
        resize_embeddings(model, vocab, sources)
    assert model.config.vocab == OLD
    assert model.embedding.weight.shape == (OLD, WIDTH)


def test_packed_weights_are_refused(smollm2_gguf: Path) -> None:
    model = Checkpoint.open(smollm2_gguf).load(torch.float32, packed=True)
    assert isinstance(model, CausalLM)
    with pytest.raises(UsageError, match="packed") as refusal:
        resize_embeddings(model, 50_000)
    assert "float32" in (refusal.value.remedy or "")
