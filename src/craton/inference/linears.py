"""Fast stand-ins for a model's linear layers, put in place once when it is loaded for inference."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.gguf.quantize import quantize
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from craton.inference import native
from craton.inference.native.arena import gather
from craton.models import CausalLM
from craton.trunk import replace_linears
from craton.trunk.attention import Attention
from craton.trunk.feedforward import FeedForward

# The block formats that the native kernels multiply as they are.
PACKED_KINDS = frozenset({"Q4_0", "Q4_1", "Q8_0"})


# Up to so many rows, activations keep about 15 bits: there the weights' bytes decide the time, or nearly. A longer
# piece of a prompt keeps 8 bits, as is usual for packed weights, because its arithmetic would take twice as long.
EXACT_ROWS = 64


class PackedLinear(nn.Module):
    """A linear layer over packed 4- or 8-bit weights, by the native kernel. x[T, in] -> [T, out].

    parts: int8 numbers for each input of few rows: 2 keep about 15 bits, 1 keeps 8 (see `EngineSettings.activations`).
    tiles: more than EXACT_ROWS rows are multiplied in bfloat16 instead, on the CPU's matrix unit (AMX).
    """

    def __init__(
        self, weight: native.PackedWeight, bias: Tensor | None = None, *, parts: int = 2, tiles: bool = False
    ) -> None:
        super().__init__()
        self.packed, self.bias, self.parts, self.tiles = weight, bias, parts, tiles

    def forward(self, x_TD: Tensor) -> Tensor:
        parts = self.parts if len(x_TD) <= EXACT_ROWS else 0 if self.tiles else 1
        return native.linear(x_TD, self.packed, self.bias, parts=parts)


class PackedEmbedding(nn.Module):
    """A token embedding over packed rows, which it may share with the head."""

    def __init__(self, weight: native.PackedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed, self.dtype = weight, dtype

    def forward(self, ids_T: Tensor) -> Tensor:
        return native.rows(self.packed, ids_T, self.dtype)


class PrepackedLinear(nn.Module):
    """A bfloat16 linear layer whose weight lies in oneDNN's own order: the plain order costs half the speed at the few
    rows of decoding, because it is reordered at every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self.bias = bias

    def forward(self, x_TD: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.weight, self.bias, "none", [], "")


def prepare(
    model: nn.Module,
    *,
    prepack: bool,
    tiles: bool,
    release: Callable[[], None],
    parts: int = 2,
    pack_ends: bool = False,
) -> None:
    """Join q/k/v and gate/up into one product each and give every linear layer its fastest form, in place.

    Packed weights go to the native kernel (`parts` and `tiles`: see `PackedLinear`), with `prepack` bfloat16 ones to
    oneDNN's order. release: called after each layer, to give back the memory of weights that were copied from a mapped
    file. pack_ends: a language model's plain embedding and head are rounded to 8 bits, 32 weights to a scale, so that a
    token can be one call of the kernels; they are a large part of a small model, and read in whole for each token.
    """
    if pack_ends and isinstance(model, CausalLM):
        _quantize_ends(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = _join([module.q, module.k, module.v], prepack, tiles, parts)
            if module.fused is not None:
                del module.q, module.k, module.v
        elif isinstance(module, FeedForward) and module.gate is not None:
            module.fused = _join([module.gate, module.up], prepack, tiles, parts)
            if module.fused is not None:
                del module.gate, module.up
        else:
            continue
        release()
    shared: dict[int, native.PackedWeight] = {}  # a tied head and embedding pack the same blocks once

    def make(name: str, module: nn.Module) -> nn.Module:
        fast = fastest(module)
        release()
        return fast

    def fastest(module: nn.Module) -> nn.Module:
        if isinstance(module, QuantizedEmbedding):
            return PackedEmbedding(_packed(module.quantized, shared), module.dtype)
        if isinstance(module, QuantizedLinear):
            return PackedLinear(_packed(module.quantized, shared), module.bias, parts=parts, tiles=tiles)
        return PrepackedLinear(module.weight, module.bias)  # type: ignore[arg-type]

    def where(name: str, module: nn.Module) -> bool:
        if isinstance(module, QuantizedEmbedding | QuantizedLinear):
            return module.quantized.kind.name in PACKED_KINDS
        return prepack and isinstance(module, nn.Linear) and not name.endswith("router")

    replace_linears(model, where, make)
    gather(list({id(w): w for w in _packed_weights(model)}.values()))
    gc.collect()  # the unjoined weights are garbage now, and they are as large as the model


def _quantize_ends(model: CausalLM) -> None:
    """Plain ends become quantised ones, a tied pair the same blocks; those whose rows are not whole blocks stay."""
    blocks: dict[int, QuantizedTensor] = {}

    def quantized(weight_VD: Tensor) -> QuantizedTensor:
        key = weight_VD.data_ptr()
        if key not in blocks:
            kind = GGMLType.Q8_0
            numbers = weight_VD.detach().float().numpy()
            blocks[key] = QuantizedTensor(kind, quantize(numbers, kind).reshape(len(numbers), -1), numbers.shape)
        return blocks[key]

    if model.config.trunk.width % native.GROUP:
        return
    head, embedding = model.head, model.embedding
    if isinstance(head, nn.Linear):
        model.head = QuantizedLinear(quantized(head.weight), head.bias)  # type: ignore[assignment]
    if isinstance(embedding, nn.Embedding):
        packed = QuantizedEmbedding(quantized(embedding.weight), embedding.weight.dtype)
        model.embedding = packed  # type: ignore[assignment]


def _packed_weights(model: nn.Module) -> Iterator[native.PackedWeight]:
    for module in model.modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            yield module.packed


def _packed(weight: QuantizedTensor, shared: dict[int, native.PackedWeight]) -> native.PackedWeight:
    key = weight.blocks.__array_interface__["data"][0]
    if key not in shared:
        shared[key] = _pack([weight])
    return shared[key]


def _pack(weights: list[QuantizedTensor]) -> native.PackedWeight:
    # The blocks lie in a read-only map of the file, which torch will not share; joining copies them.
    blocks = np.concatenate([weight.blocks for weight in weights])
    return native.PackedWeight.from_gguf_blocks(weights[0].kind.name, torch.from_numpy(blocks))


def _join(layers: list[nn.Module], prepack: bool, tiles: bool, parts: int) -> nn.Module | None:
    # One product over the joined rows; None where they are not of one kind.
    quantized = [part for part in layers if isinstance(part, QuantizedLinear)]
    plain = [part for part in layers if isinstance(part, nn.Linear)]
    found: list[Tensor | None] = [*(part.bias for part in quantized), *(part.bias for part in plain)]
    biases = [bias for bias in found if bias is not None]
    if len(biases) not in (0, len(layers)):
        return None
    bias = torch.cat(biases) if biases else None
    if len(quantized) == len(layers):
        weights = [part.quantized for part in quantized]
        if len({weight.kind for weight in weights}) > 1 or weights[0].kind.name not in PACKED_KINDS:
            return None
        return PackedLinear(_pack(weights), bias, parts=parts, tiles=tiles)
    if len(plain) < len(layers):
        return None
    weight = torch.cat([part.weight for part in plain])
    if prepack:
        return PrepackedLinear(weight, bias)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
