"""From two models and data to a training run: the plan, the teacher's opinions, the objective."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Final

import torch
from torch import nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.save import copy_preprocessing, save_checkpoint
from craton.compression.distill_data import Data, now_and_then
from craton.compression.distill_objective import Distillation, ProjectedStudent, Teacher
from craton.compression.distill_settings import DistillSettings
from craton.compression.distill_text import OnPolicyData
from craton.compression.teacher_table import INDEX_NAME, LiveTeacher, TeacherTable, build_table
from craton.config import parse
from craton.config.resolve import DEFAULT
from craton.data.batch import Batch
from craton.data.loader import Loader
from craton.modalities.text import Tokenizer
from craton.models import CausalLM
from craton.training.cross_entropy import NextToken
from craton.training.estimate import measured_rate
from craton.training.loop import StepData, Trainer
from craton.training.objective import Objective
from craton.training.ranks import Ranks
from craton.training.session import Hooks, Job
from craton.training.settings import TrainingSettings

PLAN_NAME: Final = "plan.json"
TABLE_NAME: Final = "teacher"
HELD_OUT_TOKENS: Final = 16_384


@dataclass(frozen=True)
class Plan:
    """What was decided before the first step. data: a digest of chats, or "" for shards, which lie in the run."""

    training: TrainingSettings
    decisions: tuple[str, ...]
    data: str

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        values = {"training": self.training.model_dump(mode="json"), "decisions": self.decisions, "data": self.data}
        replace_file(folder / PLAN_NAME, json.dumps(values, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Plan | None:
        """Read it back; None where the run ended before it had one."""
        path = folder / PLAN_NAME
        if not path.exists():
            return None
        values = json.loads(path.read_bytes())
        training = parse(TrainingSettings, values["training"], where=str(path))
        return cls(training, tuple(values["decisions"]), values["data"])


class Builder:
    """From models and data to a plan and a job."""

    def __init__(
        self,
        settings: DistillSettings,
        teacher: Checkpoint,
        student: CausalLM,
        data: Data,
        folder: Path,
        dtype: torch.dtype,
        ranks: Ranks,
        hooks: Hooks,
        *,
        rehearsal: bool,
    ) -> None:
        self.settings, self.student, self.data, self.folder = settings, student, data, folder
        self.dtype, self.ranks, self.hooks, self.rehearsal = dtype, ranks, hooks, rehearsal
        self._teacher_checkpoint = teacher
        self._live: LiveTeacher | None = None

    @property
    def table_folder(self) -> Path:
        """Where this rank keeps the teacher's opinions of its examples."""
        return self.folder / f"{TABLE_NAME}-{self.ranks.rank}"

    @property
    def needs_live(self) -> bool:
        """Whether the teacher must stay in memory."""
        return bool(self.settings.hidden or self.settings.on_policy)

    def live(self) -> LiveTeacher:
        """The teacher in memory."""
        if self._live is None:
            self.hooks.on_progress("loading the teacher")
            model = self._teacher_checkpoint.load(self.dtype)
            assert isinstance(model, CausalLM)
            model.to(self.ranks.device)
            chosen = self.settings
            self._live = LiveTeacher(
                model,
                top_k=chosen.top_k,
                temperature=chosen.temperature,
                dtype=self.dtype,
                vocab=min(model.config.vocab, self.student.config.vocab),
            )
        return self._live

    def loader(self, training: TrainingSettings) -> Loader:
        """The training data's order."""
        return Loader(
            self.data.training,
            batch=training.batch,
            micro_tokens=training.micro_tokens,
            seed=training.seed,
            rank=self.ranks.data_rank,
            world=self.ranks.data_world,
        )

    def held_out(self, training: TrainingSettings) -> list[Batch]:
        """This rank's batches of the held-out examples."""
        source = self.data.held_out
        if source is None or not len(source):
            return []
        mean = max(1, int(source.lengths.mean()))
        loader = Loader(
            source,
            batch=min(len(source), max(1, HELD_OUT_TOKENS // mean)),
            micro_tokens=training.micro_tokens,
            seed=0,
            rank=self.ranks.data_rank,
            world=self.ranks.data_world,
            shuffle=False,
        )
        return loader.step(0)

    def plan(self, provenance: dict[str, str], decisions: Sequence[str], digest: str) -> Plan:
        """The number of steps: as asked for, or what this machine does in so many minutes."""
        training, minutes = self.settings.training, self.settings.minutes
        free = all(provenance.get(f"training.{key}", DEFAULT) == DEFAULT for key in ("steps", "epochs"))
        if minutes is None or not free:
            return Plan(training, tuple(decisions), digest)
        loader = self.loader(training)
        step_tokens = float(self.data.training.lengths.mean()) * training.batch
        seconds = minutes * 60 * (0.5 if self.settings.bridge else 1.0)  # the teacher has had the other half
        self.hooks.on_progress("measuring this machine")
        # A model is sharded once, so one that is only measured is a copy.
        model = deepcopy(self.student) if self.ranks.world > 1 else self.student
        trainer = Trainer(model, NextToken(), loader, training, dtype=self.dtype, ranks=self.ranks)
        sample = loader.step(0)[0]
        rate = self.ranks.agreed(measured_rate(trainer, sample)) * self.ranks.data_world
        steps = seconds * rate / step_tokens
        if not self.settings.bridge:
            reading = self._reading_rate(sample) * self.ranks.data_world
            if self.needs_live:
                steps = seconds / (step_tokens / rate + step_tokens / reading)
            else:
                held = sum(batch.tokens for batch in self.held_out(training))
                steps = steps_within(seconds - held / reading, step_tokens, rate, reading, loader.steps_per_epoch)
        chosen = max(1, int(steps))
        told = f"{chosen} steps: {rate:,.0f} tokens a second for {minutes:g} minutes, the teacher's share taken off"
        return Plan(training.model_copy(update={"steps": chosen}), (*decisions, told), digest)

    def _reading_rate(self, sample: Batch) -> float:
        """Tokens a second that the teacher reads and judges: the better of two tries."""
        teacher, best = self.live(), float("inf")
        for _ in range(2):
            begin = time.perf_counter()
            teacher(sample.to(self.ranks.device))
            best = min(best, time.perf_counter() - begin)
        return sample.tokens / best

    def job(self, plan: Plan, tokenizer: Tokenizer, origin: Checkpoint, dtype_words: str, licence: str | None) -> Job:
        """What `carry_out` takes. origin: of the student."""
        settings, training = self.settings, plan.training
        loader, held_out = self.loader(training), self.held_out(training)
        model: nn.Module = self.student
        decisions = list(plan.decisions)
        objective: Objective = NextToken()
        data: StepData = loader
        if not settings.bridge:
            teacher, words = self._teacher(training, loader, held_out)
            decisions.append(words)
            objective = Distillation(
                teacher,
                loss=settings.loss,
                skew=settings.skew,
                alpha=settings.alpha,
                temperature=settings.temperature,
                hidden=settings.hidden,
            )
            width = self._teacher_checkpoint.config.trunk.width
            if settings.hidden and width != self.student.config.trunk.width:
                torch.manual_seed(training.seed)
                model = ProjectedStudent(self.student, width)
                decisions.append("hidden states of another width are compared through a learned map of each layer")
        steps = training.steps or max(1, ceil(training.epochs * loader.steps_per_epoch))
        if settings.on_policy:
            data = OnPolicyData(
                loader,
                self.student,
                tokenizer,
                self.folder / "written",
                share=settings.on_policy,
                every=settings.on_policy_every,
                steps=steps,
            )
        trainer = Trainer(
            model,
            objective,
            data,
            training,
            dtype=self.dtype,
            ranks=self.ranks,
            held_out=held_out,
            folder=self.folder / "checkpoints",
        )
        return Job(
            settings=settings,
            trainer=trainer,
            tokenizer=tokenizer,
            dtype=self.dtype,
            length=int(self.data.training.lengths.mean()),
            decisions=(*decisions, dtype_words),
            save=lambda target: _save(self.student, origin, target, tokenizer),
            licence=licence,
            tensorboard=settings.tensorboard,
        )

    def _teacher(self, training: TrainingSettings, loader: Loader, held_out: Sequence[Batch]) -> tuple[Teacher, str]:
        if self.needs_live:
            return self.live(), "the teacher stays in memory, as its hidden states or the student's texts ask for"
        if self.rehearsal:
            return self.live(), f"the teacher's {self.live().top_k} likeliest of each token will be kept"
        if not (self.table_folder / INDEX_NAME).exists():
            teacher = self.live()
            steps = training.steps or max(1, ceil(training.epochs * loader.steps_per_epoch))

            def batches() -> Iterator[Batch]:
                yield from held_out
                for step in range(steps):
                    yield from loader.step(step)

            say = now_and_then(self.hooks.on_progress)

            def told(positions: int) -> None:
                say(f"the teacher has judged {positions:,} tokens")

            build_table(self.table_folder, teacher, batches(), self.ranks.device, told)
        self._live = None  # its memory is the student's from here on
        table = TeacherTable(self.table_folder)
        return table, (
            f"the teacher's {table.top_k} likeliest of {table.positions:,} tokens were kept, {table.bytes / 1e6:.0f} MB"
        )


def steps_within(seconds: float, step_tokens: float, rate: float, reading: float, steps_per_epoch: int) -> float:
    """How many steps fit into `seconds` where the student trains at `rate` tokens a second and the teacher reads each
    example once at `reading`: a second pass over the data costs the student's time alone."""
    steps = seconds / (step_tokens / rate + step_tokens / reading)
    if steps <= steps_per_epoch:
        return steps
    return (seconds - steps_per_epoch * step_tokens / reading) * rate / step_tokens


def _save(model: CausalLM, origin: Checkpoint, folder: Path, tokenizer: Tokenizer) -> None:
    save_checkpoint(model, origin.family, folder, tokenizer=tokenizer)
    copy_preprocessing(origin.folder, folder)
