"""A model of ours back into a published layout: config.json and safetensors that transformers opens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from craton.checkpoints.disk import disk_errors, replace_file
from craton.checkpoints.families.family import Family
from craton.checkpoints.names import Entry
from craton.checkpoints.pooling import MODES as POOLING_MODES
from craton.checkpoints.safetensors import write_safetensors
from craton.errors import CheckpointError
from craton.modalities.image import FILE_NAME, ImagePreprocessing, ImageSplitting
from craton.modalities.text import Tokenizer
from craton.models import AnyModel, PoolingConfig

# The second holds what a processor of texts and pictures together is told, or all of it.
PREPROCESSING_NAMES = (FILE_NAME, "processor_config.json")
HF_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def save_checkpoint(
    model: AnyModel,
    family: Family,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    pooling: PoolingConfig | None = None,
    preprocessing: ImagePreprocessing | ImageSplitting | None = None,
) -> Path:
    """Write `model` to `folder` (made if it is not there) in Hugging Face's layout, under `family`'s names.

    tokenizer: saved beside it, with its chat template. pooling: saved as sentence-transformers files. preprocessing: of
    the pictures that a model sees. The weights are written first and config.json last, so that an interrupted save is
    never taken for a model.

    Raises CheckpointError for a model whose weights are packed, StoreError if the folder cannot be written.
    """
    ours = model.state_dict(keep_vars=False)
    theirs: dict[str, torch.Tensor] = {}
    for entry in family.entries(model.config):
        theirs |= plain_tensors(entry, ours)
    config = family.write_config(model.config)
    config["dtype"] = HF_DTYPES[next(iter(theirs.values())).dtype]
    return write_folder(Path(folder), theirs, config, tokenizer=tokenizer, pooling=pooling, preprocessing=preprocessing)


def plain_tensors(entry: Entry, ours: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `entry` makes of our tensors, under the published names."""
    missing = [name for name in entry.ours if name not in ours]
    if missing:
        raise CheckpointError(
            f"{missing[0]!r} has no plain weight to save",
            remedy="load the checkpoint with a floating-point dtype (dtype='float32') and save that",
        )
    return dict(zip(entry.theirs, entry.save([ours[name] for name in entry.ours]), strict=True))


def write_folder(
    folder: Path,
    theirs: Mapping[str, torch.Tensor],
    config: dict[str, Any],
    *,
    tokenizer: Tokenizer | None,
    pooling: PoolingConfig | None,
    preprocessing: ImagePreprocessing | ImageSplitting | None = None,
) -> Path:
    """Write tensors and a config.json under their published names, and what goes with them, to `folder`."""
    with disk_errors(f"make the folder {folder.name}", folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", theirs)
    if tokenizer is not None:
        config |= save_tokenizer(tokenizer, folder)
    if pooling is not None:
        _save_pooling(pooling, config["hidden_size"], folder)
    if preprocessing is not None:
        save_preprocessing(preprocessing, folder)
    _save_json(folder / "config.json", config)
    return folder


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write a tokeniser and its chat template to `folder`, which is there already; gives the ids that a model's
    config.json repeats. Raises StoreError if the folder cannot be written."""
    replace_file(folder / "tokenizer.json", tokenizer.backend.to_str(pretty=True).encode())
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    _save_json(folder / "tokenizer_config.json", settings)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    if tokenizer.eos_ids:
        ids["eos_token_id"] = list(tokenizer.eos_ids)
    _save_json(folder / "generation_config.json", ids)
    return ids


def save_preprocessing(preprocessing: ImagePreprocessing | ImageSplitting, folder: Path) -> None:
    """Write how pictures are prepared to `folder`, which is there. Raises StoreError if it cannot be written."""
    _save_json(folder / FILE_NAME, preprocessing.to_hf())


def copy_preprocessing(source: Path, folder: Path) -> None:
    """Copy what says how pictures or sounds are prepared from one model's folder to that of a model made from it, if
    it is there. Raises StoreError if it cannot be written."""
    for name in PREPROCESSING_NAMES:
        if (source / name).is_file():
            with disk_errors(f"read {name}", source):
                content = (source / name).read_bytes()
            replace_file(folder / name, content)


def _save_pooling(pooling: PoolingConfig, width: int, folder: Path) -> None:
    parts = [
        ("Transformer", ""),
        ("Pooling", "1_Pooling"),
        *([("Normalize", "2_Normalize")] if pooling.normalise else []),
    ]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    with disk_errors("make the folder 1_Pooling", folder):
        (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {key: mode == pooling.mode for key, mode in POOLING_MODES.items()}
    _save_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes})
    if pooling.max_tokens is not None:
        _save_json(folder / "sentence_bert_config.json", {"max_seq_length": pooling.max_tokens, "do_lower_case": False})
    _save_json(folder / "modules.json", modules)


def _save_json(path: Path, value: Any) -> None:
    replace_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")
