"""The trunk's linear layer, and the one way to put another linear-shaped module (adapter, quantised, pruned, packed)
in its place."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """x[..., in] -> [..., out] in x's dtype, whatever the weight's: training keeps fp32 weights and computes in the
    dtype of its activations, without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def replace_linears(
    model: nn.Module, where: Callable[[str, nn.Module], bool], make: Callable[[str, nn.Module], nn.Module]
) -> list[str]:
    """Replace each submodule for which `where(name, module)` holds by `make(name, module)`; give their names.

    Names are the dotted names of `model.named_modules()`, so saving, merging and exporting walk the same ones.
    """
    # Names only: a list of the modules would keep all old weights in memory until the last one is replaced.
    chosen = [name for name, module in model.named_modules() if name and where(name, module)]
    for name in chosen:
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, make(name, model.get_submodule(name)))
    return chosen
