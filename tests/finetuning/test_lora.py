"""Low-rank adapters: their arithmetic, their gradients, and that the base stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import (
    LoraLinear,
    LowRank,
    adapter_names,
    adapter_parameters,
    apply_lora,
    disabled,
    linear_layers,
    remove_adapter,
    use_adapter,
)
from craton.finetuning.quantized_base import QuantizedBaseLinear, dense_weight
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LayerConfig,
    Linear,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
)

VARIANTS = [{}, {"rslora": True}, {"dora": True}, {"dora": True, "rslora": True}]


def make_model(*, tied: bool = True, experts: bool = False) -> CausalLM:
    torch.manual_seed(0)
    dense = FeedForwardConfig(hidden=24, activation="silu", gated=True)
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=4, rotary=RotaryConfig(dims=4), bias=("q", "k")),
        feedforward=ExpertsConfig(count=4, per_token=2, expert=dense, shared=dense) if experts else dense,
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=layer.norm)
    return CausalLM(CausalLMConfig(vocab=50, context=64, trunk=trunk, tied=tied))


def logits(model: CausalLM) -> Tensor:
    ids_T = torch.arange(20) % 50
    return model(ids_T, torch.arange(20) % 12, torch.arange(20) // 12)


def move(model: nn.Module, name: str | None = None, seed: int = 1) -> None:
    """As if the adapter had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in adapter_parameters(model, name).items():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(parameter * (1 + 0.2 * noise) if key.endswith("magnitude") else 0.3 * noise)


def bases() -> dict[str, Callable[[], nn.Module]]:
    torch.manual_seed(3)
    linear = Linear(12, 8)
    return {
        "plain": lambda: linear,
        "no bias": lambda: Linear(12, 8, bias=False),
        "nf4": lambda: QuantizedBaseLinear(linear.weight, linear.bias, "nf4"),
    }


def layer_of(base: nn.Module, dtype: torch.dtype = torch.float32, **settings: Any) -> LoraLinear:
    layer = LoraLinear(base)
    layer.adapters["default"] = LowRank.fresh(base, LoraSettings(rank=3, alpha=6, **settings))
    layer.active = "default"
    move(layer)
    return layer.to(dtype)


@pytest.mark.parametrize("base", bases())
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_is_that_of_the_paper_s_weight(base: str, variant: dict[str, bool]) -> None:
    layer = layer_of(bases()[base](), **variant)
    adapter, weight_OI = layer.adapters["default"], dense_weight(layer.base)
    changed_OI = weight_OI + adapter.b @ adapter.a * (6 / (3**0.5 if variant.get("rslora") else 3))
    if variant.get("dora"):
        assert torch.allclose(adapter.row_norms(layer.base), changed_OI.norm(dim=1))
        changed_OI = adapter.magnitude[:, None] * changed_OI / changed_OI.norm(dim=1, keepdim=True)
    x_TI = torch.randn(5, 12)
    assert torch.allclose(layer(x_TI), F.linear(x_TI, changed_OI, layer.base.bias), atol=1e-5)
    assert torch.allclose(adapter.merged(weight_OI), changed_OI, atol=1e-5)


@pytest.mark.parametrize("base", bases())
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients(base: str, variant: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(bases()[base](), torch.float64, **variant)
    parameters = adapter_parameters(nn.ModuleDict({"layer": layer}))
    names = [name.removeprefix("layer.") for name in parameters]
    values = [parameter.detach().clone().requires_grad_() for parameter in parameters.values()]
    x_TI = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def output(x_TI: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, tensors, strict=True)), x_TI)

    real = torch.autograd.grad(output(x_TI, *values).square().sum(), [x_TI, *values])
    # DoRA takes the norm as a constant, so the differences that gradients are checked by must do so, too.
    norms_O = layer.adapters["default"].row_norms(layer.base) if variant.get("dora") else None
    monkeypatch.setattr(LowRank, "row_norms", lambda self, base: norms_O)
    assert torch.autograd.gradcheck(output, [x_TI, *values])
    constant = torch.autograd.grad(output(x_TI, *values).square().sum(), [x_TI, *values])
    assert all(torch.equal(a, b) for a, b in zip(real, constant, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fresh_adapter_changes_nothing(variant: dict[str, bool]) -> None:
    model = make_model()
    before = logits(model)
    names = apply_lora(model, LoraSettings(rank=4, **variant))
    assert len(names) == 2 * 7
    assert torch.allclose(logits(model), before, atol=1e-6)
    assert torch.equal(logits(model), before) or variant.get("dora")


def test_adapters_start_from_the_seed_in_the_model_s_order() -> None:
    model = make_model()
    torch.manual_seed(7)
    names = apply_lora(model, LoraSettings(rank=4))
    torch.manual_seed(7)
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, LoraLinear)
        bound = layer.base.in_features**-0.5
        assert torch.equal(layer.adapters["default"].a, torch.empty(4, layer.base.in_features).uniform_(-bound, bound))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_training_moves_the_adapter_alone(dtype: torch.dtype, experts: bool) -> None:
    model = make_model(experts=experts)
    model.compute_dtype = dtype
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    apply_lora(model, LoraSettings(rank=4, dora=dtype == torch.bfloat16))
    move(model)
    parameters = adapter_parameters(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(parameters)
    optimiser = torch.optim.SGD(parameters.values(), lr=0.1)
    output = logits(model)
    assert output.dtype == dtype
    output.float().square().mean().backward()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name
        assert experts or parameter.grad.any(), name
    optimiser.step()
    remove_adapter(model, "default")
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_dropout_is_on_the_adapter_s_path_alone() -> None:
    model = make_model().train()
    before = logits(model)
    apply_lora(model, LoraSettings(rank=4, dropout=0.5))
    assert torch.equal(logits(model), before)  # B is zero: whatever is dropped, the base is whole
    move(model)
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_several_adapters_on_one_base() -> None:
    model = make_model()
    base = logits(model)
    apply_lora(model, LoraSettings(rank=4, targets=("q,v",)), "one")
    move(model)
    one = logits(model)
    apply_lora(model, LoraSettings(rank=2, targets=("v", "mlp"), dora=True), "two")
    assert torch.allclose(logits(model), base, atol=1e-6)
    move(model)
    two = logits(model)
    assert adapter_names(model) == ["one", "two"]
    assert all(".two." in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    use_adapter(model, "one")
    assert torch.equal(logits(model), one)
    assert set(adapter_parameters(model)) == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not torch.equal(one, two)
    use_adapter(model, None)
    assert torch.equal(logits(model), base)
    remove_adapter(model, "one")
    use_adapter(model, "two")
    assert torch.equal(logits(model), two)
    with pytest.raises(UnknownName, match="'one'"):
        use_adapter(model, "one")
    with pytest.raises(UnknownName, match="'one'"):
        remove_adapter(model, "one")


def test_disabled_is_the_base_and_ends_whatever_happens() -> None:
    model = make_model()
    base = logits(model)
    apply_lora(model, LoraSettings(rank=4))
    move(model)
    adapted = logits(model)
    with disabled(model):
        assert torch.equal(logits(model), base)
        with disabled(model):
            pass
        assert torch.equal(logits(model), base)
    with pytest.raises(ZeroDivisionError), disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)
    assert all(parameter.requires_grad for parameter in adapter_parameters(model).values())


def test_a_tied_head_is_adapted_without_the_embedding() -> None:
    model = make_model(tied=True)
    ids_T, positions_T = torch.arange(8), torch.arange(8)
    hidden, before = model.hidden(ids_T, positions_T), logits(model)
    assert apply_lora(model, LoraSettings(rank=4, targets=("head",))) == ["head"]
    move(model)
    assert torch.equal(model.hidden(ids_T, positions_T), hidden)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    assert not model.embedding.weight.requires_grad
    with pytest.raises(AttributeError):
        _ = model.head.weight  # whoever reads a head's weight past its adapter shall notice


def test_dora_on_rows_of_zeros() -> None:
    base = Linear(12, 8, bias=False)
    base.weight.data[3] = 0.0  # the place of a token that never was
    part = LowRank.fresh(base, LoraSettings(rank=2, dora=True))
    x_TI = torch.randn(4, 12)
    assert torch.allclose(part(x_TI, base(x_TI), base), base(x_TI), atol=1e-6)
    assert torch.allclose(part.merged(base.weight.detach()), base.weight, atol=1e-6)


def test_names_that_cannot_be() -> None:
    model = make_model()
    for name in ("", "a.b", "a b"):
        with pytest.raises(UsageError, match="cannot be an adapter's name"):
            apply_lora(model, LoraSettings(rank=2), name)
    apply_lora(model, LoraSettings(rank=2))
    with pytest.raises(UsageError, match="already"):
        apply_lora(model, LoraSettings(rank=2))


def test_names_of_layers_stay_while_adapters_come_and_go() -> None:
    model = make_model(experts=True)
    names = linear_layers(model)
    apply_lora(model, LoraSettings(rank=2))
    assert linear_layers(model) == names
    remove_adapter(model, "default")
    assert linear_layers(model) == names
    assert all(type(model.get_submodule(name)) is Linear for name in names)


def test_the_adapter_survives_a_round_through_its_state() -> None:
    model, other = make_model(), make_model()
    for each in (model, other):
        apply_lora(each, LoraSettings(rank=4, dora=True))
    move(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
