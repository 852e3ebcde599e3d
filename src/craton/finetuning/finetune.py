"""Fine-tuning: a model, data and a task to an adapter or a model in the store."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.families import Family, classifier_family
from craton.checkpoints.save import copy_preprocessing, save_checkpoint, save_tokenizer
from craton.config import parse
from craton.data.batch import Batch
from craton.data.chat_pictures import ChatPictures
from craton.data.labels import LabelMap
from craton.data.loader import ListSource, Loader
from craton.errors import UsageError
from craton.finetuning import pictures
from craton.finetuning.adapter_files import check_saveable, save_adapter
from craton.finetuning.adapters import DEFAULT_ADAPTER, LoraSettings, select_linears
from craton.finetuning.examples import ExampleSet, read_examples
from craton.finetuning.lora import LowRank, add_adapters, apply_lora, disabled, linear_layers
from craton.finetuning.objectives.classification import Classification
from craton.finetuning.objectives.contrastive import InfoNCE
from craton.finetuning.objectives.preference import DPO, KTO, ORPO, ReferenceTable
from craton.finetuning.quantized_base import quantize_base
from craton.finetuning.settings import KIND, FinetuneSettings, Task
from craton.modalities.text import Tokenizer
from craton.models import (
    CausalLM,
    Classifier,
    Embedder,
    Encoder,
    ImageChat,
    ImageChatConfig,
    PoolingConfig,
    TextModel,
    TextModelConfig,
)
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run
from craton.training.cross_entropy import NextToken
from craton.training.hardware import compute_dtype, use_threads
from craton.training.image_chat import SeeingNextToken
from craton.training.loop import Trainer
from craton.training.objective import Objective
from craton.training.optimisers import free_weights
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

FACTS_NAME: Final = "facts.json"
LABELS_NAME: Final = "labels.json"

# The models that a task can train.
_TAKES: Final[Mapping[Task, tuple[type[nn.Module], ...]]] = {
    "sft": (CausalLM,),
    "classify": (CausalLM, Encoder),
    "embed": (CausalLM, Encoder),
    "dpo": (CausalLM,),
    "orpo": (CausalLM,),
    "kto": (CausalLM,),
}


@dataclass(frozen=True)
class _Learner:
    """model: what the objective is given. saved: the model whose files are written, under the names of `family`;
    pooling: written beside them."""

    model: nn.Module
    saved: TextModel
    family: Family
    pooling: PoolingConfig | None = None


def finetune(
    model: str,
    sources: Sequence[str],
    settings: FinetuneSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Train `model` (a stored name, hf:..., a path) on `sources` and publish an adapter, or a model for method full.

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError and DataError for settings and data that cannot be used, TrainingError for a run that diverges.
    """
    hooks = hooks or Hooks()
    base = find(model)
    name = settings.name or f"{base.name}-{settings.task}"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no data to train on", remedy="name files: craton finetune MODEL DATA...")
    with joined(settings.training.tensor_parallel) as ranks:
        checkpoint = Checkpoint.open(base.path)
        if not isinstance(checkpoint.config, TextModelConfig):
            return pictures.finetune(
                model, base, checkpoint, sources, settings, provenance, hooks, ranks, dry_run=dry_run
            )
        tokenizer = checkpoint.tokenizer()
        # Data that cannot be used is refused before there is a run.
        data = _read(sources, settings, checkpoint, tokenizer, hooks)
        _refuse_ranks(data, ranks)
        build = partial(_job, base, checkpoint, tokenizer, data, settings, ranks=ranks, hooks=hooks)
        if dry_run:
            rehearse(build(None), hooks)
            return None
        parents = (
            Parent(relation="base" if settings.method == "full" else "adapter_of", name=_reference(base)),
            *(Parent(relation="trained_on", name=source) for source in sources),
            *(Parent(relation="evaluated_on", name=source) for source in settings.evaluation),
        )
        everything = [model, *sources]
        run = new_run(KIND, settings, provenance, sources=everything, parents=parents, name=name, ranks=ranks)
        with at_work(run, ranks):
            if ranks.is_first:
                replace_file(run.folder / FACTS_NAME, json.dumps({"data": data.digest}).encode())
            return carry_out(run, build(run.checkpoints_folder), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint (or from its beginning, if there is none).

    Raises TrainingError if the data is not what it was.
    """
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(FinetuneSettings, config["settings"], where=str(run.folder))
    model, *sources = config["sources"]
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        base = find(model)
        checkpoint = Checkpoint.open(base.path)
        if not isinstance(checkpoint.config, TextModelConfig):
            return pictures.resume(run, base, checkpoint, sources, settings, hooks, ranks)
        tokenizer = checkpoint.tokenizer()
        data = _read(sources, settings, checkpoint, tokenizer, hooks)
        facts = run.folder / FACTS_NAME
        if facts.exists():
            check_same_data(json.loads(facts.read_bytes())["data"], data.digest, "the data", sources)
        job = _job(base, checkpoint, tokenizer, data, settings, run.checkpoints_folder, ranks=ranks, hooks=hooks)
        return carry_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _read(
    sources: Sequence[str], settings: FinetuneSettings, checkpoint: Checkpoint, tokenizer: Tokenizer, hooks: Hooks
) -> ExampleSet:
    config, seen = checkpoint.config, None
    if isinstance(config, ImageChatConfig):
        seen = ChatPictures(config, tokenizer, checkpoint.folder)
    return read_examples(sources, settings, tokenizer, checkpoint.text_config.context, hooks.on_progress, pictures=seen)


def _refuse_ranks(data: ExampleSet, ranks: Ranks) -> None:
    if ranks.world > 1 and any(example.pictures for example in (*data.training, *data.held_out)):
        raise UsageError(
            "conversations with pictures are trained in one process: where a rank has none in a step, it would not "
            "take part in what the others gather of the vision tower",
            remedy="start it without torchrun",
        )


def _job(
    base: StoredModel,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    data: ExampleSet,
    settings: FinetuneSettings,
    folder: Path | None,
    *,
    ranks: Ranks,
    hooks: Hooks,
) -> Job:
    training = settings.training
    use_threads(training.threads)
    torch.manual_seed(training.seed)  # of fresh adapters and heads
    dtype, why = compute_dtype(training.dtype, ranks.device)
    hooks.on_progress(f"loading {base.id}")
    learner, decisions = _learner(checkpoint, data, settings, dtype)
    if settings.method != "full":
        check_saveable(learner.saved, learner.family)
    objective = _objective(settings, learner)
    loader = Loader(
        ListSource(data.training),
        batch=training.batch,
        micro_tokens=training.micro_tokens,
        seed=training.seed,
        rank=ranks.data_rank,
        world=ranks.data_world,
        sequences_together=getattr(objective, "whole_steps", False),
    )
    held_out = _held_out(data, training.micro_tokens, ranks, objective, training.batch)
    trainer = Trainer(
        learner.model,
        objective,
        loader,
        training,
        dtype=dtype,
        ranks=ranks,
        held_out=held_out,
        folder=folder,
    )
    if isinstance(objective, DPO) and isinstance(objective.reference, ReferenceTable):
        hooks.on_progress("scoring all answers with the reference")
        for batch in [*(b for step in range(loader.steps_per_epoch) for b in loader.step(step)), *held_out]:
            objective.reference.add(learner.model, batch)
    lengths = sorted(len(sequence) for example in data.training for sequence in example.sequences)
    return Job(
        settings=settings,
        trainer=trainer,
        tokenizer=tokenizer,
        dtype=dtype,
        length=lengths[len(lengths) // 2],
        decisions=(
            *data.decisions,
            *decisions,
            f"activations in {str(dtype).removeprefix('torch.')}: {why}",
        ),
        save=lambda target: _save(learner, base, checkpoint, tokenizer, settings, target),
        licence=base.licence,
        tensorboard=settings.tensorboard,
    )


def _learner(
    checkpoint: Checkpoint, data: ExampleSet, settings: FinetuneSettings, dtype: torch.dtype
) -> tuple[_Learner, list[str]]:
    """The model with what is trained on it: everything, or an adapter and a head."""
    full, task = settings.method == "full", settings.task
    blocks = settings.method == "qlora" and settings.quantization == "blocks"
    if blocks and not checkpoint.quantized_kinds():
        raise UsageError("this model's weights are plain numbers, no blocks", remedy="--quantization nf4")
    # What is trained needs fp32 masters; a frozen base may lie in the dtype that it computes in. 4-bit codes are made
    # of all the digits there are.
    backbone = checkpoint.load(dtype if settings.method in ("lora", "dora") or blocks else torch.float32, packed=blocks)
    decisions: list[str] = []
    if not isinstance(backbone, _TAKES[task]):
        wanted = " or ".join(kind.__name__ for kind in _TAKES[task])
        raise UsageError(f"task {task} needs a {wanted}, and this is a {type(backbone).__name__}")
    if settings.method == "qlora" and not blocks:
        assert settings.quantization != "blocks"
        errors = quantize_base(backbone, settings.quantization)
        mean = sum(errors.values()) / len(errors)
        decisions.append(f"frozen weights in {settings.quantization}, {mean:.1%} from the originals")
    assert isinstance(backbone, TextModel)
    saved: TextModel = backbone
    family = checkpoint.family
    if task == "classify":
        assert isinstance(backbone, CausalLM | Encoder)
        assert data.labels is not None
        saved = Classifier.over(backbone, data.labels.names)
        family = classifier_family(family)
    if full:
        free_weights(saved)
        if isinstance(saved, ImageChat):
            saved.vision.requires_grad_(False)
    else:
        lora = settings.lora.model_copy(update={"dora": settings.method == "dora" or settings.lora.dora})
        layers = _adapt_seeing(saved, lora) if isinstance(saved, ImageChat) else apply_lora(saved, lora)
        decisions.append(f"adapter of rank {lora.rank} on {len(layers)} layers, scale {lora.scale:.3g}")
    if isinstance(saved, ImageChat):
        decisions.append("the vision tower stays as it is; the projector is trained like the language model")
    for parameter in saved.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if task != "embed":
        return _Learner(saved, saved, family), decisions
    assert isinstance(backbone, CausalLM | Encoder)
    pooling = checkpoint.pooling or PoolingConfig(mode="last" if isinstance(backbone, CausalLM) else "mean")
    decisions.append(f"vectors: {pooling.mode} of the token vectors")
    return _Learner(Embedder(backbone, pooling), saved, family, pooling), decisions


def _adapt_seeing(model: ImageChat, lora: LoraSettings) -> list[str]:
    """Adapters on the language model's layers that are meant, and on the projector's where all are."""
    layers = [name for name in linear_layers(model) if not name.startswith("vision.")]
    of_projector = [name for name in layers if name.startswith("projector.")]
    chosen = select_linears(lora.targets, [name for name in layers if name not in of_projector])
    if {"all", "all-linear"}.intersection(lora.targets):
        chosen += of_projector
    add_adapters(model, DEFAULT_ADAPTER, chosen, lambda _, linear: LowRank.fresh(linear, lora))
    return chosen


def _objective(settings: FinetuneSettings, learner: _Learner) -> Objective:
    chosen = settings.objective
    reference = ReferenceTable() if settings.method == "full" else partial(disabled, learner.model)
    match settings.task:
        case "sft":
            return SeeingNextToken() if isinstance(learner.model, ImageChat) else NextToken()
        case "classify":
            return Classification()
        case "embed":
            return InfoNCE(temperature=chosen.temperature)
        case "dpo":
            return DPO(reference, beta=chosen.beta, label_smoothing=chosen.label_smoothing)
        case "orpo":
            return ORPO(weight=chosen.odds_weight)
        case "kto":
            if isinstance(reference, ReferenceTable):
                raise UsageError(
                    "kto compares with the model before training, which method full does not keep",
                    remedy="--method lora: there the reference is the model without its adapter",
                )
            return KTO(reference, learner.saved.config.context, beta=chosen.beta)


def _held_out(data: ExampleSet, micro_tokens: int, ranks: Ranks, objective: Objective, batch: int) -> list[Batch]:
    """This rank's batches of the held-out examples; where an objective compares within a step, steps of that size."""
    if not data.held_out:
        return []
    together = bool(getattr(objective, "whole_steps", False))
    loader = Loader(
        ListSource(data.held_out),
        batch=batch if together else len(data.held_out),
        micro_tokens=micro_tokens,
        seed=0,
        rank=ranks.data_rank,
        world=ranks.data_world,
        shuffle=False,
        sequences_together=together,
    )
    return [held for step in range(loader.steps_per_epoch) for held in loader.step(step)]


def _save(
    learner: _Learner,
    base: StoredModel,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    settings: FinetuneSettings,
    folder: Path,
) -> None:
    if settings.method == "full":
        save_checkpoint(learner.saved, learner.family, folder, tokenizer=tokenizer, pooling=learner.pooling)
        if isinstance(learner.saved, ImageChat):
            copy_preprocessing(checkpoint.folder, folder)
        return
    task = "FEATURE_EXTRACTION" if settings.task == "embed" else None
    save_adapter(learner.saved, learner.family, folder, base=_reference(base), task=task)  # type: ignore[arg-type]
    save_tokenizer(tokenizer, folder)
    if isinstance(learner.saved, Classifier):
        LabelMap(learner.saved.config.labels).save(folder / LABELS_NAME)


def _reference(base: StoredModel) -> str:
    """How a base is found again: by its stored id, or by where it came from."""
    return base.id if base.version else base.source
