"""Fine-tuning a model that sees: classes of one's own, by an adapter and a head or by all weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import classifier_family
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.heads import published_pooling
from craton.checkpoints.save import save_checkpoint, save_preprocessing
from craton.data.augmentation import AugmentSettings
from craton.data.labels import LabelMap
from craton.data.picture_batches import PictureLoader
from craton.data.pictures import PictureSet, read_pictures
from craton.errors import UsageError
from craton.finetuning.adapter_files import check_saveable, save_adapter
from craton.finetuning.lora import apply_lora
from craton.finetuning.settings import KIND, FinetuneSettings
from craton.modalities.image import read_preprocessing
from craton.models import ImageClassifier, ImageClassifierConfig, VisionTransformer
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run
from craton.training.hardware import compute_dtype, use_threads
from craton.training.image_classification import ImageClassification
from craton.training.loop import Trainer
from craton.training.optimisers import free_weights
from craton.training.ranks import Ranks
from craton.training.session import (
    Hooks,
    Job,
    Result,
    at_work,
    carry_out,
    check_same_data,
    last_checkpoint,
    new_run,
    rehearse,
)

FACTS_NAME: Final = "facts.json"
LABELS_NAME: Final = "labels.json"


def finetune(
    model: str,
    base: StoredModel,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    settings: FinetuneSettings,
    provenance: dict[str, str],
    hooks: Hooks,
    ranks: Ranks,
    *,
    dry_run: bool,
) -> Result | None:
    """See `craton.finetuning.finetune.finetune`; sources: see `craton.data.pictures.read_pictures`."""
    data = _read(checkpoint, sources, settings, hooks)
    build = partial(_job, base, checkpoint, data, settings, ranks=ranks)
    if dry_run:
        rehearse(build(None), hooks)
        return None
    parents = (
        Parent(relation="base" if settings.method == "full" else "adapter_of", name=_reference(base)),
        *(Parent(relation="trained_on", name=source) for source in sources),
        *(Parent(relation="evaluated_on", name=source) for source in settings.evaluation),
    )
    name = settings.name
    assert name is not None
    everything = [model, *sources]
    run = new_run(KIND, settings, provenance, sources=everything, parents=parents, name=name, ranks=ranks)
    with at_work(run, ranks):
        if ranks.is_first:
            replace_file(run.folder / FACTS_NAME, json.dumps({"data": data[0].digest}).encode())
        return carry_out(run, build(run.checkpoints_folder), ranks, hooks)


def resume(
    run: Run,
    base: StoredModel,
    checkpoint: Checkpoint,
    sources: Sequence[str],
    settings: FinetuneSettings,
    hooks: Hooks,
    ranks: Ranks,
) -> Result:
    """See `craton.finetuning.finetune.resume`."""
    data, facts = _read(checkpoint, sources, settings, hooks), run.folder / FACTS_NAME
    if facts.exists():
        check_same_data(json.loads(facts.read_bytes())["data"], data[0].digest, "the pictures", sources)
    job = _job(base, checkpoint, data, settings, run.checkpoints_folder, ranks=ranks)
    return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _read(
    checkpoint: Checkpoint, sources: Sequence[str], settings: FinetuneSettings, hooks: Hooks
) -> tuple[PictureSet, PictureSet]:
    if settings.task != "classify" or settings.method == "qlora":
        raise UsageError(
            f"task {settings.task} with method {settings.method} is for models of texts",
            where=str(checkpoint.path),
            remedy="a model that sees learns classes: --task classify --method lora (or dora, full)",
        )
    given = [name for name in ("shots", "max_tokens", "text_key", "label_key") if getattr(settings, name) is not None]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for texts", remedy="leave it out")
    preprocessing = read_preprocessing(checkpoint.folder)
    height, width = preprocessing.crop or preprocessing.size
    if height != width:
        raise UsageError(f"this model sees pictures of {height} x {width}, and training wants square ones")
    known = checkpoint.config.labels if isinstance(checkpoint.config, ImageClassifierConfig) else ()

    def read(some: Sequence[str], names: Sequence[str]) -> PictureSet:
        return read_pictures(
            some,
            size=height,
            channels=preprocessing.channels,
            names=names,
            shape=preprocessing,
            on_progress=hooks.on_progress,
        )

    pictures = read(sources, ())
    if pictures.labels is None:
        raise UsageError(
            "these pictures have no classes", where=", ".join(sources), remedy="put each class into a folder of its own"
        )
    if set(pictures.names) <= set(known):
        pictures = read(sources, known)  # the head that is there knows them by its own numbers
    if settings.evaluation:
        return pictures, read(settings.evaluation, pictures.names)
    return pictures.split(settings.holdout, settings.training.seed)


def _job(
    base: StoredModel,
    checkpoint: Checkpoint,
    data: tuple[PictureSet, PictureSet],
    settings: FinetuneSettings,
    folder: Path | None,
    *,
    ranks: Ranks,
) -> Job:
    training, (learnt, held_out) = settings.training, data
    use_threads(training.threads)
    torch.manual_seed(training.seed)  # of fresh adapters and heads
    dtype, why = compute_dtype(training.dtype, ranks.device)
    model, family, decisions = _model(checkpoint, learnt.names, settings)
    preprocessing, config = read_preprocessing(checkpoint.folder), model.backbone.config
    tokens = (learnt.pixels.shape[1] // config.patch) ** 2 + config.extra

    def loader(pictures: PictureSet, augment: AugmentSettings | None) -> PictureLoader:
        return PictureLoader(
            pictures,
            batch=training.batch,
            micro=max(1, training.micro_tokens // tokens),
            patch=config.patch,
            mean=preprocessing.mean,
            std=preprocessing.std,
            seed=training.seed,
            rank=ranks.data_rank,
            world=ranks.data_world,
            augment=augment,
        )

    trainer = Trainer(
        model,
        ImageClassification(),
        loader(learnt, settings.augment),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=loader(held_out, None).all() if len(held_out) else [],
        folder=folder,
    )
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=None,
        dtype=dtype,
        length=tokens,
        decisions=(
            f"{len(learnt):,} pictures of {len(learnt.names)} classes, {len(held_out):,} more for evaluation",
            *decisions,
            f"activations in {str(dtype).removeprefix('torch.')}: {why}",
        ),
        save=lambda target: _save(model, family, base, checkpoint, settings, target),
        licence=base.licence,
        tensorboard=settings.tensorboard,
    )


def _model(
    checkpoint: Checkpoint, names: Sequence[str], settings: FinetuneSettings
) -> tuple[ImageClassifier, Family, list[str]]:
    loaded, family = checkpoint.load(torch.float32), checkpoint.family
    if isinstance(loaded, VisionTransformer):
        model, family = (
            ImageClassifier.over(loaded, names, pooling=published_pooling(family)),
            classifier_family(family),
        )
    elif isinstance(loaded, ImageClassifier):
        model = loaded if loaded.config.labels == tuple(names) else ImageClassifier.over(loaded.backbone, names)
    else:
        raise UsageError(
            f"{checkpoint.hf['architectures'][0]} is given no classes by training",
            where=str(checkpoint.path),
            remedy="take a ViT or a DINOv2; CLIP and SigLIP know classes by their words: craton classify --labels",
        )
    if settings.method == "full":
        free_weights(model)
        return model, family, []
    lora = settings.lora.model_copy(update={"dora": settings.method == "dora" or settings.lora.dora})
    layers = apply_lora(model, lora)
    check_saveable(model, family)
    return model, family, [f"adapter of rank {lora.rank} on {len(layers)} layers, scale {lora.scale:.3g}"]


def _save(
    model: ImageClassifier,
    family: Family,
    base: StoredModel,
    checkpoint: Checkpoint,
    settings: FinetuneSettings,
    folder: Path,
) -> None:
    preprocessing = read_preprocessing(checkpoint.folder)
    if settings.method == "full":
        save_checkpoint(model, family, folder, preprocessing=preprocessing)
        return
    save_adapter(model, family, folder, base=_reference(base))
    save_preprocessing(preprocessing, folder)
    LabelMap(model.config.labels).save(folder / LABELS_NAME)


def _reference(base: StoredModel) -> str:
    """How a base is found again: by its stored id, or by where it came from."""
    return base.id if base.version else base.source
