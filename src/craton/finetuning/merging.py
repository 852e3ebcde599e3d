"""Merging an adapter into its base: one plain model again that does what both did."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor, nn

from craton.checkpoints.gguf import GGMLType, dequantize, quantize
from craton.checkpoints.gguf_export import GGUFKind
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear
from craton.finetuning.lora import LoraLinear, adapters_of, lora_layers
from craton.finetuning.quantized_base import QuantizedBaseLinear, base_kind, dense_weight
from craton.models import CausalLM
from craton.trunk import Linear, replace_linears


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    layers: those that changed. base: what the updates were added to: "original" weights, or "dequantised nf4", which is
    what an adapter on such a base was trained with. untied: the head was the embedding and is now a matrix of its own.
    """

    layers: tuple[str, ...]
    base: str
    untied: bool


def merge_adapter(model: nn.Module, name: str) -> MergeReport:
    """Make `model` plain again, adapter `name` within its weights; other adapters are dropped.

    Computed in fp32 and kept in the dtype of the base's weights (quantised ones become fp32). bf16 rounds the smallest
    changes away, so load a base in fp32 for a merge. Where a head that is tied to the embedding was adapted, the two
    part and the model's config says so from then on; the embedding stays as it was.

    Raises UnknownName if there is no such adapter.
    """
    parts, kind = adapters_of(model, name), base_kind(model)
    inside = tuple(f"{path}." for path in lora_layers(model))
    tied = isinstance(model, CausalLM) and model.config.tied

    def wanted(path: str, module: nn.Module) -> bool:
        quantized = isinstance(module, QuantizedBaseLinear | QuantizedLinear)
        return isinstance(module, LoraLinear) or (quantized and not path.startswith(inside))

    def make(path: str, module: nn.Module) -> nn.Module:
        base = module.base if isinstance(module, LoraLinear) else module
        if path not in parts and isinstance(base, nn.Linear):
            return base
        dtype = base.weight.dtype if isinstance(base, nn.Linear) else torch.float32
        weight_OI = dense_weight(base)
        merged_OI = parts[path].merged(weight_OI) if path in parts else weight_OI
        return _linear(merged_OI.to(dtype), base.bias)  # type: ignore[arg-type]

    replace_linears(model, wanted, make)
    replace_linears(
        model,
        lambda _, module: isinstance(module, QuantizedEmbedding),
        lambda _, embedding: nn.Embedding.from_pretrained(embedding.quantized.dequantize()),  # type: ignore[operator]
    )
    untied = tied and "head" in parts
    if isinstance(model, CausalLM) and untied:
        model.config = model.config.model_copy(update={"tied": False})
    elif isinstance(model, CausalLM) and tied:
        model.head.weight = model.embedding.weight
    return MergeReport(tuple(parts), "original" if kind is None else f"dequantised {kind}", untied)


def update_lost(model: nn.Module, name: str, kind: GGUFKind) -> float:
    """How much of adapter `name` is lost where the merged weights are stored as `kind`, before it is merged:
    |Q(W + update) - Q(W) - update| / |update| over all its layers. 1 and more: nothing of it is left but noise."""
    lost, whole = 0.0, 0.0
    layers = lora_layers(model)
    for path, part in adapters_of(model, name).items():
        weight_OI = dense_weight(layers[path].base)
        update_OI = part.merged(weight_OI) - weight_OI
        # The head keeps more bits than the rest (see `save_gguf`).
        stored = GGMLType["Q8_0" if path == "head" and kind == "Q4_0" else kind]
        kept_OI = _rounded(weight_OI + update_OI, stored) - _rounded(weight_OI, stored)
        lost += float((kept_OI - update_OI).square().sum())
        whole += float(update_OI.square().sum())
    return sqrt(lost / whole) if whole else 0.0


def _rounded(weight_OI: Tensor, type: GGMLType) -> Tensor:
    if weight_OI.shape[1] % type.block_size:
        type = GGMLType.F16
    blocks = quantize(weight_OI.cpu().contiguous().numpy(), type)
    return torch.from_numpy(dequantize(blocks, type)).view(weight_OI.shape).to(weight_OI.device)


def _linear(weight_OI: Tensor, bias_O: nn.Parameter | None) -> Linear:
    outputs, inputs = weight_OI.shape
    linear = Linear(inputs, outputs, bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight_OI, requires_grad=False), bias_O  # type: ignore[assignment]
    return linear
