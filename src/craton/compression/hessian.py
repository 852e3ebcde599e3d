"""The inverse of a layer's Hessian, as solvers that compensate for each rounded column need it."""

from __future__ import annotations

import torch
from torch import Tensor

from craton.errors import DataError

DAMPING = 0.01  # of the mean second moment, added to each
MOST_DAMPING = 10.0


def importance(gram_II: Tensor) -> Tensor:
    """What an error in the weights of each input counts, [in]. Inputs that were (nearly) always 0 count a little."""
    diagonal_I = gram_II.diagonal()
    return diagonal_I + DAMPING * diagonal_I.mean()


def inverse_factor(gram_II: Tensor) -> Tensor:
    """Upper triangular U with U^T U = (gram + damping)^-1, fp32: row i of U holds what is left of the inverse once the
    inputs before i are fixed (GPTQ, Frantar 2022, arXiv 2210.17323, section 3.3). An input that was always 0 counts by
    itself: nothing is made up for by it.

    Raises DataError for a Hessian that no damping makes positive definite (inputs that are not finite).
    """
    hessian_II = gram_II.double()
    diagonal_I = hessian_II.diagonal()  # a view: the matrix changes with it
    diagonal_I[diagonal_I == 0] = 1.0
    mean, damping = float(diagonal_I.mean()), DAMPING
    while damping <= MOST_DAMPING:
        matrix_II = hessian_II.clone()
        matrix_II.diagonal().add_(damping * mean)
        lower_II, failed = torch.linalg.cholesky_ex(matrix_II)
        if not failed:
            inverse_II = torch.cholesky_inverse(lower_II)
            upper_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if not failed:
                return upper_II.float()
        damping *= 10
    raise DataError(
        "what a layer reads has no usable second moments: its values are not finite, or too large",
        remedy="calibrate with other text, or use a method that needs none (rtn, hqq)",
    )
