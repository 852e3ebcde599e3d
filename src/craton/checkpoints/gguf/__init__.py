"""GGUF files in and out, on NumPy alone: the format of llama.cpp and its relatives.

`GGUFFile.open(path)` reads (bounds-checked, memory-mapped), `write_gguf` writes; `quantize` and `dequantize` turn
float32 into GGML's blocks and back; `u32(7)`, `f32([0.5])`, ... give metadata its types.
"""

from craton.checkpoints.gguf.dequantize import dequantize
from craton.checkpoints.gguf.header import TensorInfo
from craton.checkpoints.gguf.metadata import (
    TypedValue,
    ValueType,
    boolean,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    string,
    u8,
    u16,
    u32,
    u64,
)
from craton.checkpoints.gguf.quantize import quantize
from craton.checkpoints.gguf.reader import GGUFFile
from craton.checkpoints.gguf.types import GGMLType
from craton.checkpoints.gguf.writer import TensorSource, write_gguf

__all__ = [
    "GGMLType",
    "GGUFFile",
    "TensorInfo",
    "TensorSource",
    "TypedValue",
    "ValueType",
    "boolean",
    "dequantize",
    "f32",
    "f64",
    "i8",
    "i16",
    "i32",
    "i64",
    "quantize",
    "string",
    "u8",
    "u16",
    "u32",
    "u64",
    "write_gguf",
]
