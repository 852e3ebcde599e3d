"""Learning-rate schedules, as pure functions of the step."""

from __future__ import annotations

import math

from craton.training.settings import TrainingSettings


def rate_share(settings: TrainingSettings, step: int, steps: int) -> float:
    """The learning rate of update `step` (0-based, of `steps`) as a share of the highest one.

    After a linear warm-up: cosine (Loshchilov & Hutter 2017, arXiv 1608.03983), linear, constant, or wsd: flat, then
    a linear fall over the last `decay` of the steps (warm-up-stable-decay, Hu 2024, arXiv 2404.06395).
    """
    warmup = math.ceil(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    floor = settings.final_rate
    # The last update still moves: the schedule reaches its end one step after it.
    done = (step - warmup) / max(1, steps - warmup)
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "cosine":
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    if settings.schedule == "linear":
        return 1 - (1 - floor) * done
    decay = min(math.ceil(settings.decay * steps), steps - warmup)
    into_decay = step - (steps - decay)
    return 1.0 if into_decay < 0 else 1 - (1 - floor) * (into_decay + 1) / (decay + 1)
