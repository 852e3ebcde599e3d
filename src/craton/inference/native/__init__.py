"""Native kernels: linear layers with 4- and 8-bit weights, at the speed the memory allows.

Weights come from GGUF blocks of 32 (Q4_0, Q4_1, Q8_0), are packed once, and are multiplied by activations that are
quantised to int8 on the way, on a thread pool of the kernels' own. The C++ lies in cpp/ behind a plain C interface;
where it was not built, `available()` is False, `reason()` says why, and torch does the same work.
"""

from craton.inference.native.library import available, has_tiles, isa, reason
from craton.inference.native.packed import GROUP, PackedWeight, dequantize, linear, rows, set_threads

__all__ = [
    "GROUP",
    "PackedWeight",
    "available",
    "dequantize",
    "has_tiles",
    "isa",
    "linear",
    "reason",
    "rows",
    "set_threads",
]
