"""Balance of the experts' load by a bias on the router's choice, without an auxiliary loss."""

from __future__ import annotations

from math import log
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from craton.models.initialisation import placed_like
from craton.trunk.feedforward import Experts

RATE: Final = 1e-3  # of loss-free balancing's paper and of DeepSeek-V3


@torch.no_grad()
def balance_step(model: nn.Module, rate: float = RATE) -> dict[str, Tensor]:
    """Call after each optimiser step, on every rank: moves each expert's bias by `rate` towards an even load.

    bias += rate * sign(mean load - load), the load being the tokens of the step on all ranks (loss-free balancing, Wang
    2024, arXiv 2408.15664). Mixtures whose router has no bias are only observed. Begins the count of the next step.

    Gives fp32 scalars, and none for a model without experts: `experts/max_load` and `experts/min_load`, the fullest and
    the emptiest expert of all layers as a share of the mean; `experts/entropy` of the load, the mean over layers as a
    share of the largest possible (1: even).
    """
    layers = [module for module in model.modules() if isinstance(module, Experts)]
    distributed = dist.is_available() and dist.is_initialized()
    if not layers or (not distributed and all(layer.load_E is None for layer in layers)):
        return {}
    loads = [_take_load(layer) for layer in layers]
    if distributed:
        joined = torch.cat(loads)
        dist.all_reduce(joined)
        loads = list(joined.split([len(load_E) for load_E in loads]))
    highest, lowest, entropies = [], [], []
    for layer, load_E in zip(layers, loads, strict=True):
        load_E = load_E.float()
        mean = load_E.mean()
        if layer.router_bias is not None:
            layer.router_bias.add_(placed_like(rate * (mean - load_E).sign(), layer.router_bias))
        highest.append(load_E.max() / mean)
        lowest.append(load_E.min() / mean)
        entropies.append(torch.special.entr(load_E / load_E.sum()).sum() / log(max(2, len(load_E))))
    return {
        "experts/max_load": torch.stack(highest).max(),
        "experts/min_load": torch.stack(lowest).min(),
        "experts/entropy": torch.stack(entropies).mean(),
    }


def forget_load(model: nn.Module) -> None:
    """Drop what was counted outside of a step, as by a probe of the machine's speed."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.load_E = None


def _take_load(layer: Experts) -> Tensor:
    load_E, layer.load_E = layer.load_E, None
    if load_E is None:  # this rank had no tokens
        load_E = torch.zeros(layer.config.count, dtype=torch.int64, device=layer.router.weight.device)
    return load_E
