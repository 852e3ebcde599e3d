"""From an adapter's files to a model's files, checked by reading them again."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import classifier_family
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.heads import published_pooling
from craton.checkpoints.gguf_export import save_gguf
from craton.checkpoints.peft_reader import AdapterSummary, read_summary
from craton.checkpoints.save import copy_preprocessing, save_checkpoint
from craton.config.resolve import DEFAULT
from craton.errors import CheckpointError, UnknownName, UsageError
from craton.finetuning.adapter_files import load_adapter
from craton.finetuning.adapters import DEFAULT_ADAPTER
from craton.finetuning.merging import MergeReport, merge_adapter, update_lost
from craton.finetuning.quantized_base import QuantizedKind, quantize_base
from craton.modalities.image import read_preprocessing
from craton.modalities.text import Tokenizer
from craton.models import (
    AnyModel,
    CausalLM,
    Classifier,
    Encoder,
    ImageChatConfig,
    ImageClassifier,
    ImageClassifierConfig,
    TextModelConfig,
    VisionConfig,
    VisionTransformer,
)
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.runs import Run

Requantized = Literal["Q8_0", "Q4_0"]

PROBE: Final = (
    "A small model was adapted and is whole again. Its answers must be the same, word for word.\n"
    "این متن برای آزمودن مدل است. def add(a, b):\n    return a + b  # 1 + 2 = 3\n"
)
PROBE_TOKENS: Final = 64

# The largest `relative_difference` of the probe's outputs: fp32's own errors, and what the fewer bits of a GGUF file do
# to a model that is otherwise the same (measured on SmolLM2-135M: 0.03 and 0.45; unrelated models give 1.4).
SAME: Final = 1e-4
TOLERANCES: Final = {None: SAME, "Q8_0": 0.2, "Q4_0": 0.8}


@dataclass(frozen=True)
class MergeResult:
    """What was made. target: a path, or the id in the store. base_weights: what the updates were added to.

    difference: of the written model's outputs from those of base and adapter, relative. lost: the part of the updates
    that the fewer bits cost (see `update_lost`), where the weights were requantised. notes: what a user should know.
    """

    target: str
    run: str
    adapter: str
    base: str
    base_weights: str
    layers: int
    untied: bool
    difference: float
    lost: float | None
    notes: tuple[str, ...]


def merge_files(
    adapter: str,
    *,
    base: str | None = None,
    out: Path | None = None,
    name: str | None = None,
    requantize: Requantized | None = None,
) -> MergeResult:
    """Merge the adapter in a folder (or of the store) into its base and write the model.

    base: a name or a path, where the adapter's own word for it is not to be followed. Either out: a new folder in
    Hugging Face's layout, or with `requantize` a new .gguf file; or name: the model's name in the store.

    Raises UsageError for a wrong target or a base that is not known or not here, FileFormatError and CheckpointError
    for an adapter that is damaged or belongs to another base, and CheckpointError where what was written does not do
    what base and adapter do; then it is removed again.
    """
    _check_target(out, name, requantize)
    found = store.find(adapter)
    summary = read_summary(found.path)
    parent = find_base(base or found.base or summary.base, found.path)
    checkpoint = Checkpoint.open(parent.path)
    model, family = _assemble(checkpoint, summary)
    load_adapter(model, family, found.path)
    sees = not isinstance(checkpoint.config, TextModelConfig)
    if sees and requantize:
        raise UsageError("a model that sees is no GGUF file", remedy="merge into a folder or under a name")
    tokenizer = None if sees else checkpoint.tokenizer()
    preprocessing = read_preprocessing(checkpoint.folder) if sees else None
    given = _probe_input(checkpoint, tokenizer)
    adapted = probe(model, given)
    lost = update_lost(model, DEFAULT_ADAPTER, requantize) if requantize else None
    report = merge_adapter(model, DEFAULT_ADAPTER)
    merged = probe(model, given)
    if relative_difference(merged, adapted) > SAME:
        raise _differs(merged, adapted, "the merged weights")

    run = Run.create(
        "merge",
        config={"adapter": adapter, "base": parent.id, "requantize": requantize},
        provenance={
            "adapter": "the command",
            "base": "--base" if base else "the adapter",
            "requantize": "--requantize" if requantize else DEFAULT,
        },
        parents=(
            Parent(relation="merged_from", name=_known_as(found)),
            Parent(relation="base", name=_known_as(parent)),
        ),
        name=name,
    )

    def write(target: Path) -> float:
        if requantize:
            assert tokenizer is not None
            save_gguf(model, family, tokenizer, target, requantize, pooling=checkpoint.pooling)
        else:
            save_checkpoint(
                model, family, target, tokenizer=tokenizer, pooling=checkpoint.pooling, preprocessing=preprocessing
            )
            if isinstance(checkpoint.config, ImageChatConfig):
                copy_preprocessing(checkpoint.folder, target)
            title = name or target.name
            card = model_card(run, name=title, licence=parent.licence, metrics={})
            replace_file(target / "README.md", card.encode())
        again = probe(Checkpoint.open(target).load(torch.float32), given)
        if relative_difference(again, merged) > TOLERANCES[requantize]:
            raise _differs(again, merged, f"the model that was written to {target.name}")
        return relative_difference(again, adapted)

    with run.lock():
        target, difference = _deliver(write, run, out=out, name=name, licence=parent.licence)
        run.finish("done", {"model": target, "metrics": {"difference": difference}})
    return MergeResult(
        target=target,
        run=run.id,
        adapter=_known_as(found),
        base=_known_as(parent),
        base_weights=report.base if report.base != "original" else _stored_as(checkpoint),
        layers=len(report.layers),
        untied=report.untied,
        difference=difference,
        lost=lost,
        notes=tuple(_notes(summary, checkpoint, report, lost)),
    )


@torch.inference_mode()
def probe(model: AnyModel, given: Tensor) -> Tensor:
    """What a model gives for these tokens, or for these pixels: logits, a classifier's as well, or vectors."""
    model.eval()
    if isinstance(model, ImageClassifier | VisionTransformer):
        return model(given)
    ids_T, positions_T = given, torch.arange(len(given))
    if isinstance(model, Classifier):
        return model(ids_T, positions_T, torch.zeros_like(ids_T), [len(ids_T)])
    return model(ids_T, positions_T)


def _probe_input(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> Tensor:
    """What base and merged model are compared by: a text, or noise of the size of a picture."""
    if tokenizer is not None:
        return torch.tensor(tokenizer.encode(PROBE)[: min(PROBE_TOKENS, checkpoint.text_config.context)])
    config = checkpoint.config.backbone if isinstance(checkpoint.config, ImageClassifierConfig) else checkpoint.config
    assert isinstance(config, VisionConfig)
    return torch.randn(1, config.channels, *config.image, generator=torch.Generator().manual_seed(0))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| (Frobenius), without what is the same in a whole row, which softmax does not see."""
    ours, theirs = (outputs - outputs.mean(-1, keepdim=True) for outputs in (ours, theirs))
    return float((ours - theirs).norm() / theirs.norm())


def _check_target(out: Path | None, name: str | None, requantize: Requantized | None) -> None:
    if (out is None) == (name is None):
        raise UsageError("a merge needs one target", remedy="say --out PATH, or --name NAME for the store")
    if requantize is not None and requantize not in get_args(Requantized):
        raise UnknownName("kind to requantise to", requantize, get_args(Requantized))
    if name is not None:
        check_model_name(name)
    if requantize and (out is None or out.suffix != ".gguf"):
        raise UsageError(f"{requantize} is written as a GGUF file", remedy="say --out NAME.gguf")
    if out is not None and out.suffix == ".gguf" and not requantize:
        raise UsageError(
            "a GGUF file needs a kind", remedy="say --requantize Q8_0, or merge into a folder and use `craton export`"
        )
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", remedy="choose another name, or remove it first")


def find_base(text: str | None, adapter: Path) -> store.StoredModel:
    if text is None:
        raise UsageError(
            "the adapter does not say what it was trained on", where=str(adapter), remedy="name it: --base MODEL"
        )
    try:
        return store.find(text)
    except (UsageError, UnknownName) as error:
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", text):  # as PEFT names what lies on the hub
            return store.find(f"hf:{text}")
        raise UsageError(
            f"the adapter's base is not here: {error.what}",
            where=str(adapter),
            remedy=f"{error.remedy + ', or ' if error.remedy else ''}name another copy of it: --base MODEL",
        ) from None


def _assemble(checkpoint: Checkpoint, summary: AdapterSummary) -> tuple[AnyModel, Family]:
    """The base in fp32 as the adapter was trained on it: with a classifier's head, and with its 4-bit weights."""
    model, family = checkpoint.load(torch.float32), checkpoint.family
    model, family = with_head(model, family, summary.labels)
    quantize_as_trained(model, summary)
    return model, family


def with_head(model: AnyModel, family: Family, labels: Sequence[str]) -> tuple[AnyModel, Family]:
    """A model with a classifier's head for these classes, if there are any, and the family under which it is saved."""
    if labels and isinstance(model, CausalLM | Encoder):
        return Classifier.over(model, labels), classifier_family(family)
    if labels and isinstance(model, VisionTransformer):
        return ImageClassifier.over(model, labels, pooling=published_pooling(family)), classifier_family(family)
    if labels and isinstance(model, ImageClassifier) and model.config.labels != tuple(labels):
        return ImageClassifier.over(model.backbone, labels), family
    return model, family


def quantize_as_trained(model: AnyModel, summary: AdapterSummary) -> None:
    """Give an fp32 base the 4-bit weights that the adapter was trained on, if it was."""
    if summary.base_weights in get_args(QuantizedKind):
        quantize_base(model, summary.base_weights)  # type: ignore[arg-type]


def _deliver(
    write: Callable[[Path], float], run: Run, *, out: Path | None, name: str | None, licence: str | None
) -> tuple[str, float]:
    differences: list[float] = []
    if out is not None:
        try:
            return str(out), write(out)
        except BaseException:
            # It was not there before, and what is not known to be right must not be taken for a model.
            shutil.rmtree(out, ignore_errors=True)
            out.unlink(missing_ok=True)
            raise
    assert name is not None
    made = publish_model(
        name,
        lambda folder: differences.append(write(folder)),
        source=f"run:{run.id}",
        parents=run.record.parents,
        licence=licence,
    )
    return made.id, differences[0]


def _differs(ours: Tensor, theirs: Tensor, what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} give other outputs than base and adapter: relative difference {relative_difference(ours, theirs):.2g}",
        remedy="nothing was kept; please report this with the names of the base and the adapter",
    )


def _known_as(model: store.StoredModel) -> str:
    return model.id if model.folder is not None else model.source


def _stored_as(checkpoint: Checkpoint) -> str:
    kinds = checkpoint.quantized_kinds()
    return f"dequantised {'/'.join(sorted(kinds))}" if kinds else "original"


def _notes(summary: AdapterSummary, checkpoint: Checkpoint, report: MergeReport, lost: float | None) -> list[str]:
    notes = []
    trained_on = summary.base_weights
    if trained_on and report.base == "original" and trained_on not in checkpoint.quantized_kinds():
        notes.append(f"the adapter was trained on {trained_on} weights and is merged into others: measure the result")
    if report.base != "original":
        notes.append(
            f"merged into the {report.base} weights that the adapter was trained on, not into the original ones"
        )
    if report.untied:
        notes.append("the head was adapted and is no longer tied to the embedding")
    if lost is not None and lost > 0.5:
        notes.append(f"{min(lost, 1):.0%} of what the adapter learnt is lost in so few bits: keep it beside its base")
    return notes
