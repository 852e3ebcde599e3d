"""The header of a safetensors file, checked against the file's true length before anything is mapped. Torch-free.

The format (safetensors README): 8 bytes, the header's length, little-endian; the header, a JSON object
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` with an optional `"__metadata__"` of strings; then the
tensors' bytes, packed without holes. The file may come from a stranger: no number in it is believed.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from craton.errors import FileFormatError

PICKLE_REMEDY: Final = (
    "a pickle can run code when it is opened, so Craton never loads one; use a version in safetensors, or convert it "
    "where you trust it: load it with transformers and call save_pretrained"
)

MAX_HEADER_BYTES: Final = 100_000_000  # the format's own limit
MAX_TENSORS: Final = 250_000
MAX_RANK: Final = 64
MAX_NAME: Final = 1000

# The format's names -> (bits per element, torch's name; None where torch has no such element).
DTYPES: Final[dict[str, tuple[int, str | None]]] = {
    "BOOL": (8, "bool"),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}

# First bytes of what is most often taken for a safetensors file -> (what it is, what to do).
_LOOK_ALIKES: Final = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes: a pickle", PICKLE_REMEDY),
    (b"\x80", "a pickle", PICKLE_REMEDY),
    (b"GGUF", "a GGUF file", "give it the suffix .gguf"),
    (b"\x89HDF", "an HDF5 file", "convert it to safetensors where it was made"),
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "run `git lfs pull` in its repository"),
    (b"<!DOCTYPE", "a web page, not the weights", "download the file again"),
    (b"<html", "a web page, not the weights", "download the file again"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor: `dtype` in the format's words ("BF16"), sizes and file offset in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    offset: int


def read_header(file: BinaryIO, size: int, path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors and the metadata of the safetensors file open as `file`, `size` bytes long; `path` is for messages.

    Raises:
        FileFormatError: not safetensors, cut short, or numbers that contradict each other or the file.
    """
    start = file.read(64)
    if start[8:9] != b"{":
        for magic, what, remedy in _LOOK_ALIKES:
            if start.startswith(magic):
                raise damaged(path, f"{path.name} is not safetensors: it is {what}", remedy)
        raise damaged(path, f"{path.name} is not safetensors: no JSON object follows its first 8 bytes")
    (length,) = struct.unpack("<Q", start[:8])
    if length > MAX_HEADER_BYTES:
        raise damaged(path, f"the header claims {length:,} bytes; the format allows {MAX_HEADER_BYTES:,}")
    if 8 + length > size:
        raise damaged(path, f"the header claims {length:,} bytes, but only {size - 8:,} follow")
    file.seek(8)
    raw = file.read(length)
    # One object and two lists for each tensor: counted before parsing, because they decide how much memory it takes.
    if raw.count(b"{") > MAX_TENSORS or raw.count(b"[") > 2 * MAX_TENSORS:
        raise damaged(path, f"the header describes more than {MAX_TENSORS:,} tensors")
    header = parse_json(raw, path, "the header")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "__metadata__ must map strings to strings")
    tensors = {name: _check_entry(name, entry, 8 + length, path) for name, entry in header.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
        if info.offset != end:
            fault = "overlaps the tensor before it" if info.offset < end else "leaves a hole before it"
            raise damaged(path, f"tensor {info.name!r} {fault}: it starts at byte {info.offset:,}, not {end:,}")
        end += info.nbytes
    if end != size:
        fault = f"{end - size:,} bytes are missing" if end > size else f"{size - end:,} bytes belong to no tensor"
        raise damaged(path, f"the tensors end at byte {end:,} and the file at {size:,}: {fault}")
    return tensors, metadata


def _check_entry(name: str, entry: object, data_start: int, path: Path) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise damaged(path, f"a tensor's name has {len(name):,} characters; at most {MAX_NAME:,} are read")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged(path, f"tensor {name!r} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise damaged(path, f"tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise damaged(path, f"tensor {name!r} has a bad shape: {MAX_RANK} or fewer whole numbers >= 0 are needed")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"tensor {name!r} has bad data_offsets: begin <= end are needed")
    # A zero among huge sizes hides an overflow from the product, so zeros count as ones here.
    bits = DTYPES[dtype][0]
    if math.prod(max(size, 1) for size in shape) * bits >= 2**63:
        raise damaged(path, f"tensor {name!r} has a shape whose size overflows 64 bits")
    if math.prod(shape) * bits != (offsets[1] - offsets[0]) * 8:
        raise damaged(
            path,
            f"tensor {name!r}: shape {shape} of {dtype} needs {math.prod(shape) * bits / 8:,.15g} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]:,}",
        )
    return TensorInfo(name, dtype, tuple(shape), offsets[1] - offsets[0], data_start + offsets[0])


def _is_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def parse_json(raw: bytes, path: Path, what: str) -> dict[str, Any]:
    """A JSON object in strict UTF-8 without duplicate keys; anything else is a FileFormatError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if len(counts) != len(pairs):
            twice = next(key for key, count in counts.items() if count > 1)
            raise damaged(path, f"{what} has the key {twice[:MAX_NAME]!r} twice")
        return dict(pairs)

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError as error:
        raise damaged(path, f"{what} is nested too deeply") from error
    except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
        raise damaged(path, f"{what} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise damaged(path, f"{what} is not a JSON object")
    return parsed


def damaged(path: Path, what: str, remedy: str = "the file is damaged or cut short: fetch it again") -> FileFormatError:
    """The refusal of the file `path`."""
    return FileFormatError(what, where=str(path), remedy=remedy)
