"""Training a projector: from a CLIP or SigLIP, a language model and files to a LLaVA in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families.llava import LLAVA, with_pictures
from craton.checkpoints.families.vision_text import VISION_TEXT
from craton.checkpoints.save import save_checkpoint, save_preprocessing
from craton.config import parse
from craton.data.batch import Batch
from craton.data.chat_pictures import ChatPictures
from craton.data.example import Example
from craton.data.loader import ListSource, Loader
from craton.errors import UsageError
from craton.modalities.image import ImagePreprocessing, read_preprocessing
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, DualEncoder, DualEncoderConfig, ImageChat, ImageChatConfig
from craton.pretraining.image_chat.data import ChatSet, read_chats
from craton.pretraining.image_chat.joining import (
    check_language,
    join,
    read_layers,
    seeing_tokenizer,
    write_processor,
)
from craton.pretraining.image_chat.settings import ChatPretrainSettings
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run
from craton.training.hardware import compute_dtype, use_threads
from craton.training.image_chat import SeeingNextToken
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

KIND: Final = "pretrain-chat"
DIGEST_NAME: Final = "chats.sha256"


@dataclass(frozen=True)
class _Parts:
    """What is joined: opened and understood, and not loaded."""

    sees: StoredModel
    speaks: StoredModel
    vision: Checkpoint
    language: Checkpoint
    tokenizer: Tokenizer
    config: ImageChatConfig
    preprocessing: ImagePreprocessing


def pretrain_chat(
    sources: Sequence[str],
    settings: ChatPretrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Join `settings.vision` and `settings.language`, train the projector between them on `sources` (see `read_chats`)
    and publish a `LlavaForConditionalGeneration`.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept.

    Raises UsageError for models that do not fit together and under torchrun, DataError and FileFormatError for data
    that cannot be used, TrainingError for a run that diverges.
    """
    hooks = hooks or Hooks()
    if not sources:
        raise UsageError(
            "no data to train on", remedy="name a table: craton pretrain-chat DATA --vision A --language B"
        )
    parts = _open(settings)
    name = settings.name or f"{parts.speaks.name}-sees"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    with joined(settings.training.tensor_parallel) as ranks:
        _refuse_ranks(ranks)
        data = _read(sources, settings, parts, hooks)
        if dry_run:
            rehearse(_job(settings, parts, data, None, ranks, hooks), hooks)
            return None
        parents = (
            Parent(relation="base", name=_reference(parts.speaks)),
            Parent(relation="base", name=_reference(parts.sees)),
            *(Parent(relation="trained_on", name=source) for source in sources),
            *(Parent(relation="evaluated_on", name=source) for source in settings.evaluation),
        )
        run = new_run(KIND, settings, provenance, sources=sources, parents=parents, name=name, ranks=ranks)
        with at_work(run, ranks):
            replace_file(run.folder / DIGEST_NAME, data.digest.encode())
            return carry_out(run, _job(settings, parts, data, run.checkpoints_folder, ranks, hooks), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the conversations or pictures are not what they were.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(ChatPretrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        _refuse_ranks(ranks)
        digest = run.folder / DIGEST_NAME
        if not digest.exists():
            raise UsageError("this run stopped before its first step", where=str(run.folder), remedy="start it anew")
        parts = _open(settings)
        data = _read(config["sources"], settings, parts, hooks)
        check_same_data(data.digest, digest.read_text(), "the conversations or pictures", config["sources"])
        job = _job(settings, parts, data, run.checkpoints_folder, ranks, hooks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _refuse_ranks(ranks: Ranks) -> None:
    if ranks.world > 1:
        raise UsageError("a projector is trained in one process", remedy="start it without torchrun")


def _open(settings: ChatPretrainSettings) -> _Parts:
    if settings.vision is None or settings.language is None:
        raise UsageError(
            "two models are joined: one that sees and one that speaks",
            where="--vision" if settings.vision is None else "--language",
            remedy="for instance --vision hf:openai/clip-vit-base-patch32 --language smollm2-135m-instruct",
        )
    sees, speaks = find(settings.vision), find(settings.language)
    vision, language = Checkpoint.open(sees.path), Checkpoint.open(speaks.path)
    if not isinstance(vision.config, DualEncoderConfig) or vision.family is VISION_TEXT:
        raise UsageError(
            f"{settings.vision} cannot be the vision tower: LLaVA's files hold a CLIP or a SigLIP there",
            where="--vision",
            remedy="take one of these, published or grown by craton pretrain-pairs",
        )
    text = check_language(language.family.name, language.config)
    tokenizer, token = seeing_tokenizer(language.tokenizer())
    text = text.model_copy(update={"vocab": max(text.vocab, token + 1)})
    return _Parts(
        sees,
        speaks,
        vision,
        language,
        tokenizer,
        with_pictures(text, vision=read_layers(vision.config.vision), image_token=token),
        read_preprocessing(vision.folder),
    )


def _read(sources: Sequence[str], settings: ChatPretrainSettings, parts: _Parts, hooks: Hooks) -> ChatSet:
    context = parts.config.context
    return read_chats(
        sources,
        settings.evaluation,
        parts.tokenizer,
        ChatPictures(parts.config, parts.tokenizer, parts.vision.folder),
        question=settings.question,
        limit=min(settings.max_tokens or context, context),
        holdout=settings.holdout,
        seed=settings.training.seed,
        on_progress=hooks.on_progress,
    )


def _job(
    settings: ChatPretrainSettings, parts: _Parts, data: ChatSet, folder: Path | None, ranks: Ranks, hooks: Hooks
) -> Job:
    training = settings.training
    use_threads(training.threads)
    torch.manual_seed(training.seed)
    dtype, why = compute_dtype(training.dtype, ranks.device)
    hooks.on_progress(f"loading {parts.sees.id} and {parts.speaks.id}")
    vision, language = parts.vision.load(dtype), parts.language.load(dtype)
    assert isinstance(vision, DualEncoder)
    assert isinstance(language, CausalLM)
    model = join(vision, language, parts.config.image_token, training.seed)

    def loader(examples: list[Example], *, held_out: bool = False) -> Loader:
        return Loader(
            ListSource(examples),
            batch=len(examples) if held_out else training.batch,
            micro_tokens=training.micro_tokens,
            seed=training.seed,
            shuffle=not held_out,
        )

    measured: list[Batch] = loader(data.held_out, held_out=True).step(0) if data.held_out else []
    trainer = Trainer(
        model,
        SeeingNextToken(),
        loader(data.training),
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=measured,
        folder=folder,
    )
    lengths = sorted(example.tokens for example in data.training)
    sees = model.config.vision
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=parts.tokenizer,
        dtype=dtype,
        length=lengths[len(lengths) // 2],
        decisions=(
            *data.decisions,
            f"a picture of {sees.image[0]} x {sees.image[1]} becomes {model.config.picture_tokens} tokens, from layer "
            f"{len(sees.trunk.layers)} of {len(sees.trunk.layers) + 1}",
            "the projector alone is trained; vision tower and language model stay as they are",
            f"activations in {str(dtype).removeprefix('torch.')}: {why}",
        ),
        save=lambda target: _save(model, parts, dtype, target),
        licence=parts.speaks.licence,
        tensorboard=settings.tensorboard,
    )


def _save(model: ImageChat, parts: _Parts, dtype: torch.dtype, folder: Path) -> None:
    save_checkpoint(model.to(dtype), LLAVA, folder, tokenizer=parts.tokenizer)
    save_preprocessing(parts.preprocessing, folder)
    write_processor(model, parts.tokenizer, folder)


def _reference(base: StoredModel) -> str:
    """How a part is found again: by its stored id, or by where it came from."""
    return base.id if base.version else base.source
