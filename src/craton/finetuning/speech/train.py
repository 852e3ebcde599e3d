"""Training on speech: from recordings with their texts to a Whisper in the store, fresh or continued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families.whisper import WHISPER
from craton.checkpoints.families.whisper_generation import WhisperGeneration, read_generation, write_generation
from craton.checkpoints.safetensors import open_weights, write_safetensors
from craton.checkpoints.save import save_checkpoint, save_tokenizer
from craton.config import parse
from craton.config.sizes import parse_size
from craton.data.speech import SpeechSet, read_speech
from craton.data.speech_batches import FRAMES_PER_VECTOR, SpeechLoader, SpeechWriter
from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import DEFAULT_ADAPTER
from craton.finetuning.lora import apply_lora
from craton.finetuning.merging import merge_adapter
from craton.finetuning.speech.fresh import (
    fresh_model,
    let_all_be_trained,
    shortened,
    speech_config,
    speech_tokenizer,
)
from craton.finetuning.speech.objective import SpeechRecognition
from craton.finetuning.speech.settings import FRESH_WINDOW, SpeechTrainSettings
from craton.modalities.audio import FRAMES_PER_SECOND, HOP, SAMPLE_RATE, SpeechTokens
from craton.modalities.text import Tokenizer
from craton.models import Seq2Seq, Seq2SeqConfig
from craton.models.ctc import CTCSeq2Seq
from craton.models.initialisation import initialise
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.folders import make_folder
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.training.hardware import use_threads
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

KIND: Final = "pretrain-speech"
DIGEST_NAME: Final = "speech.sha256"
CTC_HEAD_NAME: Final = "ctc_head.safetensors"


@dataclass(frozen=True)
class _Base:
    """What is gone on with."""

    checkpoint: Checkpoint
    config: Seq2SeqConfig
    facts: WhisperGeneration


@dataclass(frozen=True)
class _Data:
    training: SpeechSet
    held_out: SpeechSet
    decisions: tuple[str, ...]


def train_speech(
    sources: Sequence[str],
    settings: SpeechTrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train on the recordings of `sources` (see `read_speech`) and publish a Whisper in Hugging Face's layout.

    With CTC, its head is saved beside the model (`ctc_head.safetensors`: weight and bias [labels + 1], the blank last),
    and gone on with where the model is. After "ctc" alone the decoder has learnt nothing: the model is a beginning for
    the other objectives.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError, DataError and FileFormatError for settings and data that cannot be used, TrainingError for a run
    that diverges.
    """
    hooks = hooks or Hooks()
    name = settings.name or f"speech-{settings.objective}"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no recordings to train on", remedy="name a folder: craton pretrain-speech FOLDER")
    with joined(settings.training.tensor_parallel) as ranks:
        base = _base(settings)
        data = _read(sources, settings, base, hooks)
        if dry_run:
            rehearse(_job(settings, base, _tokenizer(settings, base, data), data, None, ranks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        parents += [Parent(relation="evaluated_on", name=source) for source in settings.evaluation]
        if settings.model is not None:
            parents.append(Parent(relation="base", name=find(settings.model).id))
        run = new_run(KIND, settings, provenance, sources=sources, parents=tuple(parents), name=name, ranks=ranks)
        with at_work(run, ranks):
            tokenizer = _tokenizer(settings, base, data)
            if ranks.is_first:
                save_tokenizer(tokenizer, make_folder(run.folder / "tokenizer"))
                replace_file(run.folder / DIGEST_NAME, data.training.digest.encode())
            return carry_out(run, _job(settings, base, tokenizer, data, run.checkpoints_folder, ranks), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the recordings or texts are not what they were.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(SpeechTrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        digest = run.folder / DIGEST_NAME
        if not digest.exists():
            raise UsageError("this run stopped before its first step", where=str(run.folder), remedy="start it anew")
        base = _base(settings)
        data = _read(config["sources"], settings, base, hooks)
        check_same_data(data.training.digest, digest.read_text(), "the recordings or texts", config["sources"])
        tokenizer = Tokenizer.from_folder(run.folder / "tokenizer")
        job = _job(settings, base, tokenizer, data, run.checkpoints_folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _base(settings: SpeechTrainSettings) -> _Base | None:
    if settings.model is None:
        if settings.method == "lora":
            raise UsageError("an adapter needs a model", where="--method", remedy="name it: --model whisper-tiny.en")
        return None
    checkpoint = Checkpoint.open(find(settings.model).path)
    if not isinstance(checkpoint.config, Seq2SeqConfig):
        raise UsageError(f"{settings.model} is no speech model", where="--model", remedy="go on with a Whisper")
    if settings.method == "lora" and settings.objective != "seq2seq":
        raise UsageError(
            "an adapter learns from the decoder's text alone", where="--method", remedy="leave out --objective"
        )
    return _Base(checkpoint, checkpoint.config, read_generation(checkpoint.folder))


def _window(settings: SpeechTrainSettings, base: _Base | None) -> int:
    """Seconds."""
    usual = FRESH_WINDOW if base is None else FRAMES_PER_VECTOR * base.config.frames * HOP // SAMPLE_RATE
    return settings.window or usual


def _read(sources: Sequence[str], settings: SpeechTrainSettings, base: _Base | None, hooks: Hooks) -> _Data:
    seconds = _window(settings, base)
    decisions: list[str] = []

    def read(some: Sequence[str]) -> SpeechSet:
        speech = read_speech(some, on_progress=hooks.on_progress)
        fitting = [i for i, samples in enumerate(speech.recordings) if len(samples) <= seconds * SAMPLE_RATE]
        if len(fitting) < len(speech):
            decisions.append(f"{len(speech) - len(fitting):,} recordings longer than {seconds} s are left out")
        return speech.take(fitting)

    training = read(sources)
    if settings.evaluation:
        held_out = read(settings.evaluation)
    else:
        training, held_out = training.split(settings.holdout, settings.training.seed)
    if not len(training):
        raise UsageError(
            f"no recording is of {seconds} s or less",
            where=", ".join(sources),
            remedy="cut them into sentences, or hear more at once: --window",
        )
    decisions.append(
        f"{len(training):,} recordings, {training.seconds / 60:.1f} minutes; {len(held_out):,} more for evaluation"
    )
    return _Data(training, held_out, tuple(decisions))


def _tokenizer(settings: SpeechTrainSettings, base: _Base | None, data: _Data) -> Tokenizer:
    if base is not None:
        return base.checkpoint.tokenizer()
    return speech_tokenizer(data.training.texts, settings.vocab, _window(settings, base))


def _control(settings: SpeechTrainSettings, base: _Base | None, tokenizer: Tokenizer, vocab: int) -> SpeechTokens:
    if base is None:
        # A text may begin with a space that is a piece of its own: of so small a vocabulary many words are in parts.
        return SpeechTokens.of(tokenizer, vocab, suppressed_first=tokenizer.eos_ids, multilingual=False)
    tokens = base.facts.tokens(tokenizer, vocab)
    if tokens.languages and settings.language not in tokens.languages:
        raise UnknownName("language", settings.language, tokens.languages)
    return tokens


def _job(
    settings: SpeechTrainSettings,
    base: _Base | None,
    tokenizer: Tokenizer,
    data: _Data,
    folder: Path | None,
    ranks: Ranks,
) -> Job:
    training = settings.training
    if training.dtype == "bfloat16":
        raise UsageError("speech models are trained in float32", where="--dtype", remedy="leave it out")
    use_threads(training.threads)
    torch.manual_seed(training.seed)
    module, decisions = _module(settings, base, tokenizer)
    config = module.config
    tokens = _control(settings, base, tokenizer, config.vocab)
    weight = {"seq2seq": 0.0, "ctc": 1.0, "both": settings.ctc_weight}[settings.objective]
    learner: nn.Module = module if not weight else _with_ctc(module, tokens.end, settings, base)
    shown: dict[str, Any] = {
        "batch": training.batch,
        # At most so many tokens go through the model at once, whatever the length of its window.
        "micro": max(1, training.micro_tokens // config.frames),
        "mels": config.mels,
        "vectors": config.frames,
        "seed": training.seed,
        "rank": ranks.data_rank,
        "world": ranks.data_world,
    }
    writer = SpeechWriter(tokens, settings.language)
    speech, texts, left_out = _fitting(data.training, tokenizer, config, tokens.end, ctc=weight > 0)
    if left_out:
        decisions += (f"{left_out:,} recordings with a longer text than the model can write are left out",)
    held_out, held_texts, _ = _fitting(data.held_out, tokenizer, config, tokens.end, ctc=weight > 0)
    trainer = Trainer(
        learner,
        SpeechRecognition(weight),
        SpeechLoader(speech, texts, writer, **shown, augment=settings.augment),
        training,
        dtype=torch.float32,
        ranks=ranks,
        held_out=SpeechLoader(held_out, held_texts, writer, **shown).all() if len(held_out) else [],
        folder=folder,
    )
    heads = base.facts.alignment_heads if base is not None else ()
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=None,
        dtype=torch.float32,
        length=config.frames,
        decisions=(*data.decisions, *decisions, "activations in float32, as speech models are trained"),
        save=lambda target: _save(learner, module, tokenizer, tokens, heads, target, adapter=settings.method == "lora"),
        tensorboard=settings.tensorboard,
    )


def _module(settings: SpeechTrainSettings, base: _Base | None, tokenizer: Tokenizer) -> tuple[Seq2Seq, tuple[str, ...]]:
    seconds = _window(settings, base)
    if base is None:
        config = speech_config(
            parse_size(settings.size),
            seconds=seconds,
            mels=settings.mels,
            vocab=tokenizer.vocab_size,
            context=settings.context,
        )
        module = fresh_model(config, settings.training.seed)
        let_all_be_trained(module)
        encoder, decoder = config.encoder, config.decoder
        return module, (
            f"width {encoder.width}; {len(encoder.layers)} layers hear {seconds} s, {len(decoder.layers)} write",
            f"{config.vocab:,} tokens, of which {seconds * 50 + 1:,} are times",
        )
    loaded = base.checkpoint.load(torch.float32)
    assert isinstance(loaded, Seq2Seq)
    loaded = shortened(loaded, seconds * FRAMES_PER_SECOND // FRAMES_PER_VECTOR)
    if settings.method == "lora":
        loaded.requires_grad_(False)
        layers = apply_lora(loaded, settings.lora)
        return loaded, (
            f"an adapter on {len(layers)} layers of {settings.model}, merged in at the end",
            f"it hears {seconds} s at once",
        )
    let_all_be_trained(loaded)
    return loaded, (f"goes on with {settings.model}, which hears {seconds} s at once",)


def _with_ctc(module: Seq2Seq, labels: int, settings: SpeechTrainSettings, base: _Base | None) -> CTCSeq2Seq:
    learner = CTCSeq2Seq(module, labels)
    initialise(learner.ctc_head, settings.training.seed)
    saved = base.checkpoint.folder / CTC_HEAD_NAME if base is not None else None
    if saved is not None and saved.is_file():
        weights = open_weights(saved)
        learner.ctc_head.load_state_dict({name: weights.tensor(name) for name in ("weight", "bias")})
    if settings.objective == "ctc":
        # What takes no part has no gradient, and would only be decayed.
        for part in (module.decoder, module.embedding, module.head):
            part.requires_grad_(False)
    return learner


def _fitting(
    speech: SpeechSet, tokenizer: Tokenizer, config: Seq2SeqConfig, end: int, *, ctc: bool
) -> tuple[SpeechSet, list[list[int]], int]:
    """The recordings whose texts the model can write, their tokens, and how many others there were."""
    texts = tokenizer.encode_batch([f" {text}" for text in speech.texts], add_special_tokens=False)
    # Half the context is the text before; three tokens are the start, a time, and the last time or the end.
    limit = config.context // 2 - 3

    def fits(ids: Sequence[int]) -> bool:
        # CTC needs a vector for each label, and one between two that are the same.
        needed = len(ids) + sum(a == b for a, b in pairwise(ids))
        return 0 < len(ids) <= limit and max(ids) < end and (not ctc or needed <= config.frames)

    chosen = [i for i, ids in enumerate(texts) if fits(ids)]
    return speech.take(chosen), [list(texts[i]) for i in chosen], len(speech) - len(chosen)


def _save(
    learner: nn.Module,
    module: Seq2Seq,
    tokenizer: Tokenizer,
    tokens: SpeechTokens,
    heads: tuple[tuple[int, int], ...],
    folder: Path,
    *,
    adapter: bool,
) -> None:
    if adapter:
        merge_adapter(module, DEFAULT_ADAPTER)
    save_checkpoint(module, WHISPER, folder, tokenizer=tokenizer)
    write_generation(folder, module.config, tokens, heads)
    if isinstance(learner, CTCSeq2Seq):
        write_safetensors(folder / CTC_HEAD_NAME, learner.ctc_head.state_dict())
