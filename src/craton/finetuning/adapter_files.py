"""Adapters between a model of ours and PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import nn

from craton.checkpoints.families.family import Family
from craton.checkpoints.peft import PeftAdapter, peft_form, write_peft
from craton.checkpoints.peft_modules import LowRankUpdate
from craton.checkpoints.peft_reader import read_peft
from craton.errors import CheckpointError, UsageError
from craton.finetuning.adapters import DEFAULT_ADAPTER
from craton.finetuning.lora import LowRank, adapter_names, adapters_of, add_adapters, device_of, linear_layers
from craton.finetuning.quantized_base import base_kind, dense_weight
from craton.models import AnyModel, CausalLM, Classifier, Encoder, ImageClassifier

# What a model is trained for, in PEFT's words, where its class says so.
Task = Literal["CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION"]

# What has a head that is trained in full beside its adapter.
Heads = Classifier | ImageClassifier

TASKS: Mapping[type[nn.Module], Task] = {
    CausalLM: "CAUSAL_LM",
    Classifier: "SEQ_CLS",
    Encoder: "FEATURE_EXTRACTION",
}

# The largest relative difference at which two copies of a base's weights are one, stored in unlike ways (4 bits: 0.1).
SAME_WEIGHTS = 0.2


def save_adapter(
    model: AnyModel,
    family: Family,
    folder: str | Path,
    name: str = DEFAULT_ADAPTER,
    *,
    base: str | None = None,
    task: Task | None = None,
) -> Path:
    """Write adapter `name` of `model` as PEFT's files, with a classifier's head beside it.

    base: how to find what it was trained on ("hf:org/name", a stored name, a path). task: by the model's class, unless
    it is given (a language model that was trained to embed texts: FEATURE_EXTRACTION, for its `Embedder.backbone`).
    Raises UnknownName for another name, CheckpointError for what PEFT's files cannot say, StoreError.
    """
    return write_peft(_adapter(model, name, base, task), family, model.config, _shapes(model), folder)


def check_saveable(model: AnyModel, family: Family, name: str = DEFAULT_ADAPTER) -> None:
    """Refuse an adapter that `save_adapter` would refuse, before it is trained. Raises CheckpointError."""
    peft_form(_adapter(model, name), family, model.config, _shapes(model))
    family.write_config(model.config)  # a head without a published layout


def _adapter(model: AnyModel, name: str, base: str | None = None, task: Task | None = None) -> PeftAdapter:
    parts = adapters_of(model, name)
    first = next(iter(parts.values()))
    head = {key: tensor.detach() for key, tensor in model.head_parameters()} if isinstance(model, Heads) else {}
    return PeftAdapter(
        updates={layer: _update(part) for layer, part in parts.items()},
        rslora=first.rslora,
        dropout=first.dropout,
        task=task or TASKS.get(type(model)),
        base=base,
        base_weights=base_kind(model),
        head=head,
    )


def load_adapter(model: AnyModel, family: Family, folder: str | Path, name: str = DEFAULT_ADAPTER) -> PeftAdapter:
    """Put the adapter in `folder` on `model` under `name` and make it the active one; give what its files say.

    Everything else of the model is frozen; a classifier's head is loaded, too, and stays free.

    Raises UsageError where there is no adapter or the name is taken, FileFormatError for pickles and damaged files,
    CheckpointError for an adapter of another kind or another base.
    """
    adapter = read_peft(folder, family, model.config, _shapes(model))
    for layer, copy in adapter.copies.items():
        weight = dense_weight(_base_layer(model, layer))
        if weight.shape != copy.shape or (weight - copy.float()).norm() > SAME_WEIGHTS * weight.norm():
            raise CheckpointError(
                f"the adapter's copy of the base's weight for {layer!r} is not this base's",
                where=str(folder),
                remedy="the adapter was trained on another base, or with a vocabulary of its own",
            )
    if adapter.head:
        assert isinstance(model, Heads)
        _check_head(model, adapter, Path(folder))
    add_adapters(model, name, list(adapter.updates), lambda layer, base: _low_rank(adapter, layer, base))
    model.load_state_dict(dict(adapter.head), strict=False)
    return adapter


def _check_head(model: Heads, adapter: PeftAdapter, folder: Path) -> None:
    if adapter_names(model):
        raise UsageError(
            "a classifier has one head, and it belongs to the adapter that is there already",
            where=str(folder),
            remedy="load this adapter on a model of its own",
        )
    for name, parameter in model.head_parameters():
        if name in adapter.head and adapter.head[name].shape != parameter.shape:
            raise CheckpointError(
                f"the adapter's {name} has shape {list(adapter.head[name].shape)}, the model's {list(parameter.shape)}",
                where=str(folder),
                remedy="make the classifier with the labels of the adapter",
            )


def _update(part: LowRank) -> LowRankUpdate:
    magnitude_O = part.magnitude.detach().float().cpu() if part.magnitude is not None else None
    return LowRankUpdate(part.a.detach().float().cpu(), part.b.detach().float().cpu(), part.alpha, magnitude_O)


def _low_rank(adapter: PeftAdapter, layer: str, base: nn.Module) -> LowRank:
    update = adapter.updates[layer]
    device = device_of(base)
    return LowRank(
        base,
        update.a.to(device),
        update.b.to(device),
        update.magnitude.to(device) if update.magnitude is not None else None,
        alpha=update.alpha,
        rslora=adapter.rslora,
        dropout=adapter.dropout,
    )


def _base_layer(model: nn.Module, layer: str) -> nn.Module:
    module = model.get_submodule(layer)
    return getattr(module, "base", module)


def _shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    layers = {name: model.get_submodule(name) for name in linear_layers(model)}
    return {name: (int(layer.out_features), int(layer.in_features)) for name, layer in layers.items()}  # type: ignore[arg-type]
