"""Training on pictures with captions: from files to a CLIP or SigLIP in the store, fresh or continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.clip import CLIP
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.siglip import SIGLIP
from craton.checkpoints.save import save_checkpoint, save_tokenizer
from craton.config import parse
from craton.config.sizes import parse_size
from craton.data.picture_batches import PictureBatch, PictureLoader
from craton.data.pictures import PictureSet
from craton.errors import UsageError
from craton.modalities.image import ImagePreprocessing, read_preprocessing
from craton.modalities.text import Tokenizer
from craton.models import DualEncoder, DualEncoderConfig
from craton.models.initialisation import initialise
from craton.pretraining.image_text.architecture import dual_encoder_config
from craton.pretraining.image_text.data import caption_tokenizer, encode_captions, read_pairs
from craton.pretraining.image_text.objectives import ImageText, PairLoss, limit_scale
from craton.pretraining.image_text.settings import PairPretrainSettings
from craton.pretraining.images.pretrain import Plan
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.folders import make_folder
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

KIND: Final = "pretrain-pairs"


@dataclass(frozen=True)
class _Data:
    training: PictureSet
    held_out: PictureSet
    size: int
    decisions: tuple[str, ...]


def pretrain_pairs(
    sources: Sequence[str],
    settings: PairPretrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train on the pictures and captions of `sources` (see `read_pairs`) and publish a `CLIPModel` or `SiglipModel`.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept.

    Raises UsageError, DataError and FileFormatError for settings and data that cannot be used, UsageError under
    torchrun, where pictures of other ranks would be missing among the negatives, TrainingError for a run that diverges.
    """
    hooks = hooks or Hooks()
    name = settings.name or f"pairs-{_loss(settings, None)}"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no pictures to train on", remedy="name a table or a folder: craton pretrain-pairs FOLDER")
    with joined(settings.training.tensor_parallel) as ranks:
        _refuse_ranks(ranks)
        data = _read(sources, settings, hooks)
        if dry_run:
            rehearse(_job(settings, _plan(settings, data), _tokenizer(settings, data), data, None, ranks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        parents += [Parent(relation="evaluated_on", name=source) for source in settings.evaluation]
        if settings.model is not None:
            parents.append(Parent(relation="base", name=find(settings.model).id))
        run = new_run(KIND, settings, provenance, sources=sources, parents=tuple(parents), name=name, ranks=ranks)
        with at_work(run, ranks):
            plan, tokenizer = _plan(settings, data), _tokenizer(settings, data)
            save_tokenizer(tokenizer, make_folder(run.folder / "tokenizer"))
            plan.save(run.folder)
            job = _job(settings, plan, tokenizer, data, run.checkpoints_folder, ranks)
            return carry_out(run, job, ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the pictures or captions are not what they were.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(PairPretrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        _refuse_ranks(ranks)
        plan, data = Plan.load(run.folder), _read(config["sources"], settings, hooks)
        check_same_data(data.training.digest, plan.digest, "the pictures or captions", config["sources"])
        tokenizer = Tokenizer.from_folder(run.folder / "tokenizer")
        job = _job(settings, plan, tokenizer, data, run.checkpoints_folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _refuse_ranks(ranks: Ranks) -> None:
    if ranks.world > 1:
        raise UsageError(
            "pairs are trained in one process: the pictures of other ranks would be missing among the negatives",
            remedy="start it without torchrun; a batch of any size fits, as it goes through the model in parts",
        )


def _continued(settings: PairPretrainSettings) -> Checkpoint | None:
    """The model to go on with, if any."""
    if settings.model is None:
        return None
    checkpoint = Checkpoint.open(find(settings.model).path)
    if not isinstance(checkpoint.config, DualEncoderConfig):
        raise UsageError(f"{settings.model} is no model of pictures and texts", remedy="go on with a CLIP or a SigLIP")
    return checkpoint


def _loss(settings: PairPretrainSettings, config: DualEncoderConfig | None) -> PairLoss:
    """What is minimised: what was asked for, which a model that is gone on with must have parameters for."""
    checkpoint = _continued(settings) if config is None else None
    known = config or (checkpoint.config if checkpoint is not None else None)
    if not isinstance(known, DualEncoderConfig):
        return settings.loss or "softmax"
    own: PairLoss = "sigmoid" if known.logit_bias else "softmax"
    if settings.loss not in (None, own):
        raise UsageError(
            f"this model was trained with {own}, and has no parameters of its own for {settings.loss}",
            where="--loss",
            remedy=f"leave out --loss, or say --loss {own}",
        )
    return own


def _read(sources: Sequence[str], settings: PairPretrainSettings, hooks: Hooks) -> _Data:
    size, checkpoint = settings.image_size, _continued(settings)
    if checkpoint is not None:
        preprocessing = read_preprocessing(checkpoint.folder)
        size = (preprocessing.crop or preprocessing.size)[0]
    pairs = read_pairs(sources, size=size, on_progress=hooks.on_progress)
    decisions = [f"{len(pairs):,} pictures of {size} x {size} with {len(set(pairs.captions or ())):,} captions"]
    if settings.evaluation:
        training, held_out = pairs, read_pairs(settings.evaluation, size=size, on_progress=hooks.on_progress)
    else:
        training, held_out = pairs.split(settings.holdout, settings.training.seed)
        decisions.append(f"{len(held_out):,} of them kept apart for evaluation")
    if len(training) < 2:
        raise UsageError("a single picture has nothing to be told from", remedy="train on two pairs or more")
    return _Data(training, held_out, size, tuple(decisions))


def _plan(settings: PairPretrainSettings, data: _Data) -> Plan:
    checkpoint = _continued(settings)
    if checkpoint is not None:
        preprocessing = read_preprocessing(checkpoint.folder)
        return Plan(data.training.digest, preprocessing.mean, preprocessing.std, None)
    # Of the first pictures: more would not change a digit that matters.
    sample = data.training.pixels[:20_000].reshape(-1, 3).astype(np.float32) / 255
    mean, std = (tuple(round(float(v), 4) for v in values) for values in (sample.mean(0), sample.std(0) + 1e-3))
    return Plan(data.training.digest, mean, std, None)


def _tokenizer(settings: PairPretrainSettings, data: _Data) -> Tokenizer:
    checkpoint = _continued(settings)
    if checkpoint is not None:
        return checkpoint.tokenizer()
    return caption_tokenizer(data.training.captions or (), settings.vocab)


def _job(
    settings: PairPretrainSettings,
    plan: Plan,
    tokenizer: Tokenizer,
    data: _Data,
    folder: Path | None,
    ranks: Ranks,
) -> Job:
    training = settings.training
    use_threads(training.threads)
    torch.manual_seed(training.seed)
    dtype, why = compute_dtype(training.dtype, ranks.device)
    model, family, decisions = _model(settings, tokenizer, data)
    config = model.config
    tokens = config.vision.grid[0] * config.vision.grid[1] + config.vision.extra
    texts, cut = encode_captions(tokenizer, data.training.captions or (), config.context)
    if cut:
        decisions += (f"{cut:,} captions are cut to {config.context} tokens",)
    read = config.context if config.pad is not None else -(-sum(map(len, texts)) // len(texts))
    micro = max(1, training.micro_tokens // (tokens + read))
    parts = -(-min(training.batch, len(texts)) // micro)
    if parts > 1:
        decisions += (f"a step's pairs go through the model in {parts} parts, twice (gradient caching)",)
    # One batch holds what is compared, so held-out pairs are measured in batches of the same size.
    shown: dict[str, Any] = {
        "batch": training.batch, "micro": training.batch, "patch": config.vision.patch, "mean": plan.mean,
        "std": plan.std, "seed": training.seed, "whole_steps": True,
    }  # fmt: skip
    held_out: Sequence[PictureBatch] = []
    if len(data.held_out):
        held_texts, _ = encode_captions(tokenizer, data.held_out.captions or (), config.context)
        held_out = PictureLoader(data.held_out, **shown, texts=held_texts).all(training.batch)
    trainer = Trainer(
        model,
        ImageText(_loss(settings, config), micro=micro),
        PictureLoader(data.training, **shown, texts=texts, augment=settings.augment),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        folder=folder,
    )
    preprocessing = ImagePreprocessing.square(data.size, plan.mean, plan.std)

    def save(target: Path) -> None:
        if family is CLIP:
            limit_scale(model)  # the last update may have taken it beyond
        save_checkpoint(model, family, target, tokenizer=tokenizer, preprocessing=preprocessing)

    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=tokenizer,
        dtype=dtype,
        length=tokens,
        decisions=(*data.decisions, *decisions, f"activations in {str(dtype).removeprefix('torch.')}: {why}"),
        save=save,
        tensorboard=settings.tensorboard,
    )


def _model(
    settings: PairPretrainSettings, tokenizer: Tokenizer, data: _Data
) -> tuple[DualEncoder, Family, tuple[str, ...]]:
    checkpoint = _continued(settings)
    if checkpoint is not None:
        loaded = checkpoint.load(torch.float32)
        assert isinstance(loaded, DualEncoder)
        loaded.requires_grad_(True)
        return loaded, checkpoint.family, (f"goes on with {settings.model}",)
    loss, pad = _loss(settings, None), tokenizer.pad_id
    assert pad is not None
    config = dual_encoder_config(
        parse_size(settings.size),
        loss,
        image=data.size,
        patch=settings.patch,
        vocab=tokenizer.vocab_size,
        context=settings.context,
        pad=pad,
    )
    model = DualEncoder(config)
    initialise(model, settings.training.seed)
    sees, reads = config.vision.trunk, config.text.trunk
    return (
        model,
        SIGLIP if loss == "sigmoid" else CLIP,
        (
            f"pictures: width {sees.width}, {len(sees.layers)} layers, {config.vision.grid[0] ** 2} patches",
            f"texts: width {reads.width}, {len(reads.layers)} layers, {config.vocab:,} tokens",
        ),
    )
