"""What a run will take, told before it starts: parameters, memory, tokens, FLOPs, time, disk."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import nn

from craton.training.experts import forget_load
from craton.training.flops import token_flops
from craton.training.hardware import gemm_peak
from craton.training.loop import Trainer
from craton.training.objective import StepBatch
from craton.trunk.block import Block
from craton.trunk.config import ExpertsConfig

# A micro-batch that takes longer than twice this and than this share of the run is not tried out, and time comes from
# the peak of the products alone.
PROBE_SECONDS: Final = 2.0
PROBE_SHARE: Final = 0.05
# The share of that peak that whole training steps reach on CPUs and GPUs, from a plain small model to a large one.
USUAL_SHARE: Final = (0.15, 0.6)
# Torch, its libraries and the tokeniser, before any weight.
BASE_BYTES: Final = 450e6


@dataclass(frozen=True)
class Estimate:
    """Ranges are (low, high). memory and disk in bytes, seconds of the whole run, peak in FLOP/s of products."""

    parameters: int
    trained_parameters: int
    steps: int
    tokens: int
    trained_tokens: int
    flops: float
    memory: tuple[float, float]
    seconds: tuple[float, float]
    disk: float
    peak: float

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def estimate(trainer: Trainer, dtype: torch.dtype) -> Estimate:
    """Probe `trainer`'s model on this machine for about two seconds, or a twentieth of a long run; nothing of the run
    is changed by it."""
    model, device = trainer.model, trainer.ranks.device
    sample = trainer.data.step(0)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens_a_step = sum(batch.tokens for batch in sample) * trainer.ranks.data_world
    trained_share = sum(batch.trained for batch in sample) / max(1, sum(batch.tokens for batch in sample))
    tokens = tokens_a_step * trainer.steps
    longest = max(max(batch.lengths) for batch in sample)
    flops = token_flops(model, longest).training * tokens
    peak = gemm_peak(dtype, device)
    largest = max(sample, key=lambda batch: batch.tokens)
    rate = None
    # On a matrix unit a run may be four times as slow as products alone say: a long run is worth a longer look.
    whole, probe = (token_flops(model, longest).training * n / peak / USUAL_SHARE[0] for n in (tokens, largest.tokens))
    if probe < max(2 * PROBE_SECONDS, PROBE_SHARE * whole / trainer.ranks.data_world):
        rate = measured_rate(trainer, largest)
    if rate is None:
        low, high = (flops / (peak * share) / trainer.ranks.data_world for share in reversed(USUAL_SHARE))
    else:
        # A machine that is shared with others is slower for a while, and an update and the data take their time.
        low, high = tokens / rate / trainer.ranks.data_world, 1.35 * tokens / rate / trainer.ranks.data_world
    return Estimate(
        parameters=total,
        trained_parameters=trained,
        steps=trainer.steps,
        tokens=tokens,
        trained_tokens=round(tokens * trained_share),
        flops=flops,
        memory=memory_range(model, largest.tokens, dtype, checkpointing=trainer.settings.checkpointing),
        seconds=(low, high),
        disk=_disk(trainer, trained),
        peak=peak,
    )


def memory_range(model: nn.Module, tokens: int, dtype: torch.dtype, *, checkpointing: bool) -> tuple[float, float]:
    """Peak bytes of a process that trains `model` on micro-batches of `tokens`, (low, high).

    Weights as they are; for a trained one a gradient and two averages in fp32 and its copy in `dtype`; what the blocks
    keep for going backwards; logits of one chunk. The high end counts what an allocator keeps beside.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights += sum(b.numel() * b.element_size() for b in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = trained * 12.0
    copies = max((p.numel() for p in model.parameters() if p.dtype != dtype), default=0) * dtype.itemsize
    kept = sum(_kept_per_token(m) if not checkpointing else m.width for m in model.modules() if isinstance(m, Block))
    working = max((_kept_per_token(m) for m in model.modules() if isinstance(m, Block)), default=0)
    activations = tokens * (kept + working) * dtype.itemsize
    least = BASE_BYTES + weights + state + copies + activations
    return least, 1.5 * least + 0.4e9


def _kept_per_token(block: Block) -> float:
    """Numbers that a block keeps of each token until its gradients are made."""
    attention, feedforward = block.config.attention, block.config.feedforward
    queries, keys = attention.heads * attention.head_size, attention.kv_heads * attention.head_size
    # Queries and keys before and after their rotation, values, and what attention gave; then the norms' inputs and
    # outputs and the two sums of the residual stream.
    kept = 6 * block.width + 3 * queries + 4 * keys
    if isinstance(feedforward, ExpertsConfig):
        copies = feedforward.per_token * (4 * feedforward.expert.hidden + 2 * block.width)
        return kept + copies + (4 * feedforward.shared.hidden if feedforward.shared else 0)
    return kept + 4 * feedforward.hidden  # gate, up, the activation and their product


def measured_rate(trainer: Trainer, batch: StepBatch) -> float:
    """Tokens per second of one micro-batch forward and back, the best of about two seconds. Changes nothing of the run,
    and must be called by every rank."""
    random = torch.get_rng_state()
    best = float("inf")
    started = time.perf_counter()
    for _ in range(3):  # the first one also pays for fresh memory
        begin = time.perf_counter()
        parts = trainer.step_module(batch.to(trainer.ranks.device))
        parts.loss_sum.backward()
        parts.loss_sum.item()
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - started > PROBE_SECONDS:
            break
    trainer.optimisers.zero_grad()
    forget_load(trainer.model)
    torch.set_rng_state(random)
    return batch.tokens / best


def _disk(trainer: Trainer, trained: int) -> float:
    """Bytes of the checkpoints that are kept, the best one included, and of the result."""
    if trainer.folder is None:
        return 0.0
    return (trainer.settings.keep_last + 1) * trained * 12.0 + 4.0 * trained
