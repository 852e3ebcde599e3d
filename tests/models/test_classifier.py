"""The classifier: packed and alone, what it reads, and which of its parameters are the head's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craton.errors import UnknownName, UsageError
from craton.models import CausalLM, CausalLMConfig, Classifier, ClassifierConfig, Encoder, EncoderConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig
from craton.trunk.trunk import sequence_layout

LENGTHS = [1, 7, 4, 7]
IDS = torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def trunk(mask: Any) -> TrunkConfig:
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask=mask, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="gelu"),
        norm=NormConfig(kind="rms"),
    )
    return TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))


def causal() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(CausalLMConfig(vocab=40, context=32, trunk=trunk("causal"), tied=False))


def encoder(**switches: Any) -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(vocab=40, context=32, trunk=trunk("full"), **switches))


def make(pooling: Any) -> Classifier:
    return Classifier.over(causal() if pooling == "last" else encoder(), ["a", "b", "c"], pooling=pooling).eval()


def run(model: nn.Module, ids: Tensor = IDS, lengths: list[int] = LENGTHS) -> Tensor:
    logits: Tensor = model(ids, *sequence_layout(lengths), lengths)
    return logits


@pytest.mark.parametrize("pooling", ["last", "cls", "mean"])
def test_packed_logits_are_those_of_each_text_alone(pooling: str) -> None:
    model = make(pooling)
    alone = torch.cat([run(model, part, [len(part)]) for part in IDS.split(LENGTHS)])
    torch.testing.assert_close(run(model), alone)


@pytest.mark.parametrize(("pooling", "read"), [("last", -1), ("cls", 0)])
def test_one_token_is_read(pooling: str, read: int) -> None:
    model, ids = make(pooling), IDS[1:8]
    positions = torch.arange(7)
    hidden = model.backbone.hidden(ids, positions) if pooling == "last" else model.backbone(ids, positions)  # type: ignore[operator]
    vector = hidden[read]
    if pooling == "cls":
        pooler = model.get_submodule("backbone.pooler")
        vector = torch.tanh(vector @ pooler.weight.T + pooler.bias)  # type: ignore[operator]
        vector = vector @ model.head.weight.T + model.head.bias
    else:
        assert model.head.bias is None
        vector = model.head.weight @ vector
    torch.testing.assert_close(run(model, ids, [7])[0], vector)


def test_logits_are_fp32_whatever_the_weights_are() -> None:
    for pooling in ("last", "cls", "mean"):
        logits = run(make(pooling).bfloat16())
        assert logits.dtype == torch.float32
        # Had the head computed in bfloat16, each would be one of its numbers.
        assert not torch.equal(logits, logits.bfloat16().float())


@pytest.mark.parametrize(
    ("pooling", "names"),
    [
        ("last", {"head.weight"}),
        ("cls", {"head.weight", "head.bias", "backbone.pooler.weight", "backbone.pooler.bias"}),
        ("mean", {"head.weight", "head.bias"}),
    ],
)
def test_the_heads_parameters_can_be_trained_over_a_frozen_backbone(pooling: Any, names: set[str]) -> None:
    backbone = (causal() if pooling == "last" else encoder(pooler=True)).requires_grad_(False)
    model = Classifier.over(backbone, ["a", "b"], pooling=pooling)
    assert {name for name, _ in model.head_parameters()} == names
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == names
    run(model).sum().backward()
    assert all(parameter.grad is not None for _, parameter in model.head_parameters())


def test_a_loaded_pooler_is_kept_and_an_unread_one_leaves() -> None:
    backbone = encoder(pooler=True)
    assert backbone.pooler is not None
    weight = backbone.pooler.weight.clone()
    assert torch.equal(Classifier.over(backbone, ["a", "b"]).get_parameter("backbone.pooler.weight"), weight)
    without = Classifier.over(encoder(pooler=True), ["a", "b"], pooling="mean")
    assert not any("pooler" in name for name, _ in without.named_parameters())


def test_every_parameter_of_the_classifier_gets_a_gradient() -> None:
    # An unread next-token head or pooler would be trained by weight decay alone, and stall a distributed step.
    for pooling in ("last", "cls", "mean"):
        model = make(pooling)
        run(model).square().sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_dropout_is_of_the_head_and_of_training_only() -> None:
    model = Classifier.over(encoder(), ["a", "b"], dropout=0.5)
    assert not torch.equal(run(model.train()), run(model.train()))
    assert torch.equal(run(model.eval()), run(model.eval()))


def test_a_config_makes_what_over_makes() -> None:
    model = make("last")
    again = Classifier(model.config)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    assert ClassifierConfig.model_validate(model.config.model_dump()) == model.config
    assert (model.config.vocab, model.config.context) == (40, 32)


def test_what_makes_no_classifier_is_refused() -> None:
    with pytest.raises(UnknownName, match="unknown pooling 'cls'"):
        Classifier.over(causal(), ["a", "b"], pooling="cls")
    with pytest.raises(UnknownName, match="unknown pooling 'last'"):
        Classifier.over(encoder(), ["a", "b"], pooling="last")
    with pytest.raises(UsageError, match="two labels have one name"):
        Classifier.over(causal(), ["a", "a"])
    with pytest.raises(UsageError, match="at least 2"):
        Classifier.over(causal(), ["a"])
    with pytest.raises(UsageError, match="dropout"):
        Classifier.over(causal(), ["a", "b"], dropout=1.0)
