"""Distillation: a student learns a teacher's next-token distributions, through the one training loop.

Everything that a resume needs lies in the run's folder: the data's shards, a student that was cut from the teacher, the
teacher's opinions (or texts), and the plan. Each is written whole or not at all, so that a run that was stopped at any
moment goes on from what is there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.compression.distill_data import CUT, STUDENT_FACTS, cut_student, now_and_then, read_data
from craton.compression.distill_job import TABLE_NAME, Builder, Plan
from craton.compression.distill_settings import DistillSettings
from craton.compression.distill_text import write_texts
from craton.config import parse
from craton.errors import UsageError
from craton.inference.model import load
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, CausalLMConfig
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run
from craton.training.hardware import compute_dtype, use_threads
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

KIND: Final = "distill"


def distill(
    teacher: str,
    student: str,
    sources: Sequence[str],
    settings: DistillSettings,
    provenance: dict[str, str],
    hooks: Hooks | None = None,
    *,
    dry_run: bool = False,
) -> Result | None:
    """Teach `student` what `teacher` thinks of `sources`, and publish it.

    teacher, student: stored names, hf:..., or paths; a student may also be cut from the teacher: "depth:0.75" keeps
    three quarters of its layers, "width:0.5" half of its feed-forward's channels. sources: as for pretraining (text,
    or one folder of shards) or fine-tuning (chats, prompts with completions).

    dry_run: prepare everything, estimate, and stop before the first step; nothing is kept. Under torchrun, every
    process calls this.

    Raises UsageError and DataError for models, settings and data that do not go together, TrainingError for a run that
    diverges.
    """
    hooks = hooks or Hooks()
    wise = find(teacher)
    known = None if CUT.fullmatch(student) else find(student)
    name = settings.name or f"{(known or wise).name}-distilled"
    settings = settings.model_copy(update={"name": name})
    check_model_name(name)
    if not sources:
        raise UsageError("no data to learn on", remedy="name files: craton distill TEACHER STUDENT DATA...")
    _check(settings, wise, known)
    with joined(settings.training.tensor_parallel) as ranks:
        everything = [teacher, student, *sources]
        if dry_run:
            with tempfile.TemporaryDirectory() as folder:
                job = _start(everything, settings, provenance, Path(folder), ranks, hooks, rehearsal=True)
                rehearse(job, hooks)
            return None
        of_student = Parent(relation="base", name=_reference(known)) if known else None
        parents = (
            Parent(relation="distilled_from", name=_reference(wise)),
            of_student or Parent(relation="pruned_from", name=_reference(wise)),
            *(Parent(relation="trained_on", name=source) for source in sources),
        )
        run = new_run(KIND, settings, provenance, sources=everything, parents=parents, name=name, ranks=ranks)
        with at_work(run, ranks):
            return _carried_out(run, _start(everything, settings, provenance, run.folder, ranks, hooks), ranks, hooks)


def resume(run: Run, hooks: Hooks | None = None) -> Result:
    """Go on with an interrupted run from its last checkpoint, or from what was prepared when it has none."""
    hooks = hooks or Hooks()
    config = run.config()
    settings = parse(DistillSettings, config["settings"], where=str(run.folder))
    provenance = {key.removeprefix("settings."): origin for key, (_, origin) in run.settings().items()}
    with joined(settings.training.tensor_parallel) as ranks, at_work(run, ranks):
        job = _start(config["sources"], settings, provenance, run.folder, ranks, hooks)
        return _carried_out(run, job, ranks, hooks, last_checkpoint(run, ranks))


def _carried_out(run: Run, job: Job, ranks: Ranks, hooks: Hooks, checkpoint: Path | None = None) -> Result:
    """`carry_out`; a run that is done needs no teacher any more, whose opinions are most of what it keeps."""
    result = carry_out(run, job, ranks, hooks, checkpoint)
    if ranks.is_first:
        for table in run.folder.glob(f"{TABLE_NAME}-*"):
            shutil.rmtree(table, ignore_errors=True)
    return result


def _check(settings: DistillSettings, teacher: StoredModel, student: StoredModel | None) -> None:
    """Refuse what cannot go together before it has cost anything."""
    wise = Checkpoint.open(teacher.path)
    for role, config in (("teacher", wise.config), ("student", Checkpoint.open((student or teacher).path).config)):
        if not isinstance(config, CausalLMConfig):
            raise UsageError(
                f"a {role} writes text, and this one is a {type(config).__name__.removesuffix('Config')}",
                where=teacher.name if role == "teacher" or student is None else student.name,
            )
    if settings.bridge and (settings.hidden or settings.on_policy):
        raise UsageError("through text there are no hidden states and no opinions", remedy="leave out --bridge")
    if student is None:
        if settings.bridge:
            raise UsageError("a student cut from its teacher has its tokeniser", remedy="leave out --bridge")
        return
    other = Checkpoint.open(student.path)
    if settings.bridge is None:
        check_same_tokens(wise.tokenizer(), other.tokenizer(), f"{teacher.name} and {student.name}")


def check_same_tokens(teacher: Tokenizer, student: Tokenizer, where: str) -> None:
    """Raises UsageError unless both tokenisers know the same tokens under the same ids."""
    ours, theirs = (one.backend.get_vocab(with_added_tokens=True) for one in (teacher, student))
    if ours != theirs:
        different = len(set(ours.items()) ^ set(theirs.items()))
        raise UsageError(
            f"teacher and student have other tokens ({different:,} entries differ), so their distributions are over "
            "different things",
            where=where,
            remedy="let the teacher write and the student read: --bridge text",
        )


def _start(
    everything: Sequence[str],
    settings: DistillSettings,
    provenance: dict[str, str],
    folder: Path,
    ranks: Ranks,
    hooks: Hooks,
    *,
    rehearsal: bool = False,
) -> Job:
    """Everything of a run in its folder, from what is there already, to a job that is ready. rehearsal: the teacher
    neither reads nor writes what a first step does not need."""
    teacher_name, student_name, *sources = everything
    training = settings.training
    use_threads(training.threads)
    dtype, why = compute_dtype(training.dtype, ranks.device)
    if ranks.world > 1 and (settings.on_policy or settings.bridge):
        raise UsageError("texts are written by one process", remedy="leave out torchrun, or --on-policy and --bridge")
    is_cut = CUT.fullmatch(student_name) is not None
    origin = find(teacher_name if is_cut else student_name)
    wise, checkpoint = Checkpoint.open(find(teacher_name).path), Checkpoint.open(origin.path)
    plan = Plan.load(folder)
    told: list[str] = []
    if settings.bridge:
        most = training.steps * training.batch if training.steps else None
        most = training.batch if rehearsal else most
        sources = [str(_written(teacher_name, sources, settings, most, folder, hooks))]
        told.append("the teacher's texts stand for its opinions: plain next-token training on them")
    tokenizer, context = checkpoint.tokenizer(), checkpoint.text_config.context
    context = context if settings.bridge else min(context, wise.text_config.context)
    data = read_data(sources, settings, tokenizer, context, folder, ranks, hooks)
    if plan is not None:
        check_same_data(plan.data, data.digest, "the data", sources)
    if is_cut:
        checkpoint = Checkpoint.open(cut_student(wise, student_name, data, folder, ranks, hooks))
        told.append(f"the student is the teacher, {student_name}: {json.loads((folder / STUDENT_FACTS).read_bytes())}")
    hooks.on_progress("loading the student")
    student = checkpoint.load(torch.float32)
    assert isinstance(student, CausalLM)  # `_check` has seen to it
    free_weights(student)
    builder = Builder(settings, wise, student, data, folder, dtype, ranks, hooks, rehearsal=rehearsal)
    if plan is None:
        plan = builder.plan(provenance, (*data.decisions, *told), data.digest)
        if ranks.is_first:
            plan.save(folder)
        ranks.wait()
        plan = Plan.load(folder) or plan  # the first rank's measurements count
    words = f"activations in {str(dtype).removeprefix('torch.')}: {why}"
    return builder.job(plan, tokenizer, checkpoint, words, origin.licence)


def _written(
    teacher: str, sources: Sequence[str], settings: DistillSettings, most: int | None, folder: Path, hooks: Hooks
) -> Path:
    """The file of the teacher's texts, at most so many. With `minutes`, writing takes half of them."""
    path = folder / "written.jsonl"
    if path.exists():
        return path
    hooks.on_progress("loading the teacher")
    training = settings.training
    return write_texts(
        load(teacher, threads=training.threads),
        sources,
        path,
        context=settings.context,
        temperature=settings.temperature,
        seed=training.seed,
        most=most,
        seconds=settings.minutes * 30 if settings.minutes else None,
        on_progress=now_and_then(hooks.on_progress),
    )


def _reference(model: StoredModel) -> str:
    return model.id if model.version else model.source
