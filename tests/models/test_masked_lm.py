"""The masked language model's head: which rows, which weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from craton.models import EncoderConfig, MaskedLM, MaskedLMConfig, build
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, LearnedPositions, NormConfig, TrunkConfig
from craton.trunk.trunk import sequence_layout

LENGTHS = [3, 1, 8, 5]
IDS = torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def tiny() -> MaskedLM:
    torch.manual_seed(0)
    norm = NormConfig(kind="layer", bias=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full"),
        feedforward=FeedForwardConfig(hidden=24, activation="gelu_tanh"),
        norm=norm,
        attention_norms=("residual",),
        feedforward_norms=("residual",),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, positions=LearnedPositions(count=32), input_norm=norm)
    encoder = EncoderConfig(vocab=40, context=32, trunk=trunk, token_types=2)
    model = build(MaskedLMConfig(encoder=encoder, activation="gelu_tanh", norm=norm))
    assert isinstance(model, MaskedLM)
    return model.eval()


def test_packed_logits_are_those_of_each_text_alone() -> None:
    model = tiny()
    alone = torch.cat([model(part, torch.arange(len(part))) for part in IDS.split(LENGTHS)])
    torch.testing.assert_close(model(IDS, *sequence_layout(LENGTHS)), alone)


def test_the_head_is_a_layer_a_norm_and_the_embedding_again() -> None:
    model = tiny()
    torch.nn.init.normal_(model.bias)
    hidden = model.hidden(IDS[:5], torch.arange(5))
    activated = F.gelu(hidden @ model.dense.weight.T + model.dense.bias, approximate="tanh")
    assert model.norm.bias is not None
    normed = F.layer_norm(activated, (16,), model.norm.weight, model.norm.bias, 1e-5)
    expected = normed @ model.encoder.embedding.weight.T + model.bias
    torch.testing.assert_close(model.logits(hidden[[1, 3]]), expected[[1, 3]])
    assert (model.config.vocab, model.config.context) == (40, 32)


def test_the_embedding_is_trained_from_both_ends() -> None:
    model = tiny()
    model(torch.tensor([3, 4]), torch.arange(2)).square().sum().backward()
    gradient = model.encoder.embedding.weight.grad
    assert gradient is not None
    assert bool((gradient.abs().sum(1) > 0).all())
