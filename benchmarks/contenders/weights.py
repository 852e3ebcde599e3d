"""The same published weights in every form that a contender reads, made from one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf_export import GGUFKind, save_gguf
from craton.checkpoints.save import save_checkpoint
from craton.models import build

WRITTEN: dict[str, GGUFKind] = {"q4_0": "Q4_0", "q8_0": "Q8_0", "bf16": "BF16"}


def rewritten(published: Path, kinds: Iterable[str], folder: Path) -> dict[str, Path]:
    """GGUF files of the same weights, one for each of `kinds` (keys of WRITTEN), written to `folder`."""
    checkpoint = Checkpoint.open(published)
    model, tokenizer = checkpoint.load(torch.float32), checkpoint.tokenizer()
    return {k: save_gguf(model, checkpoint.family, tokenizer, folder / f"{k}.gguf", WRITTEN[k]) for k in kinds}


@dataclass(frozen=True)
class Shape:
    """Of a Llama model; these are Llama-3.2-1B's."""

    width: int = 2048
    layers: int = 16
    heads: int = 32
    kv_heads: int = 8
    hidden: int = 8192
    vocab: int = 128256


def random_file(published: Path, kind: str, folder: Path, shape: Shape = Shape()) -> Path:
    """A GGUF file of random weights in this shape, with the published model's tokeniser: what it says means nothing,
    what it costs is what a model of the shape costs."""
    from craton.checkpoints.families.llama import LLAMA
    from craton.pretraining.architecture import causal_config
    from craton.pretraining.sizing import SizeOverrides, size

    fields = {"width": shape.width, "layers": shape.layers, "heads": shape.heads, "kv_heads": shape.kv_heads}
    overrides = SizeOverrides(**fields, hidden=shape.hidden)
    config = causal_config(size("1b", vocab=shape.vocab, context=4096, overrides=overrides), shape.vocab, 4096)
    model = build(config).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return save_gguf(model, LLAMA, Checkpoint.open(published).tokenizer(), folder / f"1b-{kind}.gguf", WRITTEN[kind])


def plain_folder(published: Path, folder: Path) -> Path:
    """The weights as bf16 numbers with their tokeniser, in Hugging Face's layout."""
    checkpoint = Checkpoint.open(published)
    target = save_checkpoint(checkpoint.load(torch.bfloat16), checkpoint.family, folder / "transformers")
    checkpoint.tokenizer().backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target
