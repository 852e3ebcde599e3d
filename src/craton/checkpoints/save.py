"""A model of ours back into a published layout: config.json and safetensors that transformers opens."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from craton.checkpoints.disk import disk_errors, replace_file
from craton.checkpoints.families.family import Family
from craton.checkpoints.safetensors import write_safetensors
from craton.errors import CheckpointError
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
    with disk_errors(f"make the folder {folder.name}", folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", theirs)
    replace_file(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n")
    return folder
