"""The same published weights in every form that a contender reads, made from one GGUF file."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf import GGMLType, GGUFFile, TensorInfo, TensorSource, quantize, write_gguf
from craton.checkpoints.save import save_checkpoint


def requantized(published: Path, kind: str, folder: Path) -> Path:
    """The GGUF file with its matrices in another format ("Q4_0", "Q8_0", "BF16"), written to `folder`.

    With 4 bits the embedding, which is the head too, keeps 8, as is the custom.
    """
    target = folder / f"{kind.lower()}.gguf"
    with GGUFFile.open(published) as file:
        sources = [_source(file, tensor, GGMLType[kind]) for tensor in file.tensors.values()]
        write_gguf(target, file.typed_metadata, sources)
    return target


def _source(file: GGUFFile, tensor: TensorInfo, kind: GGMLType) -> TensorSource:
    if len(tensor.shape) == 2 and kind is GGMLType.Q4_0 and tensor.name == "token_embd.weight":
        kind = GGMLType.Q8_0
    if len(tensor.shape) != 2 or tensor.type is kind:
        return TensorSource(tensor.name, tensor.shape, tensor.type, lambda: file.blocks(tensor.name))
    return TensorSource(
        tensor.name, tensor.shape, kind, lambda: quantize(file.array(tensor.name), kind, name=tensor.name)
    )


def plain_folder(published: Path, folder: Path) -> Path:
    """The weights as bf16 numbers with their tokeniser, in Hugging Face's layout."""
    checkpoint = Checkpoint.open(published)
    target = save_checkpoint(checkpoint.load(torch.bfloat16), checkpoint.family, folder / "transformers")
    checkpoint.tokenizer().backend.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return target
