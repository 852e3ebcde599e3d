"""How much a model would miss of its parts, measured on text: layers, key-value heads with their queries, channels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.compression.calibration import LOGIT_ROWS
from craton.models import CausalLM
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

# Windows that go through the model at once.
TOKENS: Final = 2048


def layer_losses(
    model: CausalLM,
    ids_NT: Tensor,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    only: Collection[int] | None = None,
) -> dict[int, float]:
    """By its number, the loss in nats a token with a layer left out, the others as they are. only: of these layers.

    Dearer than to compare a layer's input with its output (ShortGPT, arXiv 2403.03853), and what is wanted: a layer
    that changes its stream little may do so where it matters. What lies before the layer is computed only once.
    """
    count = len(model.trunk.layers)
    totals = dict.fromkeys(range(count) if only is None else sorted(only), 0.0)
    targets = 0
    batches = _batches(ids_NT)
    for number, part_NT in enumerate(batches):
        with torch.inference_mode():
            layout, x_TD, targets_T = _begin(model, part_NT)
            for removed in range(count):
                on_progress(number * count + removed, len(batches) * count)
                if removed in totals:
                    out_TD = x_TD
                    for later in range(removed + 1, count):
                        out_TD = model.trunk.layers[later](out_TD, layout, later)
                    totals[removed] += float(_summed_loss(model, out_TD, targets_T))
                x_TD = model.trunk.layers[removed](x_TD, layout, removed)
            targets += int((targets_T >= 0).sum())
    return {layer: total / targets for layer, total in totals.items()}


def block_influence(model: CausalLM, ids_NT: Tensor) -> list[float]:
    """1 - the cosine of each layer's input and output, the mean over tokens (ShortGPT, arXiv 2403.03853): cheap, and
    what `layer_losses` is measured against."""
    sums = [0.0] * len(model.trunk.layers)
    with torch.inference_mode():
        for part_NT in _batches(ids_NT):
            layout, x_TD, _ = _begin(model, part_NT)
            for number, layer in enumerate(model.trunk.layers):
                out_TD = layer(x_TD, layout, number)
                sums[number] += float((1 - F.cosine_similarity(x_TD.float(), out_TD.float(), -1)).sum())
                x_TD = out_TD
    return [total / ids_NT.numel() for total in sums]


@dataclass(frozen=True)
class Importance:
    """groups: of each layer, one number for each key-value head; channels: one for each channel."""

    groups: list[Tensor]
    channels: list[Tensor]


@torch.inference_mode()
def unit_importance(model: CausalLM, ids_NT: Tensor) -> Importance:
    """How much each unit adds to its layer's output: the length, over all tokens, of what it writes into the stream
    (activation norm x weight norm, as Wanda, arXiv 2306.11695, weighs single weights).

    As good as the first-order change of the loss, |activation x gradient|, and without a backward pass (docs/log.md).
    """
    layers: list[Any] = list(model.trunk.layers)
    groups = [torch.zeros(layer.config.attention.kv_heads) for layer in layers]
    channels = [torch.zeros(layer.config.feedforward.hidden) for layer in layers]
    hooks = []
    for layer, of_groups, of_channels in zip(layers, groups, channels, strict=True):
        hooks.append(layer.attention.o.register_forward_pre_hook(_written_squares(of_groups)))
        hooks.append(layer.feedforward.down.register_forward_pre_hook(_written_squares(of_channels)))
    try:
        for part_NT in _batches(ids_NT):
            layout, x_TD, _ = _begin(model, part_NT)
            for number, layer in enumerate(layers):
                x_TD = layer(x_TD, layout, number)
    finally:
        for hook in hooks:
            hook.remove()
    return Importance([squares.sqrt() for squares in groups], [squares.sqrt() for squares in channels])


def _written_squares(sums: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook before a linear layer whose inputs are cut into as many units as `sums` has numbers: it adds up the
    squares of what each unit, through its columns of the weight, writes."""

    def hook(linear: Any, inputs: tuple[Tensor]) -> None:
        size = linear.in_features // len(sums)
        x_TX, weight_OX = inputs[0].float(), linear.weight.float()
        if size == 1:
            sums.add_(x_TX.square().sum(0) * weight_OX.square().sum(0))
            return
        for unit in range(len(sums)):
            columns = slice(unit * size, (unit + 1) * size)
            sums[unit] += (x_TX[:, columns] @ weight_OX[:, columns].T).square().sum()

    return hook


def text_nats(model: CausalLM, sequences: Sequence[Tensor]) -> float:
    """The loss in nats, summed over all tokens but each sequence's first; fp32."""
    total = 0.0
    with torch.inference_mode():
        for ids_T in sequences:
            hidden_TD = model.hidden(ids_T, *sequence_layout([len(ids_T)]))
            for rows_SD, targets_S in zip(hidden_TD[:-1].split(LOGIT_ROWS), ids_T[1:].split(LOGIT_ROWS), strict=True):
                total += float(F.cross_entropy(model.logits(rows_SD).float(), targets_S, reduction="sum"))
    return total


def _batches(ids_NT: Tensor) -> list[Tensor]:
    return list(ids_NT.split(max(1, TOKENS // ids_NT.shape[1])))


def _begin(model: CausalLM, ids_NT: Tensor) -> tuple[Layout, Tensor, Tensor]:
    """The layout of windows laid one after another, the stream before the first layer, and the targets (-100 at the end
    of each window)."""
    windows, length = ids_NT.shape
    positions_T, segments_T = sequence_layout([length] * windows)
    trunk = model.trunk
    x_TD = model.embedding(ids_NT.flatten())
    if model.config.embedding_scale is not None:
        x_TD = x_TD * torch.tensor(model.config.embedding_scale, dtype=x_TD.dtype)
    if trunk.positions is not None:
        x_TD = x_TD + trunk.positions(positions_T).to(x_TD.dtype)
    if trunk.input_norm is not None:
        x_TD = trunk.input_norm(x_TD)
    targets_NT = torch.cat((ids_NT[:, 1:], ids_NT.new_full((windows, 1), -100)), 1)
    return Layout(positions_T, segments_T, None, x_TD.dtype, None), x_TD, targets_NT.flatten()


def _summed_loss(model: CausalLM, x_TD: Tensor, targets_T: Tensor) -> Tensor:
    hidden_TD = x_TD if model.trunk.final_norm is None else model.trunk.final_norm(x_TD)
    losses = [
        F.cross_entropy(model.logits(rows_SD).float(), targets_S, ignore_index=-100, reduction="sum")
        for rows_SD, targets_S in zip(hidden_TD.split(LOGIT_ROWS), targets_T.split(LOGIT_ROWS), strict=True)
    ]
    return torch.stack(losses).sum()
