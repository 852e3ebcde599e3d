"""How a sentence encoder makes one vector of a text: the sentence-transformers files beside the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from craton.config import parse
from craton.errors import CheckpointError, FileFormatError
from craton.models import PoolingConfig

MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def read_pooling(folder: Path) -> PoolingConfig | None:
    """What modules.json and the files that it names say; None where there is no modules.json.

    Raises CheckpointError for a module or a pooling mode that we do not do: leaving it out would change every vector.
    """
    modules_file = folder / "modules.json"
    if not modules_file.exists():
        return None
    fields: dict[str, Any] = {"normalise": False}
    for module in _read(modules_file, list):
        kind, path = str(module.get("type", "")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Pooling":
            fields["mode"] = _mode(folder / path / "config.json")
        elif kind == "Normalize":
            fields["normalise"] = True
        elif kind != "Transformer":
            raise CheckpointError(f"unsupported sentence-transformers module {kind!r}", where=str(modules_file))
    limits = folder / "sentence_bert_config.json"
    if limits.exists() and isinstance(limit := _read(limits, dict).get("max_seq_length"), int) and limit > 0:
        fields["max_tokens"] = limit
    return parse(PoolingConfig, fields, where=str(modules_file))


def _mode(path: Path) -> str:
    values = _read(path, dict)
    if isinstance(named := values.get("pooling_mode"), str):  # the newer spelling: one name
        named = {"lasttoken": "last"}.get(named, named)
        if named in MODES.values():
            return named
        raise CheckpointError(f"unsupported pooling {named!r}", where=str(path))
    chosen = [key for key, value in values.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in MODES:
        raise CheckpointError(
            f"unsupported pooling {', '.join(chosen) or 'of no kind'}",
            where=str(path),
            remedy=f"supported: {', '.join(MODES.values())}",
        )
    return MODES[chosen[0]]


def _read(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    if not isinstance(value, kind):
        raise FileFormatError(f"{path.name} must hold a JSON {kind.__name__}", where=str(path))
    return value
