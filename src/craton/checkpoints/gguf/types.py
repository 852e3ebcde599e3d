"""The tensor types of GGML: id in the file, values a block, bytes a block."""

from __future__ import annotations

from enum import Enum


class GGMLType(Enum):
    """A tensor type. Values are stored in blocks; a row holds whole blocks, and rows follow one another.

    Q8_1 and Q8_K are GGML's formats for activations: their layout is known, but no file holds weights in them.
    Spec: ggml.h and ggml-common.h of the GGML project.
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q8_1 = (9, 32, 36)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    BF16 = (30, 1, 2)

    def __init__(self, id: int, block_size: int, block_bytes: int) -> None:
        self.id = id
        self.block_size = block_size
        self.block_bytes = block_bytes


TYPE_OF_ID = {type.id: type for type in GGMLType}

# Types that Craton cannot read, so that a refusal can name them.
UNSUPPORTED_TYPES = {
    4: "Q4_2 (removed from GGML)",
    5: "Q4_3 (removed from GGML)",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    31: "Q4_0_4_4 (removed from GGML)",
    32: "Q4_0_4_8 (removed from GGML)",
    33: "Q4_0_8_8 (removed from GGML)",
    34: "TQ1_0",
    35: "TQ2_0",
    36: "IQ4_NL_4_4 (removed from GGML)",
    37: "IQ4_NL_4_8 (removed from GGML)",
    38: "IQ4_NL_8_8 (removed from GGML)",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
