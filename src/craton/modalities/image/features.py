"""Vectors of patches as colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from craton.modalities.image.files import Pixels


def principal_colours(features_HWD: NDArray[np.float32]) -> Pixels:
    """The three directions in which vectors differ most (principal components) as red, green and blue: [H, W, 3].

    Each is scaled from its 2nd to its 98th percentile. A direction's sign is free; it is the one in which the vector
    that stands out most is bright, so that the same picture has the same colours.
    """
    height, width, size = features_HWD.shape
    rows_ND = features_HWD.reshape(-1, size).astype(np.float64)
    centred_ND = rows_ND - rows_ND.mean(0)
    # By the covariance: 3 times as fast as the singular values of a large picture.
    _, directions_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    values_N3 = centred_ND @ directions_DD[:, :-4:-1]
    values_N3 *= np.sign(values_N3[np.abs(values_N3).argmax(0), range(values_N3.shape[1])])
    low, high = np.percentile(values_N3, 2, axis=0), np.percentile(values_N3, 98, axis=0)
    # A direction in which they do not differ is rounding, which is not to be seen.
    least = max(1e-6 * np.abs(values_N3).max(), 1e-12)
    shades = np.clip((values_N3 - low) / np.maximum(high - low, least), 0, 1) * 255
    colours = np.zeros((len(rows_ND), 3), np.uint8)
    colours[:, : shades.shape[1]] = np.rint(shades)
    return colours.reshape(height, width, 3)
