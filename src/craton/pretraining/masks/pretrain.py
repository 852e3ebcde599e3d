"""Training a segmenter: from cut-outs or outlined pictures to a SAM in the store, fresh or continued."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families.sam import SAM
from craton.checkpoints.save import save_checkpoint
from craton.config import parse
from craton.config.sizes import parse_size
from craton.errors import UsageError
from craton.modalities.image import FILE_NAME as PREPROCESSING_NAME
from craton.modalities.image.longest_side import SquarePreparation
from craton.models import Segmenter, SegmenterConfig, VisionConfig
from craton.models.initialisation import initialise
from craton.pretraining.images.pretrain import Plan
from craton.pretraining.masks.batches import MaskBatch, SceneLoader
from craton.pretraining.masks.data import MaskSet, read_masks
from craton.pretraining.masks.draws import Draws
from craton.pretraining.masks.objective import PromptedMasks
from craton.pretraining.masks.settings import MaskPretrainSettings
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.training.hardware import compute_dtype, use_threads
from craton.training.loop import Trainer
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

KIND: Final = "pretrain-masks"
STEP: Final = 32  # the encoder's widths are multiples of it, and its heads have so many numbers
NORM: Final = NormConfig(kind="layer", eps=1e-6, bias=True)
SAMPLE: Final = 256  # scenes whose colours pixels are normalised by


@dataclass(frozen=True)
class _Data:
    training: MaskSet
    held_out: MaskSet
    decisions: tuple[str, ...]


def pretrain_masks(
    sources: Sequence[str],
    settings: MaskPretrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train on the masks of `sources` (see `craton.pretraining.masks.data.read_masks`) and publish a `SamModel`.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError, DataError and FileFormatError for settings and data that cannot be used, TrainingError for a run
    that diverges.
    """
    hooks = hooks or Hooks()
    settings = settings.model_copy(update={"name": settings.name or "masks"})
    assert settings.name is not None
    check_model_name(settings.name)
    if not sources:
        raise UsageError("no masks to train on", remedy="name a folder of cut-outs: craton pretrain-masks FOLDER")
    with joined(settings.training.tensor_parallel) as ranks:
        data = _read(sources, settings, hooks)
        if dry_run:
            rehearse(_job(settings, _plan(settings, data), data, None, ranks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        parents += [Parent(relation="evaluated_on", name=source) for source in settings.evaluation]
        if settings.model is not None:
            parents.append(Parent(relation="base", name=find(settings.model).id))
        run = new_run(
            KIND, settings, provenance, sources=sources, parents=tuple(parents), name=settings.name, ranks=ranks
        )
        with at_work(run, ranks):
            plan = _plan(settings, data)
            if ranks.is_first:
                plan.save(run.folder)
            return carry_out(run, _job(settings, plan, data, run.checkpoints_folder, ranks), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the pictures or masks are not what they were.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(MaskPretrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        plan, data = Plan.load(run.folder), _read(config["sources"], settings, hooks)
        check_same_data(data.training.digest, plan.digest, "the masks, pictures or backgrounds", config["sources"])
        job = _job(settings, plan, data, run.checkpoints_folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def segmenter_config(parameters: int, *, image: int, patch: int) -> SegmenterConfig:
    """A segmenter of about so many parameters: a Vision Transformer of 4 + width / 128 layers, and a decoder of two,
    half as wide but 64 at least and SAM's 256 at most.

    Raises UsageError for patches that do not fit the picture.
    """
    if image % patch:
        raise UsageError(f"a picture of {image} pixels is not made of whole patches of {patch}", where="--patch")

    def config(width: int) -> SegmenterConfig:
        layer = LayerConfig(
            attention=AttentionConfig(
                heads=width // STEP, kv_heads=width // STEP, head_size=STEP, mask="full", bias=("q", "k", "v", "o")
            ),
            feedforward=FeedForwardConfig(hidden=4 * width, activation="gelu", bias=True),
            norm=NORM,
        )
        trunk = TrunkConfig(width=width, layers=(layer,) * round(4 + width / 128))
        vision = VisionConfig(image=(image, image), patch=patch, trunk=trunk, class_token=False, pooling="mean")
        narrow = min(256, max(64, width // 2 // STEP * STEP))
        return SegmenterConfig(vision=vision, width=narrow, heads=narrow // STEP, hidden=4 * narrow, iou_hidden=narrow)

    def count(width: int) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Segmenter(config(width)).parameters())

    low, high = 2, 128  # times STEP
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle * STEP) <= parameters else (low, middle)
    return config(min((low * STEP, high * STEP), key=lambda width: abs(np.log(count(width) / parameters))))


def _continued(settings: MaskPretrainSettings) -> tuple[Checkpoint, SquarePreparation] | None:
    """The model to go on with, and how pictures are prepared for it."""
    if settings.model is None:
        return None
    checkpoint = Checkpoint.open(find(settings.model).path)
    if not isinstance(checkpoint.config, SegmenterConfig):
        raise UsageError(f"{settings.model} is no segmenter", remedy="go on with a SamModel")
    return checkpoint, SquarePreparation.read(checkpoint.folder)


def _read(sources: Sequence[str], settings: MaskPretrainSettings, hooks: Hooks) -> _Data:
    size, continued = settings.image_size, _continued(settings)
    if continued is not None:
        size = continued[1].side
    if settings.scenes.smallest > settings.scenes.largest:
        raise UsageError("the smallest cut-out is larger than the largest", where="--smallest, --largest")

    def read(some: Sequence[str]) -> MaskSet:
        return read_masks(
            some,
            size=size,
            backgrounds=settings.backgrounds,
            images=settings.images,
            on_progress=hooks.on_progress,
        )

    masks = read(sources)
    behind = f"on {len(masks.backgrounds):,} backgrounds and" if masks.backgrounds else "on"
    decisions = []
    if masks.cutouts:
        decisions.append(f"{len(masks.cutouts):,} cut-outs, pasted {behind} generated backgrounds of {size} x {size}")
    if masks.pictures:
        things = sum(len(picture.bits) for picture in masks.pictures)
        decisions.append(f"{len(masks.pictures):,} pictures with {things:,} outlined things")
    if masks.skipped:
        decisions.append(f"{masks.skipped:,} pictures are no cut-outs: nothing of them is transparent, or nothing else")
    if settings.evaluation:
        training, held_out = masks, read(settings.evaluation)
    else:
        training, held_out = masks.split(settings.holdout, settings.training.seed)
        decisions.append(f"{len(held_out):,} of them kept apart for evaluation")
    return _Data(training, held_out, tuple(decisions))


def _plan(settings: MaskPretrainSettings, data: _Data) -> Plan:
    continued = _continued(settings)
    if continued is not None:
        return Plan(data.training.digest, continued[1].mean, continued[1].std, None)
    # Of a few scenes: more would not change a digit that matters.
    scenes = (
        data.training.scene(place, settings.scenes, Draws(settings.training.seed, place))
        for place in range(0, len(data.training), max(1, len(data.training) // SAMPLE))
    )
    pixels = [scene.pixels[: scene.height, : scene.width].reshape(-1, 3) for scene in scenes]
    sample = np.concatenate(pixels).astype(np.float32) / 255
    mean, std = (tuple(round(float(v), 4) for v in values) for values in (sample.mean(0), sample.std(0) + 1e-3))
    return Plan(data.training.digest, mean, std, None)


def _job(settings: MaskPretrainSettings, plan: Plan, data: _Data, folder: Path | None, ranks: Ranks) -> Job:
    training = settings.training
    use_threads(training.threads)
    torch.manual_seed(training.seed)
    dtype, why = compute_dtype(training.dtype, ranks.device)
    model, decisions = _model(settings, data)
    model.requires_grad_(True)
    model.prompts.positions.requires_grad_(False)  # its frequencies are drawn once for all
    if not settings.prompts.corrections:
        # Nothing is fed back: what never has a gradient has no state in the optimiser that a resume could find.
        for part in (model.prompts.mask_in, model.prompts.mask_middle, model.prompts.mask_out):
            part.requires_grad_(False)
        for norm in (model.prompts.mask_norm, model.prompts.mask_middle_norm):
            norm.requires_grad_(False)
    vision = model.config.vision
    tokens = vision.grid[0] * vision.grid[1]
    shown: dict[str, Any] = {
        "batch": training.batch, "micro": max(1, training.micro_tokens // tokens), "patch": vision.patch,
        "mean": plan.mean, "std": plan.std, "seed": training.seed, "rank": ranks.data_rank,
        "world": ranks.data_world, "scenes": settings.scenes, "prompts": settings.prompts,
    }  # fmt: skip
    held_out: Sequence[MaskBatch] = SceneLoader(data.held_out, **shown).all() if len(data.held_out) else []
    trainer = Trainer(
        model,
        PromptedMasks(settings.prompts.shared),
        SceneLoader(data.training, **shown),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        folder=folder,
    )

    def save(target: Path) -> None:
        save_checkpoint(model, SAM, target)
        replace_file(target / PREPROCESSING_NAME, json.dumps(_preparation(model, plan).to_config(), indent=2).encode())

    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=None,
        dtype=dtype,
        length=tokens,
        decisions=(*data.decisions, *decisions, f"activations in {str(dtype).removeprefix('torch.')}: {why}"),
        save=save,
        licence=find(settings.model).licence if settings.model is not None else None,
        tensorboard=settings.tensorboard,
    )


def _preparation(model: Segmenter, plan: Plan) -> SquarePreparation:
    (red, green, blue), (red_std, green_std, blue_std) = plan.mean, plan.std
    return SquarePreparation(
        side=model.config.side,
        mask=model.config.mask_size[0],
        mean=(red, green, blue),
        std=(red_std, green_std, blue_std),
    )


def _model(settings: MaskPretrainSettings, data: _Data) -> tuple[Segmenter, tuple[str, ...]]:
    continued = _continued(settings)
    if continued is not None:
        loaded = continued[0].load(torch.float32)
        assert isinstance(loaded, Segmenter)
        return loaded, (f"goes on with {settings.model}",)
    config = segmenter_config(parse_size(settings.size), image=data.training.size, patch=settings.patch)
    model = Segmenter(config)
    initialise(model, settings.training.seed)
    trunk, grid, mask = config.vision.trunk, config.vision.grid, config.mask_size
    return model, (
        f"encoder: width {trunk.width}, {len(trunk.layers)} layers, {grid[0] * grid[1]} patches",
        f"decoder: width {config.width}, {config.layers} layers; masks of {mask[0]} x {mask[1]}",
    )
