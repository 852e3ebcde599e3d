"""`craton show`: what a model is."""

from __future__ import annotations

import math
from typing import Annotated, Any

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, size, stdout


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

    stored = store.find(name)
    checkpoint = Checkpoint.open(stored.path)
    trunk, heads = checkpoint.config.trunk, checkpoint.config.trunk.layers[0].attention
    tokenizer = checkpoint.tokenizer()
    pooling = checkpoint.pooling
    return {
        "model": stored.id,
        "architecture": f"{checkpoint.hf['architectures'][0]} (family {checkpoint.family.name})",
        "parameters": sum(math.prod(shape) for shape in checkpoint.source.shapes.values()),
        "layers": len(trunk.layers),
        "width": trunk.width,
        "heads": f"{heads.heads} query, {heads.kv_heads} key-value, {heads.head_size} wide",
        "vocabulary": checkpoint.config.vocab,
        "context": checkpoint.config.context,
        "format": ", ".join(sorted(checkpoint.quantized_kinds())) or checkpoint.stored_kind(),
        "bytes": stored.size or None,
        "licence": stored.licence,
        "pooling": pooling.model_dump() if pooling else None,
        "template": tokenizer.chat_template,
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
    if key == "parents":
        return ", ".join(f"{p['relation']} {p['name']}" for p in value)
    return str(value)
