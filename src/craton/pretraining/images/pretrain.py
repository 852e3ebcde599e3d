"""Training on pictures: from files to a model in the store, by classes or without labels, fresh or continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import classifier_family
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.heads import published_pooling
from craton.checkpoints.families.vit import VIT
from craton.checkpoints.save import save_checkpoint
from craton.config import parse
from craton.config.sizes import parse_size
from craton.data.picture_batches import PictureLoader
from craton.data.pictures import PictureSet, read_pictures
from craton.errors import UsageError
from craton.modalities.image import ImagePreprocessing, read_preprocessing
from craton.models import ImageClassifier, VisionConfig, VisionTransformer
from craton.models.initialisation import initialise
from craton.models.masked_autoencoder import MaskedAutoencoder
from craton.models.self_distilled import SelfDistilled
from craton.pretraining.images.objectives import MaskedPixels, SelfDistillation
from craton.pretraining.images.settings import ImagePretrainSettings
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.training.estimate import measured_rate
from craton.training.hardware import compute_dtype, use_threads
from craton.training.image_classification import ImageClassification
from craton.training.loop import Trainer
from craton.training.objective import Objective
from craton.training.ranks import Ranks, joined
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
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

KIND: Final = "pretrain-images"
PLAN_NAME: Final = "plan.json"
STEP: Final = 32  # widths are multiples of it, and heads have so many numbers
NORM: Final = NormConfig(kind="layer", eps=1e-12, bias=True)
DECODER: Final = (128, 2)  # width and layers of what paints


@dataclass(frozen=True)
class Plan:
    """What was decided before the first step: with the settings and the data, all that a resume needs."""

    digest: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    steps: int | None

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        replace_file(folder / PLAN_NAME, json.dumps(self.__dict__).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read it back. Raises UsageError for a run that ended before it had one."""
        path = folder / PLAN_NAME
        if not path.exists():
            raise UsageError("this run stopped before its first step", where=str(folder), remedy="start it anew")
        values = json.loads(path.read_bytes())
        return cls(values["digest"], tuple(values["mean"]), tuple(values["std"]), values["steps"])


@dataclass(frozen=True)
class _Learner:
    """model: what the objective is given. saved: what is published, under the names of `family`."""

    model: nn.Module
    saved: VisionTransformer | ImageClassifier
    family: Family
    objective: Objective
    decisions: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    training: PictureSet
    held_out: PictureSet
    size: int
    channels: int
    shape: ImagePreprocessing | None  # of a model that goes on
    decisions: tuple[str, ...]


def pretrain_images(
    sources: Sequence[str],
    settings: ImagePretrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train on the pictures of `sources` (see `craton.data.pictures.read_pictures`) and publish the model.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError, DataError and FileFormatError for settings and data that cannot be used, TrainingError for a run
    that diverges.
    """
    hooks = hooks or Hooks()
    name = settings.name or f"images-{settings.objective}"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no pictures to train on", remedy="name a folder: craton pretrain-images FOLDER")
    with joined(settings.training.tensor_parallel) as ranks:
        if settings.objective == "self-distillation" and ranks.world > 1:
            raise UsageError(
                "self-distillation runs in one process: its teacher is not shared out",
                remedy="start it without torchrun",
            )
        data = _read(sources, settings, hooks)
        if dry_run:
            rehearse(_job(settings, _plan(settings, data, ranks), data, None, ranks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        parents += [Parent(relation="evaluated_on", name=source) for source in settings.evaluation]
        if settings.model is not None:
            parents.append(Parent(relation="base", name=find(settings.model).id))
        run = new_run(KIND, settings, provenance, sources=sources, parents=tuple(parents), name=name, ranks=ranks)
        with at_work(run, ranks):
            plan = _plan(settings, data, ranks)
            if ranks.is_first:
                plan.save(run.folder)
            return carry_out(run, _job(settings, plan, data, run.checkpoints_folder, ranks), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the pictures are not what they were.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(ImagePretrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        plan, data = Plan.load(run.folder), _read(config["sources"], settings, hooks)
        check_same_data(data.training.digest, plan.digest, "the pictures", config["sources"])
        job = _job(settings, plan, data, run.checkpoints_folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def vision_config(
    parameters: int, *, image: int, patch: int, channels: int, layer_scale: float | None = None
) -> VisionConfig:
    """A Vision Transformer of about so many parameters, with norms before the branches and a class token, as ViT's.

    Depth = 4 + width / 128, as for texts (see `craton.pretraining.sizing.size`); the feed-forward is four times the
    width. Raises UsageError for patches that do not fit the picture.
    """
    if image % patch:
        raise UsageError(f"a picture of {image} pixels is not made of whole patches of {patch}", where="--patch")

    def shape(width: int) -> TrunkConfig:
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=width // STEP, kv_heads=width // STEP, head_size=STEP, mask="full", bias=("q", "k", "v", "o")
            ),
            feedforward=FeedForwardConfig(hidden=4 * width, activation="gelu", bias=True),
            norm=NORM,
            layer_scale=layer_scale,
        )
        return TrunkConfig(width=width, layers=(layer,) * round(4 + width / 128), final_norm=NORM)

    def count(width: int) -> int:
        tokens = (image // patch) ** 2 + 1
        return 12 * width**2 * round(4 + width / 128) + width * (channels * patch**2 + tokens)

    widths = range(2 * STEP, 4097, STEP)
    width = min(widths, key=lambda w: abs(np.log(count(w) / parameters)))
    return VisionConfig(image=(image, image), patch=patch, channels=channels, trunk=shape(width))


def _read(sources: Sequence[str], settings: ImagePretrainSettings, hooks: Hooks) -> _Data:
    size, channels, names, shape = settings.image_size, settings.channels, tuple[str, ...](), None
    if settings.model is not None:
        checkpoint = Checkpoint.open(find(settings.model).path)
        preprocessing = read_preprocessing(checkpoint.folder)
        size, channels, shape = (preprocessing.crop or preprocessing.size)[0], preprocessing.channels, preprocessing
        if preprocessing.floating:
            shape = None  # pictures are kept as 8-bit numbers
        if settings.objective == "classes":
            names = getattr(checkpoint.config, "labels", ())

    def read(some: Sequence[str], known: Sequence[str]) -> PictureSet:
        return read_pictures(
            some,
            size=size,
            channels=channels,
            names=known,
            shape=shape,
            labelled=settings.objective == "classes",
            on_progress=hooks.on_progress,
        )

    pictures = read(sources, names)
    if settings.objective == "classes" and pictures.labels is None:
        raise UsageError(
            "these pictures have no classes",
            where=", ".join(sources),
            remedy="put each class into a folder of its own, or learn without labels: --objective masked-pixels",
        )
    classes = f", {len(pictures.names)} classes" if pictures.names else ""
    decisions = [f"{len(pictures):,} pictures of {size} x {size}{classes}"]
    if settings.evaluation:
        training, held_out = pictures, read(settings.evaluation, pictures.names)
    else:
        training, held_out = pictures.split(settings.holdout, settings.training.seed)
        decisions.append(f"{len(held_out):,} of them kept apart for evaluation")
    return _Data(training, held_out, size, channels, shape, tuple(decisions))


def _plan(settings: ImagePretrainSettings, data: _Data, ranks: Ranks) -> Plan:
    """What pixels are normalised by, and how many steps so many minutes are."""
    if settings.model is not None:
        preprocessing = read_preprocessing(Checkpoint.open(find(settings.model).path).folder)
        mean, std = preprocessing.mean, preprocessing.std
    else:
        # Of the first pictures: more would not change a digit that matters.
        sample = data.training.pixels[:20_000].reshape(-1, data.channels).astype(np.float32) / 255
        mean, std = (tuple(round(float(v), 4) for v in values) for values in (sample.mean(0), sample.std(0) + 1e-3))
    plan = Plan(data.training.digest, mean, std, None)
    if settings.minutes is None:
        return plan
    job = _job(settings, plan, data, None, ranks)
    batch = job.trainer.data.step(0)[0]
    tokens = ranks.agreed(measured_rate(job.trainer, batch))
    rate = tokens / batch.tokens * len(batch.labels_B) * ranks.data_world  # type: ignore[attr-defined]
    steps = max(1, round(rate * 60 * settings.minutes / min(settings.training.batch, len(data.training))))
    return Plan(plan.digest, mean, std, steps)


def _job(settings: ImagePretrainSettings, plan: Plan, data: _Data, folder: Path | None, ranks: Ranks) -> Job:
    training = settings.training
    if plan.steps is not None and training.steps is None:
        training = training.model_copy(update={"steps": plan.steps})
    use_threads(training.threads)
    torch.manual_seed(training.seed)
    dtype, why = compute_dtype(training.dtype, ranks.device)
    learner = _learner(settings, data)
    vision = learner.saved.backbone if isinstance(learner.saved, ImageClassifier) else learner.saved
    config = vision.config
    shown: dict[str, Any] = {
        "batch": training.batch,
        # At most so many tokens go through the model at once, whatever the number of patches of a picture.
        "micro": max(1, training.micro_tokens // ((data.size // config.patch) ** 2 + config.extra)),
        "patch": config.patch,
        "mean": plan.mean,
        "std": plan.std,
        "seed": training.seed,
        "rank": ranks.data_rank,
        "world": ranks.data_world,
        "views": settings.views if settings.objective == "self-distillation" else 1,
        "whole_steps": getattr(learner.objective, "whole_steps", False),
    }
    held_out = PictureLoader(data.held_out, **shown).all() if len(data.held_out) else []
    trainer = Trainer(
        learner.model,
        learner.objective,
        PictureLoader(data.training, **shown, augment=settings.augment),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        folder=folder,
    )
    channels: Literal[1, 3] = 1 if data.channels == 1 else 3
    preprocessing = data.shape or ImagePreprocessing.square(data.size, plan.mean, plan.std, channels=channels)
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=None,
        dtype=dtype,
        length=(data.size // config.patch) ** 2 + config.extra,
        decisions=(
            *data.decisions,
            *learner.decisions,
            f"activations in {str(dtype).removeprefix('torch.')}: {why}",
        ),
        save=lambda target: _save(learner, target, preprocessing),
        licence=find(settings.model).licence if settings.model is not None else None,
        tensorboard=settings.tensorboard,
    )


def _save(learner: _Learner, folder: Path, preprocessing: ImagePreprocessing) -> None:
    save_checkpoint(learner.saved, learner.family, folder, preprocessing=preprocessing)


def _learner(settings: ImagePretrainSettings, data: _Data) -> _Learner:
    """The model with all that its objective needs beside it."""
    family, seed = VIT, settings.training.seed
    trained: ImageClassifier | None = None
    if settings.model is not None:
        checkpoint = Checkpoint.open(find(settings.model).path)
        loaded, family = checkpoint.load(torch.float32), checkpoint.family
        if not isinstance(loaded, VisionTransformer | ImageClassifier):
            raise UsageError(f"{settings.model} is no Vision Transformer", remedy="go on with a ViT, DINOv2 or DINOv3")
        trained = loaded if isinstance(loaded, ImageClassifier) else None
        encoder = loaded.backbone if isinstance(loaded, ImageClassifier) else loaded
        decisions = [f"goes on with {settings.model}"]
    else:
        config = vision_config(parse_size(settings.size), image=data.size, patch=settings.patch, channels=data.channels)
        encoder = VisionTransformer(config)
        initialise(encoder, seed)
        trunk = config.trunk
        decisions = [f"width {trunk.width}, {len(trunk.layers)} layers, {config.grid[0] * config.grid[1]} patches"]
    encoder.requires_grad_(True)
    grid = (data.size // encoder.config.patch,) * 2
    if settings.objective == "classes":
        if trained is None:
            trained = ImageClassifier.over(encoder, data.training.names, pooling=published_pooling(family))
            family = classifier_family(family)
        trained.requires_grad_(True)
        objective: Objective = ImageClassification(label_smoothing=settings.label_smoothing)
        return _Learner(trained, trained, family, objective, tuple(decisions))
    if trained is not None:
        raise UsageError(
            f"{settings.model} is a classifier, and {settings.objective} trains an encoder",
            remedy="go on with the model that it was made from",
        )
    if settings.objective == "masked-pixels":
        if grid == (1, 1):
            raise UsageError(
                "a picture of one patch has nothing to hide", where="--patch", remedy="take smaller patches"
            )
        width, layers = DECODER
        layer = vision_config(1, image=data.size, patch=encoder.config.patch, channels=1).trunk.layers[0]
        attention = layer.attention.model_copy(update={"heads": width // STEP, "kv_heads": width // STEP})
        feedforward = FeedForwardConfig(hidden=4 * width, activation="gelu", bias=True)
        layer = layer.model_copy(update={"attention": attention, "feedforward": feedforward})
        painter = MaskedAutoencoder(encoder, TrunkConfig(width=width, layers=(layer,) * layers, final_norm=NORM), grid)
        _initialise_beside(painter, encoder, seed)
        return _Learner(painter, encoder, family, MaskedPixels(hidden=settings.hidden), tuple(decisions))
    pair = SelfDistilled(encoder)
    _initialise_beside(pair.student, encoder, seed)
    pair.start_teacher()
    objective = SelfDistillation(momentum=settings.momentum, hidden=settings.hidden)
    return _Learner(pair, pair.encoder, family, objective, tuple(decisions))


def _initialise_beside(model: nn.Module, encoder: VisionTransformer, seed: int) -> None:
    """Fresh weights for all of a model but its encoder, which has some."""
    kept = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    initialise(model, seed)
    encoder.load_state_dict(kept)
