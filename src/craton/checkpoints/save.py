"""A model of ours back into a published layout: config.json and safetensors that transformers opens."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

import torch

from craton.checkpoints.families.family import Family
from craton.checkpoints.safetensors import write_safetensors
from craton.errors import CheckpointError, StoreError
from craton.models import AnyModel

HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save_checkpoint(model: AnyModel, family: Family, folder: str | Path) -> Path:
    """Write `model` to `folder` (made if it is not there) in Hugging Face's layout, under `family`'s names.

    The weights are written first and config.json last, so that an interrupted save is never taken for a model.
    Raises CheckpointError for a model whose weights are packed, StoreError if the folder cannot be written.
    """
    folder = Path(folder)
    ours = model.state_dict(keep_vars=False)
    theirs: dict[str, torch.Tensor] = {}
    for entry in family.entries(model.config):
        missing = [name for name in entry.ours if name not in ours]
        if missing:
            raise CheckpointError(
                f"{missing[0]!r} has no plain weight to save",
                remedy="load the checkpoint with a floating-point dtype (dtype='float32') and save that",
            )
        theirs |= zip(entry.theirs, entry.save([ours[name] for name in entry.ours]), strict=True)
    config = family.write_config(model.config)
    config["dtype"] = HF_DTYPES[next(iter(theirs.values())).dtype]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder cannot be made: {error.strerror}", where=str(folder)) from error
    write_safetensors(folder / "model.safetensors", theirs)
    _write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return folder


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StoreError(f"{path.name} could not be written: {error.strerror}", where=str(path)) from error
