"""`craton show`: what a model is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, size, stdout

if TYPE_CHECKING:
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.store import StoredModel


def show(model: Annotated[str, Parameter(help="a name or a path")], /, *, json: Json = False) -> None:
    """Show a model's architecture, parameters, size, format, context, licence, chat template and lineage."""
    facts = _facts(model)
    if json:
        print_json(facts)
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        table.add_row(key.replace("_", " "), _text(key, value))
    stdout.print(table, markup=False)


def _facts(name: str) -> dict[str, Any]:
    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.checkpoints.sources import SourceKind
    from craton.models import TextModelConfig

    stored = store.find(name)
    if stored.kind in (SourceKind.PROMPT, SourceKind.APPLICATION):
        return _made_facts(stored)
    if (stored.path / "adapter_config.json").is_file():
        return _adapter_facts(stored)
    checkpoint = Checkpoint.open(stored.path)
    trunk, heads = checkpoint.config.trunk, checkpoint.config.trunk.layers[0].attention
    pooling = checkpoint.pooling
    return {
        "model": stored.id,
        "architecture": f"{checkpoint.hf['architectures'][0]} (family {checkpoint.family.name})",
        "parameters": sum(math.prod(shape) for shape in checkpoint.source.shapes.values()),
        "layers": len(trunk.layers),
        "width": trunk.width,
        "heads": f"{heads.heads} query, {heads.kv_heads} key-value, {heads.head_size} wide",
        **_senses(checkpoint),
        "format": ", ".join(sorted(checkpoint.quantized_kinds())) or checkpoint.stored_kind(),
        "bytes": stored.size or None,
        "licence": stored.licence,
        "pooling": pooling.model_dump() if pooling else None,
        "template": checkpoint.tokenizer().chat_template if isinstance(checkpoint.config, TextModelConfig) else None,
        "source": stored.source,
        "location": str(stored.path),
        "parents": [{"relation": p.relation, "name": p.name} for p in stored.parents],
    }


def _senses(checkpoint: Checkpoint) -> dict[str, Any]:
    """What it reads: tokens of a text, pictures, or both."""
    from craton.models import (
        DualEncoderConfig,
        ImageClassifierConfig,
        SegmenterConfig,
        TextModelConfig,
        VisionConfig,
    )

    config = checkpoint.config
    facts: dict[str, Any] = {}
    if isinstance(config, TextModelConfig | DualEncoderConfig):
        facts = {"vocabulary": config.vocab, "context": config.context}
    if isinstance(config, DualEncoderConfig | SegmenterConfig):
        vision: VisionConfig | None = config.vision
    else:
        vision = config.backbone if isinstance(config, ImageClassifierConfig) else None
        vision = config if isinstance(config, VisionConfig) else vision
    if vision is not None:
        facts["pictures"] = f"{vision.image[0]} x {vision.image[1]} pixels, patches of {vision.patch}"
    if isinstance(config, ImageClassifierConfig):
        facts["labels"] = ", ".join(config.labels)
    return facts


def _made_facts(stored: StoredModel) -> dict[str, Any]:
    """What a prompt or an application is: its file, whole."""
    from craton.store.artifacts import MARKS

    return {
        "model": stored.id,
        "kind": str(stored.kind),
        "file": (stored.path / MARKS[stored.kind]).read_text(encoding="utf-8"),
        "bytes": stored.size,
        "source": stored.source,
        "location": str(stored.path),
        "parents": [{"relation": p.relation, "name": p.name} for p in stored.parents],
    }


def _adapter_facts(stored: StoredModel) -> dict[str, Any]:
    from craton.checkpoints.peft_reader import read_adapter_config
    from craton.checkpoints.safetensors import SafetensorsFile

    keys = read_adapter_config(stored.path)
    file = SafetensorsFile.open(stored.path / "adapter_model.safetensors")
    values = keys.values
    return {
        "model": stored.id,
        "adapter_of": stored.base or values.get("base_model_name_or_path"),
        "method": "DoRA" if values.get("use_dora") else str(values["peft_type"]),
        "rank": values.get("r"),
        "alpha": values.get("lora_alpha"),
        "targets": values.get("target_modules"),
        "parameters": sum(math.prod(info.shape) for info in file.tensors.values()),
        "bytes": stored.size or None,
        "licence": stored.licence,
        "source": stored.source,
        "location": str(stored.path),
        "parents": [{"relation": p.relation, "name": p.name} for p in stored.parents],
    }


def _text(key: str, value: Any) -> str:
    if value is None or value == []:
        return "none" if key in ("template", "parents", "pooling") else "not recorded"
    if key == "parameters":
        return f"{value / 1e6:.1f} million"
    if key == "bytes":
        return size(value)
    if key == "template":
        first = value.strip().splitlines()[0]
        return f"{first[:60]}… ({len(value)} characters)"
    if key == "pooling":
        return f"{value['mode']}" + (", normalised" if value["normalise"] else "")
    if key == "targets":
        return ", ".join(value) if isinstance(value, list) else str(value)
    if key == "parents":
        return ", ".join(f"{p['relation']} {p['name']}" for p in value)
    return str(value)
