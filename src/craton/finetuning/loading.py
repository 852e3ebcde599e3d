"""Loading what can talk, adapters included: an adapter is merged into its base on the way, and no file is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import Family
from craton.checkpoints.peft_reader import read_summary
from craton.checkpoints.sources import SourceKind
from craton.errors import UsageError
from craton.finetuning.adapter_files import load_adapter
from craton.finetuning.adapters import DEFAULT_ADAPTER
from craton.finetuning.merge_files import find_base, quantize_as_trained, with_head
from craton.finetuning.merging import merge_adapter
from craton.inference import images
from craton.inference import model as inference
from craton.inference.images import ImageModel
from craton.inference.model import Model
from craton.inference.plan import DTypeChoice, fast_bfloat16
from craton.models import AnyModel
from craton.store import find


def load(
    name: str | Path,
    *,
    dtype: DTypeChoice = "auto",
    threads: int | None = None,
    base: str | None = None,
    **engine: Any,
) -> Model:
    """Load a model (see `craton.inference.model.load`) or a PEFT adapter, which is merged into its base in memory.

    base: the adapter's base, where its own word for it is not to be followed. Merged weights are plain numbers, in
    bfloat16 where this CPU multiplies it: in a base's 4-bit blocks the changes would be lost. engine: the fields of
    `EngineSettings`.

    Raises UsageError for an adapter of a classifier, and what loading raises.
    """
    found = find(str(name))
    if found.kind in (SourceKind.PROMPT, SourceKind.APPLICATION):
        raise UsageError(
            f"{name} is {'a prompt' if found.kind is SourceKind.PROMPT else 'an application'}, not a model",
            remedy=f"craton prompt run {name}" if found.kind is SourceKind.PROMPT else f"craton chat {name}",
        )
    if found.kind is not SourceKind.ADAPTER and not (found.path / "adapter_config.json").is_file():
        return inference.load(name, dtype=dtype, threads=threads, **engine)
    summary = read_summary(found.path)
    if summary.labels:
        raise UsageError(
            f"{name} is the adapter of a classifier: it neither writes nor embeds text",
            remedy=f"craton merge {name} --out FOLDER; Checkpoint.open(FOLDER).load(dtype) gives the classifier",
        )
    parent = find_base(base or found.base or summary.base, found.path)

    def adapt(module: AnyModel, family: Family) -> None:
        quantize_as_trained(module, summary)
        load_adapter(module, family, found.path)
        merge_adapter(module, DEFAULT_ADAPTER)

    chosen = dtype
    if dtype == "auto" and Checkpoint.open(parent.path).quantized_kinds():
        chosen = "bfloat16" if fast_bfloat16() else "float32"
    loaded = inference.load(parent.path, dtype=chosen, threads=threads, adapt=adapt, **engine)
    loaded.name = str(name)
    return loaded


def load_images(
    name: str | Path, *, dtype: DTypeChoice = "auto", threads: int | None = None, base: str | None = None
) -> ImageModel:
    """Load a model that sees (see `craton.inference.images.load_images`), or an adapter of one, which is merged into
    its base in memory. base: the adapter's base, where its own word for it is not to be followed."""
    found = find(str(name))
    if found.kind is not SourceKind.ADAPTER and not (found.path / "adapter_config.json").is_file():
        return images.load_images(name, dtype=dtype, threads=threads)
    summary = read_summary(found.path)
    parent = find_base(base or found.base or summary.base, found.path)

    def adapt(module: AnyModel, family: Family) -> AnyModel:
        module, family = with_head(module, family, summary.labels)
        load_adapter(module, family, found.path)
        merge_adapter(module, DEFAULT_ADAPTER)
        return module

    loaded = images.load_images(parent.path, dtype=dtype, threads=threads, adapt=adapt)
    loaded.name, loaded.weights = str(name), (parent.path, found.path)
    return loaded
