"""AWQ: inputs that are large get finer weights. Their columns are scaled up before rounding, and whatever makes these
inputs is scaled down by as much, so the saved model has nothing that others lack; then the largest weights are clipped.

Lin 2023, arXiv 2306.00978. Errors are those of the layers' outputs over all that was read, from its second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Inputs, weight_of
from craton.compression.grids import SHARES, SHARES_OF_2, Form, Grid, candidates, grouped, int_weight
from craton.compression.rtn import quantize_rtn
from craton.trunk.attention import Attention
from craton.trunk.block import Block
from craton.trunk.feedforward import FeedForward
from craton.trunk.norms import Norm

STEPS = 20  # exponents from 0 (no scales) to 1 that are tried
SEARCH_ROWS = 256  # outputs of each matrix, evenly spread, that the search of an exponent looks at
ROWS = 1024  # outputs at once, where each group's errors are weighed


@dataclass(frozen=True)
class Fold:
    """Linear layers that read the same inputs, and what makes these: a norm, or a linear layer."""

    readers: tuple[str, ...]
    maker: str


def fold_scales(
    block: Block, inputs: dict[str, Inputs], form_of: Callable[[str], Form | None], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Scale the block in place, and `inputs` with it. Gives the changed weights of norms and biases, by their names.

    form_of: of a linear layer that is to be quantised; None: it stays as it is, and so do the inputs that it reads.
    dtype: of the saved norms. A norm's new weights are rounded first, and the linear layers make up for what they then
    really are.
    """
    changed: dict[str, Tensor] = {}
    for fold in _folds(block):
        forms = [form for name in fold.readers if (form := form_of(name)) is not None]
        maker = block.get_submodule(fold.maker)
        kept = len(forms) < len(fold.readers) or (isinstance(maker, nn.Linear) and form_of(fold.maker) is None)
        if kept or not set(fold.readers) <= inputs.keys():
            continue
        weights = [weight_of(block, name) for name in fold.readers]
        scales_I = search_scales(weights, forms, inputs[fold.readers[0]])
        scales_I = _scale_maker(maker, scales_I, dtype)
        if isinstance(maker, Norm):
            changed |= {f"{fold.maker}.{name}": tensor for name, tensor in maker.state_dict().items()}
        elif getattr(maker, "bias", None) is not None:
            changed[f"{fold.maker}.bias"] = maker.bias  # type: ignore[assignment]
        scaled: dict[int, Inputs] = {}
        for name, weight_OI in zip(fold.readers, weights, strict=True):
            weight_OI.mul_(scales_I)
            one = inputs[name]
            if id(one) not in scaled:
                scaled[id(one)] = one.divided(scales_I)
            inputs[name] = scaled[id(one)]
    return changed


def search_scales(weights: list[Tensor], forms: list[Form], inputs: Inputs) -> Tensor:
    """The scales |x|^a, for the a of least output error; 1 for all inputs where none is better."""
    magnitude_I, gram_II = inputs.magnitude.clamp(min=1e-6), inputs.gram
    weights = [weight_OI[:: max(1, len(weight_OI) // SEARCH_ROWS)] for weight_OI in weights]
    best_I, least = torch.ones_like(magnitude_I), float("inf")
    for step in range(STEPS):
        scales_I = magnitude_I.pow(step / STEPS)
        scales_I = scales_I / (scales_I.max() * scales_I.min()).sqrt()
        error = 0.0
        for weight_OI, form in zip(weights, forms, strict=True):
            w_OGK = grouped(weight_OI * scales_I, form.group)
            rounded_OI = candidates(w_OGK, form, (1.0,))[0].nearest(w_OGK).flatten(1) / scales_I
            error += output_error(weight_OI - rounded_OI, gram_II)
        if error < least:
            best_I, least = scales_I, error
    return best_I


def quantize_awq(weight_OI: Tensor, form: Form, inputs: Inputs | None) -> IntWeight:
    """Round to nearest, the largest weights of each group cut off where that lessens the group's part of the output."""
    if inputs is None:
        return quantize_rtn(weight_OI, form)
    w_OGK = grouped(weight_OI, form.group)
    groups, size = w_OGK.shape[1:]
    gram_II = inputs.gram
    gram_GKK = torch.stack([gram_II[g * size :, g * size :][:size, :size] for g in range(groups)])
    parts = [_clipped(part, form, gram_GKK) for part in w_OGK.split(ROWS)]
    grid = Grid(form, torch.cat([g.scales_OG for g in parts]), torch.cat([g.zeros_OG for g in parts]))
    return int_weight(grid.codes(w_OGK), grid)


def output_error(error_OI: Tensor, gram_II: Tensor) -> float:
    """The mean over tokens of |error x|^2."""
    return float(((error_OI @ gram_II) * error_OI).sum())


def relative_output_error(error_OI: Tensor, weight_OI: Tensor, inputs: Inputs) -> float:
    """|error x| / |weight x|, both root mean squares over what was read."""
    gram_II = inputs.gram
    return (max(0.0, output_error(error_OI, gram_II)) / max(output_error(weight_OI, gram_II), 1e-30)) ** 0.5


def _clipped(w_OGK: Tensor, form: Form, gram_GKK: Tensor) -> Grid:
    best: Grid | None = None
    least_OG = torch.empty(0)
    for grid in candidates(w_OGK, form, SHARES.get(form.bits, SHARES_OF_2)):
        error_GOK = (w_OGK - grid.nearest(w_OGK)).transpose(0, 1)
        error_OG = ((error_GOK @ gram_GKK) * error_GOK).sum(-1).T
        if best is None:
            best, least_OG = grid, error_OG
            continue
        better = error_OG < least_OG
        least_OG = torch.where(better, error_OG, least_OG)
        best = grid.where(better, best)
    assert best is not None
    return best


def _folds(block: Block) -> Iterator[Fold]:
    if "input" in block.attention_norm and isinstance(block.attention, Attention):
        yield Fold(("attention.q", "attention.k", "attention.v"), "attention_norm.input")
        config = block.attention.config
        if config.heads == config.kv_heads:
            yield Fold(("attention.o",), "attention.v")
    if "input" in block.feedforward_norm and isinstance(block.feedforward, FeedForward):
        gated = block.feedforward.gate is not None
        readers = ("feedforward.gate", "feedforward.up") if gated else ("feedforward.up",)
        yield Fold(readers, "feedforward_norm.input")
    for name, module in block.named_modules():
        if isinstance(module, FeedForward) and module.gate is not None:
            yield Fold((f"{name}.down",), f"{name}.up")


def _scale_maker(maker: nn.Module, scales_I: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide what `maker` gives by the scales; gives what it was really divided by."""
    if isinstance(maker, Norm):
        offset = maker.config.offset
        before_I = maker.weight + offset
        maker.weight.copy_((before_I / scales_I - offset).to(dtype).float())
        after_I = maker.weight + offset
        usable = (after_I != 0) & (before_I != 0)
        really_I = torch.where(usable, before_I / torch.where(usable, after_I, 1.0), 1.0)
        if maker.bias is not None:
            maker.bias.copy_((maker.bias / really_I).to(dtype).float())
        return really_I
    assert isinstance(maker, nn.Linear)
    maker.weight.div_(scales_I[:, None])
    if maker.bias is not None:
        maker.bias.copy_((maker.bias / scales_I).to(dtype).float())
    return scales_I
