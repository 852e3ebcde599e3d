"""The same published weights in every form that a contender reads, made from one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf_export import GGUFKind, save_gguf
from craton.checkpoints.save import save_checkpoint

WRITTEN: dict[str, GGUFKind] = {"q4_0": "Q4_0", "q8_0": "Q8_0", "bf16": "BF16"}


def rewritten(published: Path, kinds: Iterable[str], folder: Path) -> dict[str, Path]:
    """GGUF files of the same weights, one for each of `kinds` (keys of WRITTEN), written to `folder`."""
    checkpoint = Checkpoint.open(published)
    model, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
    return {k: save_gguf(model, checkpoint.family, tokenizer, folder / f"{k}.gguf", WRITTEN[k]) for k in kinds}


def plain_folder(published: Path, folder: Path) -> Path:
    """The weights as bf16 numbers with their tokeniser, in Hugging Face's layout."""
    checkpoint = Checkpoint.open(published)
    target = save_checkpoint(checkpoint.load(torch.bfloat16), checkpoint.family, folder / "transformers")
    checkpoint.tokenizer().backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target
