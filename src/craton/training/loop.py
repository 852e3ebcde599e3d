"""The one training loop. Pretraining, fine-tuning and preference learning differ in the objective and the data only.

A step reads: accumulate the gradients of its micro-batches, update, record. Everything that decides the next step is in
the weights, the optimiser's state, the random number generators and the step's number; the data's order is a function
of the seed and that number. Hence a resumed run is the run that was never stopped, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from craton.errors import TrainingError
from craton.training.experts import balance_step
from craton.training.interrupts import Interrupts
from craton.training.memory import keep_buffers
from craton.training.objective import LossParts, Objective, Settling, StepBatch
from craton.training.optimisers import Optimisers, parameter_groups
from craton.training.parallel import parallelise, reshard
from craton.training.ranks import Ranks
from craton.training.schedules import rate_share
from craton.training.settings import TrainingSettings
from craton.training.state import Progress, load_state, load_weights, prune, random_state, save_state
from craton.training.state import checkpoints as checkpoints_in
from craton.trunk import Trunk
from craton.trunk.block import Block

# Without `save_every`, a checkpoint is due when so much time has passed since the last one.
SAVE_SECONDS = 300.0


class StepData(Protocol):
    """Where the loop's batches come from: a pure function of the step (`craton.data.loader.Loader`)."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass."""

    def step(self, index: int) -> Sequence[StepBatch]:
        """This rank's micro-batches of a step; every rank has the same number of them."""


@runtime_checkable
class FrontEnd(Protocol):
    """What turns a model's input into the trunk's: the dtype of what it makes decides for all that follows."""

    compute_dtype: torch.dtype | None


class Observer(Protocol):
    """What is told of a run while it goes on. Values: "loss", "learning_rate", "gradient_norm", "seconds" ..."""

    def on_step(self, progress: Progress, steps: int, values: Mapping[str, float]) -> None:
        """A step has been made."""

    def on_evaluation(self, progress: Progress, values: Mapping[str, float]) -> None:
        """The held-out data has been scored."""

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        """A checkpoint is whole."""


class TrainingStep(nn.Module):
    """Model and objective as one module: whatever the objective reads of the model, sharding has gathered it."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: StepBatch) -> LossParts:
        return self.objective(self.model, batch)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: where, with which loss (in the last step), and the last evaluation."""

    progress: Progress
    loss: float
    evaluation: dict[str, float] = field(default_factory=dict)


class Trainer:
    """One run of the loop over `model`. Call `fit` once.

    data: micro-batches of each step. held_out: fixed batches that evaluations score, this rank's; held_out_bytes: of
    the text that their targets stand for, on all ranks, where that is known. folder: for checkpoints (none: none are
    written). The trained parameters must be fp32; activations run in `dtype`.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        data: StepData,
        settings: TrainingSettings,
        *,
        dtype: torch.dtype,
        ranks: Ranks | None = None,
        held_out: Sequence[StepBatch] = (),
        held_out_bytes: float | None = None,
        observers: Sequence[Observer] = (),
        folder: Path | None = None,
    ) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.ranks = ranks or Ranks(torch.device("cpu"))
        self.held_out, self.held_out_bytes = held_out, held_out_bytes
        self.observers, self.folder = list(observers), folder
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * data.steps_per_epoch))
        self.progress = Progress()
        self._prepare(objective, dtype)
        self.optimisers = Optimisers(parameter_groups(model, settings), settings)
        self._dropout = getattr(objective, "dropout", True)
        self._random: dict[str, Tensor] = {}
        self._evaluation: dict[str, float] = {}

    def fit(self, resume: Path | None = None) -> Outcome:
        """Train to the last step, from the checkpoint `resume` if one is given.

        Raises TrainingError before an update whose loss or gradient is not finite; weights and checkpoints are then
        those of the last good step. KeyboardInterrupt (Ctrl-C, SIGTERM) leaves a checkpoint of the last whole step.
        """
        torch.manual_seed(self.settings.seed * 1_000_003 + self.ranks.data_rank)
        if resume is not None:
            self.progress = load_state(resume, self.model, self.optimisers, self.ranks)
        loss = math.nan
        saved_at, saved_step = time.monotonic(), self.progress.step
        interrupts = Interrupts()
        with interrupts.handled():
            try:
                self._random = random_state(self.ranks.device)
                while self.progress.step < self.steps:
                    loss = self._step(interrupts)
                    last = self.progress.step == self.steps
                    is_best = (last or self._due(self.settings.evaluate_every)) and self._evaluate()
                    late = not self.settings.save_every and self._late(saved_at)
                    if is_best or last or late or self._due(self.settings.save_every):
                        with interrupts.held():
                            self._save()
                        saved_at, saved_step = time.monotonic(), self.progress.step
            except KeyboardInterrupt:
                # Alone we can save at once; other ranks may be anywhere, and their last checkpoint has to do.
                if self.ranks.world == 1 and self.progress.step > saved_step:
                    with interrupts.held():
                        self._save()
                raise
        return Outcome(replace(self.progress), loss, self._evaluation)

    def load_best(self) -> None:
        """Put the weights of the checkpoint with the lowest held-out loss back into the model, if there is one."""
        if self.folder is not None and self.progress.best_step not in (None, self.progress.step):
            for step, path in checkpoints_in(self.folder):
                if step == self.progress.best_step:
                    load_weights(path, self.model, self.ranks)

    def _prepare(self, objective: Objective, dtype: torch.dtype) -> None:
        keep_buffers()
        masters = [name for name, p in self.model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if masters:
            raise TrainingError(f"trained weights must be float32: {masters[0]} is not", remedy="load it as float32")
        self.model.to(self.ranks.device)
        for module in self.model.modules():
            if isinstance(module, FrontEnd):
                module.compute_dtype = dtype
            if isinstance(module, Trunk):
                module.checkpointing = self.settings.checkpointing
            if isinstance(module, Block) and self.settings.compile:
                module.compile()
        self.step_module = TrainingStep(self.model, objective)
        parallelise(self.step_module, self.model, self.ranks, dtype)

    def _step(self, interrupts: Interrupts) -> float:
        started = time.perf_counter()
        batches = self.data.step(self.progress.step)
        loss_sum, count, metrics = self._accumulate(batches)
        share = rate_share(self.settings, self.progress.step, self.steps)
        gradient_norm = self._scale_gradients(loss_sum, count)
        with interrupts.held():
            if count:
                self.optimisers.step(share)
                if isinstance(self.step_module.objective, Settling):
                    self.step_module.objective.settle(self.model)
            router = balance_step(self.model)
            tokens, trained = self.ranks.sums([sum(b.tokens for b in batches), sum(b.trained for b in batches)])
            seconds = time.perf_counter() - started
            self.progress.step += 1
            self.progress.tokens += int(tokens)
            self.progress.trained_tokens += int(trained)
            self.progress.seconds += seconds
            self._random = random_state(self.ranks.device)  # an interrupted step is made again from its beginning
        loss = loss_sum / count if count else 0.0
        values = {
            "loss": loss,
            "learning_rate": share * self.settings.learning_rate,
            "gradient_norm": gradient_norm,
            "tokens": tokens,
            "trained_tokens": trained,
            "seconds": seconds,
            **{name: value / max(count, 1) for name, value in metrics.items()},
            **{name: float(value) for name, value in router.items()},
        }
        for observer in self.observers:
            observer.on_step(self.progress, self.steps, values)
        return loss

    def _accumulate(self, batches: Sequence[StepBatch]) -> tuple[float, int, dict[str, float]]:
        """Add up the gradients of a step's summed losses; the sums of loss, targets and metrics over all ranks."""
        self.model.train(self._dropout)
        sums = Sums()
        for batch in batches:
            parts = self.step_module(batch.to(self.ranks.device))
            parts.loss_sum.backward()
            sums.add(parts)
        return sums.over(self.ranks)

    def _scale_gradients(self, loss_sum: float, count: int) -> float:
        """Divide the gradients by the targets of the whole step and clip them; their norm before it was clipped.

        Every rank computes the same norm, so all stop together where it is not finite.
        """
        norm = _total_norm(self.optimisers.gradients()) / max(count, 1)
        if not (math.isfinite(norm) and math.isfinite(loss_sum)):
            self.optimisers.zero_grad()
            raise TrainingError(
                f"step {self.progress.step + 1}: loss {loss_sum / max(count, 1):g}, gradient's norm {norm:g}",
                where="the update was not made; weights are those of the step before",
                remedy="lower the learning rate, lengthen the warm-up, or look at this step's data",
            )
        clip = self.settings.clip
        factor = (min(1.0, clip / (norm + 1e-6)) if clip else 1.0) / max(count, 1)
        torch._foreach_mul_(self.optimisers.gradients(), factor)
        return norm

    def _evaluate(self) -> bool:
        """Score the held-out data; whether it was never better."""
        if not self.held_out:
            return False
        self._evaluation = evaluate(self.step_module, self.held_out, self.ranks)
        loss = self._evaluation["loss"]
        if self.held_out_bytes:
            nats = loss * self._evaluation["targets"]
            self._evaluation["bits_per_byte"] = nats / math.log(2) / self.held_out_bytes
        is_best = self.progress.best_loss is None or loss < self.progress.best_loss
        if is_best:
            self.progress.best_loss, self.progress.best_step = loss, self.progress.step
        for observer in self.observers:
            observer.on_evaluation(self.progress, self._evaluation)
        return is_best

    def _save(self) -> None:
        if self.folder is None:
            return
        path = save_state(self.folder, self.model, self.optimisers, self.progress, self._random, self.ranks)
        if self.ranks.is_first:
            prune(self.folder, self.settings.keep_last, self.progress.best_step)
        for observer in self.observers:
            observer.on_checkpoint(self.progress, path)

    def _due(self, every: int) -> bool:
        return bool(every) and self.progress.step % every == 0

    def _late(self, saved_at: float) -> bool:
        # The first rank's clock decides, so that all ranks save or none does.
        late = time.monotonic() - saved_at > SAVE_SECONDS
        return bool(self.ranks.sums([float(late and self.ranks.is_first)])[0])


@torch.no_grad()
def evaluate(step_module: TrainingStep, batches: Sequence[StepBatch], ranks: Ranks) -> dict[str, float]:
    """Loss and metrics over this rank's `batches`: sums over all targets, divided once. Training mode is kept."""
    training = step_module.model.training
    step_module.model.eval()
    sums = Sums()
    try:
        for batch in batches:
            sums.add(step_module(batch.to(ranks.device)))
    finally:
        step_module.model.train(training)
        reshard(step_module)
    total, count, metrics = sums.over(ranks)
    scale = 1 / max(count, 1)
    return {"loss": total * scale, "targets": count, **{name: value * scale for name, value in metrics.items()}}


class Sums:
    """Losses, targets and metrics of micro-batches, added up. They stay on the device until they are asked for, so that
    a GPU never waits for the sum of one micro-batch before it begins the next."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, parts: LossParts) -> None:
        """Take in a micro-batch."""
        self._count += parts.count
        for name, value in {"": parts.loss_sum, **parts.metrics}.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def over(self, ranks: Ranks) -> tuple[float, int, dict[str, float]]:
        """(loss, targets, metrics) over all ranks."""
        names = sorted(self._sums)  # the loss first, and on every rank in one order
        values = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        count, *sums = ranks.sums([float(self._count), *values])
        loss, metrics = (sums[0], dict(zip(names[1:], sums[1:], strict=True))) if names else (0.0, {})
        return loss, round(count), metrics


def _total_norm(gradients: list[Tensor]) -> float:
    """The length of all gradients together, sharded or not, in fp32."""
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    squares = 0.0
    for members in groups.values():
        norm = torch.nn.utils.get_total_norm(members)
        squares += float(norm.full_tensor() if isinstance(norm, DTensor) else norm) ** 2
    return math.sqrt(squares)
