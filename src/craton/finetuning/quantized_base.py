"""Frozen linear layers of 4 bits, or of a checkpoint's own blocks, whose gradients flow on to the adapters.

A product dequantises its weight for the moment in which it multiplies, forwards and again backwards; autograd never
keeps the numbers, so a layer costs the memory of its bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.checkpoints.weights import QuantizedLinear
from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import select_linears
from craton.trunk import replace_linears

QuantizedKind = Literal["nf4", "nf4-double", "int4", "int4-minmax"]

SCALES_PER_BLOCK: Final = 256  # of double quantisation


@dataclass(frozen=True)
class Code:
    """16 rising levels for the values of a block, once they are divided by its scale (and its minimum was taken off).

    scale: the largest magnitude; the value of the largest magnitude by the lowest level, so that its sign decides which
    side has the level more; or the range by the 15 steps between the levels, from the block's minimum on.
    double: scales are stored as 8-bit numbers around their mean, with a scale of their own for every 256.
    """

    levels: tuple[float, ...]
    block: int
    scale: Literal["largest", "signed", "range"]
    double: bool = False


@cache
def normal_float_levels() -> tuple[float, ...]:
    """NF4: quantiles of a normal distribution, 8 up to zero and 9 from it on, scaled to [-1, 1]; zero is exact.
    QLoRA, Dettmers 2023, arXiv 2305.14314, section 3 and appendix E."""
    furthest = 1 - (1 / 32 + 1 / 30) / 2  # of the probability, the mean of the halves of 1 / 16 and 1 / 15
    positive = torch.special.ndtri(torch.linspace(furthest, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(furthest, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((positive, torch.zeros(1, dtype=torch.float64), negative)).sort().values
    return tuple((levels / levels.abs().max()).tolist())


def code_of(kind: str) -> Code:
    """The code of `kind`. Raises UnknownName."""
    codes: Mapping[str, Code] = {
        "nf4": Code(normal_float_levels(), block=64, scale="largest"),
        "nf4-double": Code(normal_float_levels(), block=64, scale="largest", double=True),
        "int4": Code(tuple(range(-8, 8)), block=32, scale="signed"),
        "int4-minmax": Code(tuple(range(16)), block=32, scale="range"),
    }
    if kind not in codes:
        raise UnknownName("kind of 4-bit weights", kind, codes)
    return codes[kind]


class QuantizedBaseLinear(nn.Module):
    """A frozen linear layer of 4-bit weights. x[..., in] -> [..., out] in x's dtype; gradients reach x only.

    packed: uint8, two codes a byte, the first in the low half. scales, minima: one for each block of the flat weight.
    """

    packed: Tensor
    pairs: Tensor
    scales: Tensor
    scale_steps: Tensor
    scale_mean: Tensor
    minima: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, kind: QuantizedKind) -> None:
        super().__init__()
        self.kind, self.code = kind, code_of(kind)
        self.out_features, self.in_features = weight_OI.shape
        self.bias = nn.Parameter(bias_O.detach(), requires_grad=False) if bias_O is not None else None
        flat = weight_OI.detach().float().flatten()
        values_NK = F.pad(flat, (0, -len(flat) % self.code.block)).view(-1, self.code.block)
        self._store_scales(values_NK)
        # The codes are those that are nearest with the scales as they are stored.
        scales_N = self._scales()
        shifted_NK = values_NK if self.minima is None else values_NK - self.minima.float()[:, None]
        scaled_NK = shifted_NK / torch.where(scales_N == 0, 1.0, scales_N)[:, None]
        levels = torch.tensor(self.code.levels, dtype=torch.float32, device=weight_OI.device)
        codes_NK = torch.bucketize(scaled_NK, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
        self.register_buffer("packed", codes_NK[:, ::2].flatten() | codes_NK[:, 1::2].flatten() << 4)
        # The two values of every byte, so that unpacking is one look-up.
        pairs = torch.stack((levels.repeat(16), levels.repeat_interleave(16)), 1)
        self.register_buffer("pairs", pairs, persistent=False)

    def _store_scales(self, values_NK: Tensor) -> None:
        lows_N, highs_N = values_NK.aminmax(dim=1)
        minima_N = None
        if self.code.scale == "largest":
            scales_N = torch.maximum(-lows_N, highs_N)
        elif self.code.scale == "signed":
            scales_N = (torch.where(-lows_N > highs_N, lows_N, highs_N) / self.code.levels[0]).half()
        else:
            scales_N, minima_N = ((highs_N - lows_N) / 15).half(), lows_N.half()
        self.register_buffer("minima", minima_N)
        if self.code.double:
            mean = scales_N.mean()
            around_MK = F.pad(scales_N - mean, (0, -len(scales_N) % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
            steps_M = around_MK.abs().amax(1) / 127
            codes_MK = (around_MK / torch.where(steps_M == 0, 1.0, steps_M)[:, None]).round().to(torch.int8)
            self.register_buffer("scale_steps", steps_M)
            self.register_buffer("scale_mean", mean)
            scales_N = codes_MK.flatten()[: len(scales_N)].clone()
        self.register_buffer("scales", scales_N)

    def _scales(self) -> Tensor:
        scales_N = self.scales.float()
        if self.code.double:
            steps_N = self.scale_steps.repeat_interleave(SCALES_PER_BLOCK)[: len(scales_N)]
            scales_N = scales_N * steps_N + self.scale_mean
        return scales_N

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [out, in]; computed in fp32."""
        values_NK = self.pairs.index_select(0, self.packed.int()).view(-1, self.code.block)
        values_NK *= self._scales()[:, None]
        if self.minima is not None:
            values_NK += self.minima.float()[:, None]
        size = self.out_features * self.in_features
        return values_NK.flatten()[:size].view(self.out_features, self.in_features).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self, self.bias)


class BlocksLinear(QuantizedLinear):
    """A checkpoint's own blocks (Q4_0, Q4_1, Q8_0 ...) as a frozen base that gradients pass through."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights as numbers, [out, in]."""
        return self.quantized.dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return _product(x, self, self.bias)


class _Dequantizes(Protocol):
    def dequantize(self, dtype: torch.dtype) -> Tensor: ...


def _product(x: Tensor, layer: _Dequantizes, bias: Tensor | None) -> Tensor:
    y: Tensor = _FrozenProduct.apply(x, layer)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(x.dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W^T for a weight that is made anew in each direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _Dequantizes) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad_y,) = grads
        return grad_y @ ctx.layer.dequantize(grad_y.dtype), None


def quantize_base(model: nn.Module, kind: QuantizedKind) -> dict[str, float]:
    """Put 4-bit layers in the place of the trunk's linear layers, routers excepted; embedding and head stay.

    Returns, by layer, the relative error that it cost: |W - W4| / |W| (Frobenius).
    Raises UsageError for a model that is block-quantised already, UnknownName for an unknown kind.
    """
    code_of(kind)
    errors: dict[str, float] = {}

    def make(name: str, layer: nn.Module) -> nn.Module:
        weight = dense_weight(layer)
        quantized = QuantizedBaseLinear(weight, layer.bias, kind)  # type: ignore[arg-type]
        errors[name] = float((quantized.dequantize() - weight).norm() / weight.norm().clamp_min(1e-30))
        return quantized

    names = [name for name, module in model.named_modules() if is_linear(module)]
    chosen = set(select_linears(["all"], names))
    packed = [name for name in chosen if not isinstance(model.get_submodule(name), nn.Linear)]
    if packed:
        raise UsageError(
            f"{min(packed)!r} holds no plain weight to quantise",
            remedy="load the model in float32, or train on the blocks that it is stored in",
        )
    replace_linears(model, lambda name, _: name in chosen, make)
    return errors


def keep_blocks(model: nn.Module) -> list[str]:
    """Prepare a model that keeps its checkpoint's blocks for training adapters; give the names of those layers."""
    return replace_linears(
        model,
        lambda _, module: type(module) is QuantizedLinear,
        lambda _, layer: BlocksLinear(layer.quantized, layer.bias),  # type: ignore[arg-type]
    )


def base_kind(model: nn.Module) -> str | None:
    """How the frozen weights of the trunk are stored: "nf4", "Q4_0" ...; None where they are plain numbers."""
    for module in model.modules():
        if isinstance(module, QuantizedBaseLinear):
            return module.kind
        if isinstance(module, QuantizedLinear):
            return module.quantized.kind.name
    return None


def dense_weight(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight of a linear layer of any form as numbers, [out, in]."""
    if isinstance(layer, QuantizedBaseLinear):
        return layer.dequantize(dtype)
    if isinstance(layer, QuantizedLinear):
        return layer.quantized.dequantize(dtype)
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach().to(dtype)


def is_linear(module: nn.Module) -> bool:
    """Whether a module has the shape of a linear layer."""
    return isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
