"""Merged models do what base and adapter did, and what so few bits cost is measured right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from craton.checkpoints.gguf import GGMLType, dequantize, quantize
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from craton.errors import UnknownName
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import adapter_parameters, apply_lora, lora_layers, use_adapter
from craton.finetuning.merging import merge_adapter, update_lost
from craton.finetuning.quantized_base import base_kind, quantize_base
from craton.models import CausalLM, CausalLMConfig, Classifier
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    Linear,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
    replace_linears,
)
from craton.trunk.trunk import sequence_layout


def make_model(*, tied: bool = True, experts: bool = False) -> CausalLM:
    torch.manual_seed(0)
    dense = FeedForwardConfig(hidden=64, activation="silu", gated=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=RotaryConfig(dims=8), bias=("q", "k", "v")),
        feedforward=ExpertsConfig(count=3, per_token=2, expert=dense) if experts else dense,
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=32, layers=(layer,) * 2, final_norm=layer.norm)
    return CausalLM(CausalLMConfig(vocab=50, context=64, trunk=trunk, tied=tied)).requires_grad_(False)


@torch.inference_mode()
def logits(model: CausalLM) -> Tensor:
    return model(torch.arange(24) % 50, torch.arange(24))


def adapt(model: nn.Module, name: str = "default", size: float = 0.2, **settings: Any) -> None:
    apply_lora(model, LoraSettings(**{"rank": 4, "alpha": 4, **settings}), name)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in adapter_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter * (1 + size * noise) if key.endswith("magnitude") else size * noise


def close(ours: Tensor, theirs: Tensor) -> bool:
    return bool((ours - theirs).abs().max() < 2e-5 * theirs.abs().max())


def is_plain(model: nn.Module) -> bool:
    linears = [module for module in model.modules() if hasattr(module, "in_features")]
    return all(type(module) is Linear for module in linears) and not lora_layers(model)


@pytest.mark.parametrize("kind", [None, "nf4", "nf4-double", "int4", "int4-minmax"])
@pytest.mark.parametrize("variant", [{}, {"rslora": True}, {"dora": True}])
def test_merged_is_unmerged(variant: dict[str, bool], kind: str | None) -> None:
    model = make_model()
    original = logits(model)
    if kind is not None:
        quantize_base(model, kind)
    base = logits(model)
    adapt(model, **variant)
    adapted = logits(model)
    assert not close(adapted, base)
    names = set(model.state_dict())
    report = merge_adapter(model, "default")
    assert close(logits(model), adapted)
    assert is_plain(model)
    assert len(report.layers) == 2 * 7
    assert report.base == ("original" if kind is None else f"dequantised {kind}")
    assert not report.untied
    assert set(model.state_dict()) == set(make_model().state_dict()) != names
    assert model.head.weight is model.embedding.weight
    assert not close(logits(model), original)


def test_layers_without_the_adapter_stay_as_they_were() -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapt(model, targets=("q",))
    report = merge_adapter(model, "default")
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.weight" for name in report.layers}
    assert all(name.endswith(".attention.q") for name in report.layers)


def test_one_of_several_is_merged_and_the_others_go() -> None:
    model = make_model()
    adapt(model, "one", targets=("q,v",))
    one = logits(model)
    adapt(model, "two", targets=("v,up",), dora=True)
    use_adapter(model, None)
    merge_adapter(model, "one")
    assert close(logits(model), one)
    assert is_plain(model)
    with pytest.raises(UnknownName, match="'one'"):
        merge_adapter(model, "one")


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_untied_and_the_embedding_is_left(tied: bool) -> None:
    model = make_model(tied=tied)
    embedding = model.embedding.weight.clone()
    adapt(model, targets=("head", "q"))
    adapted = logits(model)
    report = merge_adapter(model, "default")
    assert report.untied == tied
    assert not model.config.tied
    assert close(logits(model), adapted)
    assert torch.equal(model.embedding.weight, embedding)
    assert not torch.equal(model.head.weight, embedding)
    assert "head.weight" in model.state_dict()


def test_experts_and_their_routers() -> None:
    model = make_model(experts=True)
    adapt(model)
    adapted = logits(model)
    merge_adapter(model, "default")
    assert close(logits(model), adapted)
    assert is_plain(model)


def test_a_classifier_keeps_its_head() -> None:
    model = Classifier.over(make_model(), ["a", "b"])
    layout = sequence_layout([5, 7])
    adapt(model)
    with torch.inference_mode():
        adapted = model(torch.arange(12), *layout, [5, 7])
        head = model.head.weight.clone()
        merge_adapter(model, "default")
        assert close(model(torch.arange(12), *layout, [5, 7]), adapted)
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize("head", [True, False])
def test_a_base_in_a_file_s_own_blocks(head: bool) -> None:
    model = make_model()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} | {"embedding"}

    def packed(_: str, module: nn.Module) -> nn.Module:
        values = module.weight.detach().numpy()
        tensor = QuantizedTensor(GGMLType.Q8_0, quantize(values, GGMLType.Q8_0), values.shape)
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(tensor, torch.float32)
        return QuantizedLinear(tensor, module.bias)

    replace_linears(model, lambda name, _: name in names, packed)
    assert base_kind(model) == "Q8_0"
    adapt(model, targets=("q", "head") if head else ("q",))
    adapted = logits(model)
    report = merge_adapter(model, "default")
    assert report.base == "dequantised Q8_0"
    assert close(logits(model), adapted)
    assert is_plain(model)
    assert (model.head.weight is model.embedding.weight) == (not head)
    assert set(make_model().state_dict()) == set(model.state_dict())


def test_the_dtype_of_the_base_is_kept() -> None:
    model = make_model().to(torch.bfloat16)
    adapt(model)
    expected = make_model()
    expected.load_state_dict({n.replace(".base", ""): t for n, t in model.state_dict().items() if "adapters" not in n})
    merge_adapter(model, "default")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
    name = "trunk.layers.0.attention.q.weight"
    assert not torch.equal(model.state_dict()[name].float(), expected.state_dict()[name])


def test_what_fewer_bits_cost() -> None:
    small, large = make_model(), make_model()
    adapt(small, size=0.03)
    adapt(large, size=0.6)
    assert update_lost(small, "default", "F16") < 0.1
    assert update_lost(large, "default", "F16") < 0.01
    lost = [update_lost(model, "default", kind) for model in (large, small) for kind in ("Q8_0", "Q4_0")]
    assert lost == sorted(lost)
    assert lost[0] < 0.05
    assert lost[-1] > 1  # nothing but noise is left of the smallest changes
    assert update_lost(large, "default", "Q4_0") == pytest.approx(by_hand(large, GGMLType.Q4_0), rel=1e-4)


def by_hand(model: CausalLM, type: GGMLType) -> float:
    def rounded(values: Tensor) -> np.ndarray:
        return dequantize(quantize(values.numpy(), type), type)

    errors, updates = [], []
    for layer in lora_layers(model).values():
        weight, part = layer.base.weight.detach(), layer.adapters["default"]
        update = (part.b @ part.a).detach() * part.scale
        errors.append(rounded(weight + update) - rounded(weight) - update.numpy())
        updates.append(update.numpy())
    return float(np.sqrt(sum((e**2).sum() for e in errors) / sum((u**2).sum() for u in updates)))


def test_an_adapter_that_changes_nothing_loses_nothing() -> None:
    model = make_model()
    apply_lora(model, LoraSettings(rank=2))
    assert update_lost(model, "default", "Q4_0") == 0
