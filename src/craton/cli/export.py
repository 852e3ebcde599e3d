"""`craton export`: write a model as files that other programs open."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, size, stderr
from craton.errors import UsageError


def export(
    model: Annotated[str, Parameter(help="a name or a path")],
    target: Annotated[Path, Parameter(help="a .gguf file, or a folder for Hugging Face's layout")],
    /,
    *,
    kind: Annotated[
        Literal["F16", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q4_1", "Q4_0"],
        Parameter(
            help="how a GGUF file stores matrices; rows that are no multiple of 256 get Q5_0 for Q4_K, Q8_0 for Q6_K"
        ),
    ] = "F16",
    json: Json = False,
) -> None:
    """Write a model as one GGUF file or as a folder in Hugging Face's layout (float32 safetensors, tokeniser and chat
    template). What is there already is never overwritten."""
    import torch

    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.checkpoints.families.whisper_generation import read_generation, write_generation
    from craton.checkpoints.gguf_export import save_gguf
    from craton.checkpoints.save import save_checkpoint
    from craton.modalities.image import read_preprocessing
    from craton.models import ImageClassifier, Seq2Seq, TextModelConfig, VisionTransformer

    if target.exists():
        raise UsageError(f"{target} exists already", remedy="choose another name, or remove it first")
    checkpoint = Checkpoint.open(store.find(model).path)
    module, pooling = checkpoint.load(torch.float32), checkpoint.pooling
    reads = not isinstance(module, VisionTransformer | ImageClassifier)
    tokenizer = checkpoint.tokenizer() if reads else None
    if target.suffix == ".gguf":
        _ = checkpoint.text_config  # GGUF describes models of texts
        assert tokenizer is not None
        save_gguf(module, checkpoint.family, tokenizer, target, kind, pooling=pooling)
        written = [target]
    else:
        sees = not isinstance(checkpoint.config, TextModelConfig)
        preprocessing = read_preprocessing(checkpoint.folder) if sees else None
        save_checkpoint(
            module, checkpoint.family, target, tokenizer=tokenizer, pooling=pooling, preprocessing=preprocessing
        )
        if isinstance(module, Seq2Seq):
            assert tokenizer is not None
            facts = read_generation(checkpoint.folder)
            tokens = facts.tokens(tokenizer, module.config.vocab)
            write_generation(target, module.config, tokens, facts.alignment_heads)
        written = sorted(path for path in target.rglob("*") if path.is_file())
    nbytes = sum(path.stat().st_size for path in written)
    if json:
        print_json({"target": str(target), "files": len(written), "bytes": nbytes})
        return
    stderr.print(f"[bold]{stderr.escape(str(target))}[/]: {size(nbytes)}")
