"""Whether weights hold NaN or infinity, looked at before a model is made of them."""

from __future__ import annotations

import numpy as np
import torch

from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.weights import QuantizedTensor, Weight

# Where a block's fp16 scales lie. What they scale are small integers, so the scales decide.
SCALES_AT: dict[GGMLType, tuple[int, ...]] = {
    GGMLType.Q4_0: (0,),
    GGMLType.Q4_1: (0, 2),
    GGMLType.Q5_0: (0,),
    GGMLType.Q5_1: (0, 2),
    GGMLType.Q8_0: (0,),
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q4_K: (0, 2),
    GGMLType.Q5_K: (0, 2),
    GGMLType.Q6_K: (208,),
}
FP16_EXPONENT = np.uint16(0x7C00)  # all ones in NaN and infinity, and only there


def is_finite(weight: Weight) -> bool:
    """Whether every number of `weight` is one."""
    if isinstance(weight, QuantizedTensor):
        halves = weight.blocks.view("<u2").reshape(-1, weight.kind.block_bytes // 2)
        scales = (halves[:, at // 2] & FP16_EXPONENT for at in SCALES_AT[weight.kind])
        return not any((exponents == FP16_EXPONENT).any() for exponents in scales)
    if not weight.is_floating_point() or not weight.numel():
        return True
    return bool(torch.stack(weight.aminmax()).isfinite().all())
