"""Training on pictures with captions: from files to a model of both in the store: a CLIP or SigLIP, or a text encoder
that was there already beside a side of pictures, fresh or continued.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.clip import CLIP
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.siglip import SIGLIP
from craton.checkpoints.families.vision_text import VISION_TEXT, VISIONS
from craton.checkpoints.save import save_checkpoint, save_tokenizer
from craton.config import parse
from craton.config.sizes import parse_size
from craton.data.picture_batches import PictureBatch, PictureLoader
from craton.data.pictures import PictureSet
from craton.errors import UsageError
from craton.modalities.image import ImagePreprocessing, read_preprocessing
from craton.modalities.text import Tokenizer
from craton.models import (
    DualEncoder,
    DualEncoderConfig,
    Encoder,
    EncoderConfig,
    ModelConfig,
    PoolingConfig,
    VisionConfig,
    VisionTransformer,
)
from craton.models.initialisation import initialise
from craton.pretraining.image_text.architecture import dual_encoder_config
from craton.pretraining.image_text.data import caption_tokenizer, encode_captions, read_pairs
from craton.pretraining.image_text.joining import join, likeness, lock_texts, pooled_encoder, read_locked
from craton.pretraining.image_text.objectives import ImageText, PairLoss, limit_scale
from craton.pretraining.image_text.settings import PairPretrainSettings
from craton.pretraining.images.pretrain import Plan, vision_config
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
class _Models:
    """What a run begins with, opened and not loaded. whole: a model of both. text, vision: sides of a new one."""

    whole: Checkpoint | None = None
    text: Checkpoint | None = None
    vision: Checkpoint | None = None

    @property
    def sees(self) -> Checkpoint | None:
        """What says how pictures are prepared."""
        return self.whole or self.vision

    @property
    def locked(self) -> bool:
        """Whether the side of texts stays as it is."""
        return self.text is not None or (self.whole is not None and self.whole.family is VISION_TEXT)


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
    """Train on the pictures and captions of `sources` (see `read_pairs`) and publish a `CLIPModel` or `SiglipModel`, or
    for a text encoder that is there already (`settings.text_model`) a `VisionTextDualEncoderModel`.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept.

    Raises UsageError, DataError and FileFormatError for settings and data that cannot be used, UsageError under
    torchrun, where pictures of other ranks would be missing among the negatives, TrainingError for a run that diverges.
    """
    hooks = hooks or Hooks()
    models = _open(settings)
    name = settings.name or f"pairs-{_loss(settings, models.whole.config if models.whole is not None else None)}"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no pictures to train on", remedy="name a table or a folder: craton pretrain-pairs FOLDER")
    with joined(settings.training.tensor_parallel) as ranks:
        _refuse_ranks(ranks)
        data = _read(sources, settings, models, hooks)
        if dry_run:
            plan, tokenizer = _plan(models, data), _tokenizer(settings, models, data)
            rehearse(_job(settings, models, plan, tokenizer, data, None, ranks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        parents += [Parent(relation="evaluated_on", name=source) for source in settings.evaluation]
        begun = (settings.model, settings.text_model, settings.vision_model)
        parents += [Parent(relation="base", name=find(base).id) for base in begun if base is not None]
        run = new_run(KIND, settings, provenance, sources=sources, parents=tuple(parents), name=name, ranks=ranks)
        with at_work(run, ranks):
            plan, tokenizer = _plan(models, data), _tokenizer(settings, models, data)
            save_tokenizer(tokenizer, make_folder(run.folder / "tokenizer"))
            plan.save(run.folder)
            job = _job(settings, models, plan, tokenizer, data, run.checkpoints_folder, ranks)
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
        plan, models = Plan.load(run.folder), _open(settings)
        data = _read(config["sources"], settings, models, hooks)
        check_same_data(data.training.digest, plan.digest, "the pictures or captions", config["sources"])
        tokenizer = Tokenizer.from_folder(run.folder / "tokenizer")
        job = _job(settings, models, plan, tokenizer, data, run.checkpoints_folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _refuse_ranks(ranks: Ranks) -> None:
    if ranks.world > 1:
        raise UsageError(
            "pairs are trained in one process: the pictures of other ranks would be missing among the negatives",
            remedy="start it without torchrun; a batch of any size fits, as it goes through the model in parts",
        )


def _open(settings: PairPretrainSettings) -> _Models:
    """The models to begin with, if any. Raises UsageError for those that are of another kind or do not go together."""
    if settings.model is not None and settings.text_model is not None:
        raise UsageError(
            "a model of both has its text side already",
            where="--text-model",
            remedy="name one of --model, --text-model",
        )
    if settings.vision_model is not None and settings.text_model is None:
        raise UsageError(
            "a side of pictures alone learns no words from this",
            where="--vision-model",
            remedy="name the text encoder that it is to go with, for instance --text-model minilm-l6-v2",
        )
    if settings.model is not None:
        whole = Checkpoint.open(find(settings.model).path)
        if not isinstance(whole.config, DualEncoderConfig):
            raise UsageError(
                f"{settings.model} is no model of pictures and texts", remedy="go on with a CLIP or a SigLIP"
            )
        return _Models(whole=whole)
    if settings.text_model is None:
        return _Models()
    text, vision = Checkpoint.open(find(settings.text_model).path), None
    if text.family.name != "bert" or not isinstance(text.config, EncoderConfig):
        raise UsageError(
            f"{settings.text_model} cannot be the text side: published files of this kind hold a BERT here",
            where="--text-model",
            remedy="take a BERT, MiniLM, BGE or E5, for instance --text-model minilm-l6-v2",
        )
    if settings.vision_model is not None:
        vision = Checkpoint.open(find(settings.vision_model).path)
        if vision.family.name not in VISIONS or not isinstance(vision.config, VisionConfig):
            raise UsageError(
                f"{settings.vision_model} cannot be the side of pictures",
                where="--vision-model",
                remedy="take a ViT or a DINOv2, published or grown by craton pretrain-images",
            )
        if vision.config.channels != 3:
            raise UsageError(
                "pictures with captions are read in colour, and this model sees grey", where="--vision-model"
            )
    return _Models(text=text, vision=vision)


def _loss(settings: PairPretrainSettings, config: ModelConfig | None) -> PairLoss:
    """What is minimised: what was asked for, which a model that is gone on with must have parameters for."""
    if not isinstance(config, DualEncoderConfig):
        if settings.text_model is not None and settings.loss == "sigmoid":
            raise UsageError(
                "the files of two encoders have no place for what sigmoid learns",
                where="--loss",
                remedy="leave out --loss, or say --loss softmax",
            )
        return settings.loss or "softmax"
    own: PairLoss = "sigmoid" if config.logit_bias else "softmax"
    if settings.loss not in (None, own):
        raise UsageError(
            f"this model was trained with {own}, and has no parameters of its own for {settings.loss}",
            where="--loss",
            remedy=f"leave out --loss, or say --loss {own}",
        )
    return own


def _read(sources: Sequence[str], settings: PairPretrainSettings, models: _Models, hooks: Hooks) -> _Data:
    size = settings.image_size
    if models.sees is not None:
        preprocessing = read_preprocessing(models.sees.folder)
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


def _plan(models: _Models, data: _Data) -> Plan:
    if models.sees is not None:
        preprocessing = read_preprocessing(models.sees.folder)
        return Plan(data.training.digest, preprocessing.mean, preprocessing.std, None)
    # Of the first pictures: more would not change a digit that matters.
    sample = data.training.pixels[:20_000].reshape(-1, 3).astype(np.float32) / 255
    mean, std = (tuple(round(float(v), 4) for v in values) for values in (sample.mean(0), sample.std(0) + 1e-3))
    return Plan(data.training.digest, mean, std, None)


def _tokenizer(settings: PairPretrainSettings, models: _Models, data: _Data) -> Tokenizer:
    checkpoint = models.whole or models.text
    if checkpoint is not None:
        return checkpoint.tokenizer()
    return caption_tokenizer(data.training.captions or (), settings.vocab)


def _job(
    settings: PairPretrainSettings,
    models: _Models,
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
    model, family, decisions = _model(settings, models, tokenizer, data)
    config = model.config
    tokens = config.vision.grid[0] * config.vision.grid[1] + config.vision.extra
    texts, cut = encode_captions(tokenizer, data.training.captions or (), config.context, lower=config.lower_case)
    held_texts, _ = encode_captions(tokenizer, data.held_out.captions or (), config.context, lower=config.lower_case)
    if cut:
        decisions += (f"{cut:,} captions are cut to {config.context} tokens",)
    known, read = None, config.context if config.pad is not None else -(-sum(map(len, texts)) // len(texts))
    if models.locked:
        known, read = read_locked(model, (*texts, *held_texts)), 0
        decisions += _said_of_texts(settings, models, known)
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
        held_out = PictureLoader(data.held_out, **shown, texts=held_texts).all(training.batch)
    trainer = Trainer(
        model,
        ImageText(_loss(settings, config), micro=micro, known=known),
        PictureLoader(data.training, **shown, texts=texts, augment=settings.augment),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        folder=folder,
    )
    preprocessing = ImagePreprocessing.square(data.size, plan.mean, plan.std)

    def save(target: Path) -> None:
        if family is not SIGLIP:
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
        licence=find(settings.text_model).licence if settings.text_model is not None else None,
        tensorboard=settings.tensorboard,
    )


def _model(
    settings: PairPretrainSettings, models: _Models, tokenizer: Tokenizer, data: _Data
) -> tuple[DualEncoder, Family, tuple[str, ...]]:
    if models.whole is not None:
        loaded = models.whole.load(torch.float32)
        assert isinstance(loaded, DualEncoder)
        loaded.requires_grad_(True)
        if models.locked:
            lock_texts(loaded)
        return loaded, models.whole.family, (f"goes on with {settings.model}",)
    if models.text is not None:
        return _joined(settings, models, data)
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
    reads = config.text.trunk
    return (
        model,
        SIGLIP if loss == "sigmoid" else CLIP,
        (
            _said_of_pictures(config.vision),
            f"texts: width {reads.width}, {len(reads.layers)} layers, {config.vocab:,} tokens",
        ),
    )


def _joined(
    settings: PairPretrainSettings, models: _Models, data: _Data
) -> tuple[DualEncoder, Family, tuple[str, ...]]:
    """The text encoder of the store, and a side of pictures from there or a fresh one."""
    if models.vision is None:
        config = vision_config(parse_size(settings.size), image=data.size, patch=settings.patch, channels=3)
        vision = VisionTransformer(config)
        initialise(vision, settings.training.seed)
        said = _said_of_pictures(config)
    else:
        loaded = models.vision.load(torch.float32)
        assert isinstance(loaded, VisionTransformer)
        vision, said = loaded.requires_grad_(True), f"pictures: begins with {settings.vision_model}"
    text, pooling = _text_model(models)
    return join(vision, pooled_encoder(text, pooling), settings.training.seed), VISION_TEXT, (said,)


def _text_model(models: _Models) -> tuple[Encoder, PoolingConfig]:
    assert models.text is not None
    text = models.text.load(torch.float32)
    assert isinstance(text, Encoder)
    return text, models.text.pooling or PoolingConfig()


def _said_of_texts(
    settings: PairPretrainSettings, models: _Models, known: Mapping[tuple[int, ...], Tensor]
) -> tuple[str, ...]:
    if models.text is None:
        return ("texts: stay as they are",)
    text, pooling = _text_model(models)
    near = likeness(text, pooling, known)
    return (
        f"texts: {settings.text_model} stays as it is; a pooler stands for its pooling ({pooling.mode}), the cosine of "
        f"both is at least {near:.4f} on {len(known):,} captions",
    )


def _said_of_pictures(config: VisionConfig) -> str:
    return f"pictures: width {config.trunk.width}, {len(config.trunk.layers)} layers, {config.grid[0] ** 2} patches"
