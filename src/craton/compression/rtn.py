"""Round to nearest: every weight becomes the nearest point of its group's grid. No data is needed."""

from __future__ import annotations

from torch import Tensor

from craton.checkpoints.int_weight import IntWeight
from craton.compression.blocks import Inputs
from craton.compression.grids import Form, find_grid, grouped, int_weight


def quantize_rtn(weight_OI: Tensor, form: Form, inputs: Inputs | None = None) -> IntWeight:
    """Each group's scale (and zero) is searched for the least squared error of its weights. inputs: not read."""
    w_OGK = grouped(weight_OI, form.group)
    grid = find_grid(w_OGK, form)
    return int_weight(grid.codes(w_OGK), grid)
