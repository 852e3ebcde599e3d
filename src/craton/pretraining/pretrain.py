"""Pretraining: from text, or from shards, to a model in the store. Next token or masked token, fresh or continued."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import TypeAdapter

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import BY_ARCHITECTURE
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.modernbert import MODERNBERT
from craton.checkpoints.save import save_checkpoint, save_tokenizer
from craton.config import parse
from craton.config.resolve import DEFAULT
from craton.config.sizes import parse_size
from craton.data.batch import Batch
from craton.data.forms import texts_of
from craton.data.loader import ExampleSource, Loader
from craton.data.mixture import window_source
from craton.data.prepare import PrepareSettings, prepare
from craton.data.records import read_records
from craton.data.schema import check_schema
from craton.data.shard_files import MANIFEST_NAME
from craton.data.shards import Shards, WindowSource, open_shards
from craton.errors import UsageError
from craton.modalities.text import Tokenizer
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, MaskedLM, MaskedLMConfig, ModelConfig, build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config, encoder_config, experts_config, family_of_fresh
from craton.pretraining.masked_lm import MaskedToken, MaskedWindows
from craton.pretraining.settings import PretrainSettings
from craton.pretraining.sizing import SizeOverrides, SizePlan, size
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.folders import make_folder
from craton.store.manifest import Parent
from craton.store.runs import Run
from craton.training.cross_entropy import NextToken
from craton.training.estimate import measured_rate
from craton.training.hardware import compute_dtype, use_threads
from craton.training.loop import Trainer
from craton.training.objective import Objective
from craton.training.optimisers import free_weights
from craton.training.ranks import Ranks, joined
from craton.training.session import Hooks, Job, Result, at_work, carry_out, last_checkpoint, new_run, rehearse
from craton.training.settings import TrainingSettings

KIND: Final = "pretrain"
PLAN_NAME: Final = "plan.json"
# Held-out text that an evaluation scores: enough for two digits of the loss, little beside the training.
HELD_OUT_TOKENS: Final = 100_000
MASK_TOKEN: Final = "<|reserved_0|>"  # of a tokeniser that is trained for an encoder


@dataclass(frozen=True)
class Plan:
    """What was decided for a run before its first step; with the run's data and tokeniser, all that a resume needs."""

    training: TrainingSettings
    config: ModelConfig
    architecture: str
    decisions: tuple[str, ...]

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        values = {
            "training": self.training.model_dump(mode="json"),
            "kind": type(self.config).__name__,
            "config": self.config.model_dump(mode="json"),
            "architecture": self.architecture,
            "decisions": self.decisions,
        }
        replace_file(folder / PLAN_NAME, json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read it back. Raises UsageError for a run that ended before it had one."""
        path = folder / PLAN_NAME
        if not path.exists():
            raise UsageError("this run stopped before its first step", where=str(folder), remedy="start it anew")
        values = json.loads(path.read_bytes())
        config: ModelConfig = TypeAdapter(ModelConfig).validate_python(values["config"])
        training = parse(TrainingSettings, values["training"], where=str(path))
        return cls(training, config, values["architecture"], tuple(values["decisions"]))


def pretrain(
    sources: Sequence[str],
    settings: PretrainSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train on `sources` (files, folders, patterns, hf:..., or one folder of prepared shards) and publish the model.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError and DataError for settings and data that cannot be used, TrainingError for a run that diverges.
    """
    hooks = hooks or Hooks()
    name = settings.name or ("pretrained-" + settings.size.lower() if settings.model is None else "continued")
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no data to train on", remedy="name files or folders: craton pretrain DATA...")
    with joined(settings.training.tensor_parallel) as ranks:
        if dry_run:
            with tempfile.TemporaryDirectory() as folder:
                rehearse(_start(sources, settings, provenance, Path(folder), ranks, hooks), hooks)
            return None
        parents = [Parent(relation="trained_on", name=source) for source in sources]
        if settings.model is not None:
            parents.append(Parent(relation="base", name=find(settings.model).id))
        run = new_run(KIND, settings, provenance, sources=sources, parents=tuple(parents), name=name, ranks=ranks)
        with at_work(run, ranks):
            job = _start(sources, settings, provenance, run.folder, ranks, hooks)
            return carry_out(run, job, ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none)."""
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(PretrainSettings, config["settings"], where=str(run.folder))
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        plan = Plan.load(run.folder)
        tokenizer = Tokenizer.from_folder(run.folder / "tokenizer")
        data = open_shards(_data_folder(config["sources"], run.folder), tokenizer)
        job = _job(settings, plan, tokenizer, data, run.folder, ranks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _start(
    sources: Sequence[str],
    settings: PretrainSettings,
    provenance: dict[str, str],
    folder: Path,
    ranks: Ranks,
    hooks: Hooks,
) -> Job:
    """Tokeniser, data and plan of a new run, in its folder."""
    use_threads(settings.training.threads)
    if ranks.is_first:
        hooks.on_progress("tokeniser")
        save_tokenizer(_tokenizer(sources, settings), make_folder(folder / "tokenizer"))
    ranks.wait()
    tokenizer = Tokenizer.from_folder(folder / "tokenizer")
    if ranks.is_first and not _is_shards(sources):
        hooks.on_progress("data")
        chosen = PrepareSettings(sources=tuple(sources), holdout=settings.holdout, context=settings.context)
        prepare(chosen, tokenizer, folder / "data", name=settings.tokenizer or "the run's tokeniser")
    ranks.wait()
    data = open_shards(_data_folder(sources, folder), tokenizer)
    hooks.on_progress("plan")
    plan = _plan(settings, provenance, tokenizer, data, folder, ranks)
    if ranks.is_first:
        plan.save(folder)
    ranks.wait()
    return _job(settings, plan, tokenizer, data, folder, ranks)


def _tokenizer(sources: Sequence[str], settings: PretrainSettings) -> Tokenizer:
    if settings.tokenizer is not None or settings.model is not None:
        name = settings.tokenizer or settings.model
        assert name is not None
        if (Path(name) / "tokenizer.json").is_file():
            return Tokenizer.from_folder(name)
        return Checkpoint.open(find(name).path).tokenizer()
    if _is_shards(sources):
        raise UsageError(
            "prepared shards need the tokeniser that they were made with",
            where=sources[0],
            remedy="--tokenizer MODEL_OR_FOLDER",
        )
    masked = settings.objective == "masked-token"
    wanted = TokenizerSettings(vocab=parse_size(settings.vocab), reserve=1 if masked else 0)
    texts = ("\n".join(texts_of(r.value)) for r in check_schema(read_records(list(sources))).records)
    trained = train_tokenizer(texts, wanted)
    if not masked:
        return trained
    special = {**trained.special_tokens, "mask_token": MASK_TOKEN}
    return Tokenizer(
        trained.backend, special_tokens=special, eos_ids=trained.eos_ids, chat_templates=trained.chat_templates
    )


def _plan(
    settings: PretrainSettings,
    provenance: dict[str, str],
    tokenizer: Tokenizer,
    data: Shards,
    folder: Path,
    ranks: Ranks,
) -> Plan:
    """Shape by the dial, then the budget: by tokens, or by what this machine does in so many minutes."""
    training = settings.training
    if settings.model is not None:
        checkpoint = _continued(settings)
        config, architecture = checkpoint.config, checkpoint.family.architectures[0]
        parameters = sum(p.numel() for p in _skeleton(config).parameters())
        sized, decisions = None, [f"goes on with {settings.model}, {parameters / 1e6:.1f}M parameters"]
    else:
        overrides = SizeOverrides(**settings.shape.model_dump(), tokens=settings.tokens)
        masked = settings.objective == "masked-token"
        sized = size(
            settings.size, vocab=tokenizer.vocab_size, context=settings.context, encoder=masked, overrides=overrides
        )
        config = _fresh_config(settings, sized, tokenizer.vocab_size)
        architecture, decisions = family_of_fresh(config).architectures[0], []
    provisional = Plan(_budgeted(training, provenance, sized, settings, None), config, architecture, ())
    seen = None
    if settings.minutes is not None:
        trainer = _job(settings, provisional, tokenizer, data, folder, ranks).trainer
        rate = ranks.agreed(measured_rate(trainer, trainer.data.step(0)[0])) * ranks.data_world
        seen = rate * 60 * settings.minutes
        decisions.append(f"{seen:,.0f} tokens: {rate:,.0f} a second for {settings.minutes:g} minutes")
    elif settings.tokens is not None:
        seen = float(settings.tokens)
    if sized is not None and seen is not None:
        assert isinstance(overrides, SizeOverrides)
        overrides = overrides.model_copy(update={"tokens": max(1, int(seen))})
        sized = size(
            settings.size, vocab=tokenizer.vocab_size, context=settings.context, encoder=masked, overrides=overrides
        )
    final = _budgeted(training, provenance, sized, settings, seen)
    if sized is not None:
        decisions = [*sized.decisions, *decisions]
    return Plan(final, config, architecture, tuple(decisions))


def _budgeted(
    training: TrainingSettings,
    provenance: dict[str, str],
    sized: SizePlan | None,
    settings: PretrainSettings,
    seen: float | None,
) -> TrainingSettings:
    """The loop's settings with what the dial chose, wherever the user did not."""

    def free(key: str) -> bool:
        return provenance.get(f"training.{key}", DEFAULT) == DEFAULT

    changes: dict[str, Any] = {}
    if sized is not None:
        if free("batch"):
            changes["batch"] = max(1, sized.batch_tokens // settings.context)
        if free("learning_rate"):
            changes["learning_rate"] = sized.learning_rate
        seen = seen or float(sized.tokens)
    batch = changes.get("batch", training.batch)
    if seen is not None and free("steps") and free("epochs"):
        changes["steps"] = max(1, math.ceil(seen / (batch * settings.context)))
    return training.model_copy(update=changes)


def _fresh_config(settings: PretrainSettings, sized: SizePlan, vocab: int) -> ModelConfig:
    if settings.objective == "masked-token":
        if settings.experts:
            raise UsageError("experts are for next-token models", remedy="leave out --experts, or the objective")
        encoder = encoder_config(sized, vocab, settings.context)
        norm = encoder.trunk.final_norm
        assert norm is not None
        return MaskedLMConfig(encoder=encoder, activation="gelu", norm=norm)
    if settings.experts:
        return experts_config(sized, vocab, settings.context, experts=settings.experts)
    return causal_config(sized, vocab, settings.context)


def _job(settings: PretrainSettings, plan: Plan, tokenizer: Tokenizer, data: Shards, folder: Path, ranks: Ranks) -> Job:
    """Model, loader and trainer of a plan."""
    use_threads(plan.training.threads)
    dtype, why = compute_dtype(plan.training.dtype, ranks.device)
    model, family = _model(settings, plan)
    objective: Objective = NextToken() if isinstance(model, CausalLM) else MaskedToken()
    source: ExampleSource = window_source(data, settings.context)
    if isinstance(model, MaskedLM):
        source = MaskedWindows(source, tokenizer, plan.training.seed)
    training = plan.training
    loader = Loader(
        source,
        batch=training.batch,
        micro_tokens=training.micro_tokens,
        seed=training.seed,
        rank=ranks.data_rank,
        world=ranks.data_world,
    )
    held_out, held_out_bytes = _held_out(data, settings, tokenizer, training, isinstance(model, MaskedLM), ranks)
    trainer = Trainer(
        model,
        objective,
        loader,
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        held_out_bytes=held_out_bytes,
        folder=folder / "checkpoints",
    )
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=tokenizer,
        dtype=dtype,
        length=settings.context,
        decisions=(
            *plan.decisions,
            *(["published is the encoder, without its head for masked tokens"] if family is MODERNBERT else []),
            f"activations in {str(dtype).removeprefix('torch.')}: {why}",
        ),
        save=lambda target: _save(model, family, target, tokenizer),
        tensorboard=settings.tensorboard,
    )


def _save(model: CausalLM | MaskedLM, family: Family, folder: Path, tokenizer: Tokenizer) -> None:
    if isinstance(model, MaskedLM) and family is MODERNBERT:
        # What adapts an encoder reads its vectors; its own head for masked tokens has another shape than this one.
        save_checkpoint(model.encoder, family, folder, tokenizer=tokenizer)
    else:
        save_checkpoint(model, family, folder, tokenizer=tokenizer)


def _model(settings: PretrainSettings, plan: Plan) -> tuple[CausalLM | MaskedLM, Family]:
    if settings.model is not None:
        checkpoint = _continued(settings)
        loaded = checkpoint.load(torch.float32)
        if not isinstance(loaded, CausalLM | MaskedLM):
            raise UsageError(
                f"{settings.model} is a {type(loaded).__name__}, which {settings.objective} cannot train",
                remedy="choose the other --objective, or another model",
            )
        free_weights(loaded)
        return loaded, checkpoint.family
    model = build(plan.config)
    assert isinstance(model, CausalLM | MaskedLM)
    initialise(model, plan.training.seed)
    return model, BY_ARCHITECTURE[plan.architecture]


def _continued(settings: PretrainSettings) -> Checkpoint:
    """The model to go on with, with its masked-language-model head where that is trained."""
    assert settings.model is not None
    checkpoint = Checkpoint.open(find(settings.model).path)
    return checkpoint.as_masked_lm() if settings.objective == "masked-token" else checkpoint


def _held_out(
    data: Shards,
    settings: PretrainSettings,
    tokenizer: Tokenizer,
    training: TrainingSettings,
    masked: bool,
    ranks: Ranks,
) -> tuple[list[Batch], float | None]:
    """This rank's batches of held-out windows, and the bytes of their targets on all ranks."""
    if data.heldout is None or data.heldout.tokens <= settings.context:
        return [], None
    windows = WindowSource(data.heldout, settings.context)
    count = min(len(windows), max(1, HELD_OUT_TOKENS // settings.context))
    source: ExampleSource = MaskedWindows(windows, tokenizer, training.seed) if masked else windows
    loader = Loader(
        source,
        batch=count,
        micro_tokens=training.micro_tokens,
        seed=0,
        rank=ranks.data_rank,
        world=ranks.data_world,
        shuffle=False,
    )
    held_bytes = None if masked else sum(windows.trained_bytes(i) for i in range(count))
    return loader.step(0), held_bytes


def _skeleton(config: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return build(config)


def _is_shards(sources: Sequence[str]) -> bool:
    return len(sources) == 1 and (Path(sources[0]) / MANIFEST_NAME).is_file()


def _data_folder(sources: Sequence[str], folder: Path) -> Path:
    return Path(sources[0]) if _is_shards(sources) else folder / "data"
