"""PEFT's adapters on disk, both ways: adapter_config.json and adapter_model.safetensors in a folder.

Format: the files that PEFT 0.21 writes and reads. Pickles (adapter_model.bin) are refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from craton.checkpoints.disk import disk_errors, replace_file
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.heads import head_names
from craton.checkpoints.peft_modules import (
    LowRankUpdate,
    Module,
    adaptable_modules,
    check_experts,
    in_task_class,
    join,
    shortest_targets,
    within_model,
)
from craton.checkpoints.safetensors import write_safetensors
from craton.errors import CheckpointError
from craton.models import ClassifierConfig, ImageClassifierConfig, ModelConfig

CONFIG_NAME: Final = "adapter_config.json"
WEIGHTS_NAME: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
# In the metadata of the weights, which PEFT leaves alone.
BASE_WEIGHTS_KEY: Final = "base_weights"
LABELS_KEY: Final = "labels"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter as its files hold it, under our names.

    updates: by linear layer. head: of a classifier, the tensors that were trained beside the base. base: what it was
    trained on, in the words of whoever did. base_weights: how the base's weights were stored then, where that is known
    ("nf4"). copies: weights of the base that came along with the adapter.
    """

    updates: Mapping[str, LowRankUpdate]
    rslora: bool = False
    dropout: float = 0.0
    task: str | None = None
    base: str | None = None
    base_weights: str | None = None
    head: Mapping[str, Tensor] = field(default_factory=dict)
    copies: Mapping[str, Tensor] = field(default_factory=dict)


def write_peft(
    adapter: PeftAdapter,
    family: Family,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, int]],
    folder: str | Path,
) -> Path:
    """Write `adapter` to `folder` (made if it is not there). shapes: [out, in] of each linear layer of the model.

    Raises CheckpointError for an adapter that PEFT has no form for, StoreError if the folder cannot be written.
    """
    folder = Path(folder)
    values, tensors = peft_form(adapter, family, config, shapes)
    with disk_errors(f"make the folder {folder.name}", folder):
        folder.mkdir(parents=True, exist_ok=True)
    metadata = {BASE_WEIGHTS_KEY: adapter.base_weights} if adapter.base_weights else {}
    if isinstance(config, ClassifierConfig | ImageClassifierConfig):
        metadata[LABELS_KEY] = json.dumps(config.labels, ensure_ascii=False)
    write_safetensors(folder / WEIGHTS_NAME, tensors, metadata)
    replace_file(folder / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False).encode())
    return folder


def peft_form(
    adapter: PeftAdapter, family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors that `write_peft` writes, with the same refusals."""
    modules = adaptable_modules(family, config, shapes)
    joined: dict[str, LowRankUpdate] = {}
    placed: set[str] = set()
    for module in modules.values():
        parts = {name: adapter.updates[name] for name in module.ours if name in adapter.updates}
        if parts:
            joined[module.path] = join(module, parts, rslora=adapter.rslora)
            placed |= set(parts)
    homeless = sorted(set(adapter.updates) - placed)
    if homeless:
        raise CheckpointError(f"{family.name} has no module that an adapter of {homeless[0]!r} could be saved for")
    check_experts(family, joined, modules, plain=not adapter.rslora and not adapter.dropout)
    tensors: dict[str, Tensor] = {}
    for path, update in joined.items():
        name = f"{PREFIX}{in_task_class(family, path, adapter.task)}"
        tensors |= {f"{name}.lora_A.weight": update.a, f"{name}.lora_B.weight": update.b}
        if update.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = update.magnitude
    names = head_names(family, config) if isinstance(config, ClassifierConfig | ImageClassifierConfig) else {}
    tensors |= {f"{PREFIX}{theirs}": adapter.head[ours] for theirs, ours in names.items()}
    return _config(adapter, family, joined, modules, names), tensors


def _config(
    adapter: PeftAdapter,
    family: Family,
    joined: Mapping[str, LowRankUpdate],
    modules: Mapping[str, Module],
    head: Iterable[str],
) -> dict[str, Any]:
    ranks = Counter(update.rank for update in joined.values())
    alphas = Counter(update.alpha for update in joined.values())
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    paths = {path: in_task_class(family, path, adapter.task) for path in joined}
    base, revision = adapter.base, None
    if base is not None and base.startswith("hf:"):
        base, _, revision = base.removeprefix("hf:").partition("@")
    return {
        "peft_type": "LORA",
        "task_type": adapter.task,
        "base_model_name_or_path": base,
        "revision": revision or None,
        "r": rank,
        "lora_alpha": _whole(alpha),
        "lora_dropout": adapter.dropout,
        "rank_pattern": {paths[p]: update.rank for p, update in joined.items() if update.rank != rank},
        "alpha_pattern": {paths[p]: _whole(update.alpha) for p, update in joined.items() if update.alpha != alpha},
        "target_modules": shortest_targets(joined, family, modules, adapter.task),
        "use_rslora": adapter.rslora,
        "use_dora": any(update.magnitude is not None for update in joined.values()),
        "fan_in_fan_out": any(modules[path].transposed for path in joined),
        "modules_to_save": sorted({within_model(family, name).partition(".")[0] for name in head}) or None,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
