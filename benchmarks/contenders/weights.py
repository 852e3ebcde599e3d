"""The same published weights in every form that a contender reads, made from one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf_export import GGUFKind, save_gguf
from craton.checkpoints.save import save_checkpoint


def rewritten(published: Path, kinds: Iterable[GGUFKind], folder: Path) -> dict[GGUFKind, Path]:
    """GGUF files of the same weights, each with its matrices in one of `kinds`, written to `folder`."""
    checkpoint = Checkpoint.open(published)
    model, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
    return {kind: save_gguf(model, checkpoint.family, tokenizer, folder / f"{kind}.gguf", kind) for kind in kinds}


def plain_folder(published: Path, folder: Path) -> Path:
    """The weights as bf16 numbers with their tokeniser, in Hugging Face's layout."""
    checkpoint = Checkpoint.open(published)
    target = save_checkpoint(checkpoint.load(torch.bfloat16), checkpoint.family, folder / "transformers")
    checkpoint.tokenizer().backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target
