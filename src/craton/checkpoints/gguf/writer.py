"""Writing GGUF files, version 3, little-endian: streamed, one tensor in memory at a time, and whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from craton.checkpoints.gguf.cursor import MAX_NAME_BYTES
from craton.checkpoints.gguf.dequantize import Blocks
from craton.checkpoints.gguf.header import ALIGNMENT_KEY, ALIGNMENT_RULE, MAGIC, MAX_DIMENSIONS, aligned, alignment_of
from craton.checkpoints.gguf.metadata import ARRAY_ID, PlainValue, TypedValue, ValueType, as_typed
from craton.checkpoints.gguf.types import GGMLType
from craton.errors import StoreError, UsageError

_VERSION = 3
_MAX_TENSOR_NAME_BYTES = 63  # GGML keeps tensor names in 64 bytes, with an end mark


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor to write. `shape` is row-major; `blocks` is called once, when its turn comes, and gives its bytes:
    uint8, as `quantize` makes and `GGUFFile.blocks` reads them."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    blocks: Callable[[], Blocks]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.type.block_size * self.type.block_bytes


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, TypedValue | PlainValue], tensors: Iterable[TensorSource]
) -> None:
    """Write `path`, replacing what was there only once the new file is complete and on the disk.

    metadata: strings, bools and lists of strings as they are; numbers wrapped with their width (`u32(7)`); or what
    `GGUFFile.typed_metadata` holds. Its "general.alignment", 32 if absent, is the file's alignment.

    Raises UsageError for what the format cannot hold (before anything is written), StoreError where the disk refuses.
    """
    path = Path(path)
    tensors = list(tensors)
    typed = {key: as_typed(key, value) for key, value in metadata.items()}
    alignment = alignment_of(typed)
    if alignment is None:
        raise UsageError(f"the alignment is not {ALIGNMENT_RULE}", where=f"key {ALIGNMENT_KEY!r}")
    _check_tensors(tensors)
    header = _header(typed, tensors, alignment)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        with temporary.open("xb") as file:
            file.write(header)
            for tensor in tensors:
                _write_tensor(file, tensor, alignment)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        size = len(header) + sum(aligned(tensor.nbytes, alignment) for tensor in tensors)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise StoreError(
            f"cannot write the file: {error.strerror or error}",
            where=str(path),
            remedy=f"make room: the file needs {size:,} bytes" if full else "check the folder and its permissions",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_tensors(tensors: Sequence[TensorSource]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        where, shape, type = f"tensor {tensor.name!r}", tensor.shape, tensor.type
        if tensor.name in names:
            raise UsageError("the tensor is given twice", where=where)
        names.add(tensor.name)
        if len(_utf8(tensor.name, where)) > _MAX_TENSOR_NAME_BYTES:
            raise UsageError(f"GGML cannot hold a name of more than {_MAX_TENSOR_NAME_BYTES} bytes", where=where)
        if not 1 <= len(shape) <= MAX_DIMENSIONS or min(shape) < 1:
            raise UsageError(f"the shape {shape} is not 1 to {MAX_DIMENSIONS} positive dimensions", where=where)
        if shape[-1] % type.block_size:
            raise UsageError(
                f"rows of {shape[-1]} values are not whole {type.name} blocks of {type.block_size}",
                where=where,
                remedy="use F16 or BF16 for this tensor",
            )


def _header(metadata: Mapping[str, TypedValue], tensors: Sequence[TensorSource], alignment: int) -> bytes:
    """All that stands before the tensors' data, padding included."""
    out = bytearray(MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, typed in metadata.items():
        where = f"key {key!r:.80}"
        if not 0 < len(_utf8(key, where)) <= MAX_NAME_BYTES:
            raise UsageError(f"a key must have 1 to {MAX_NAME_BYTES} bytes", where=where)
        out += _string(key, where) + _value(typed, where)
    offset = 0
    for tensor in tensors:
        dimensions = tensor.shape[::-1]
        out += _string(tensor.name, f"tensor {tensor.name!r}")
        out += struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
        out += struct.pack("<IQ", tensor.type.id, offset)
        offset += aligned(tensor.nbytes, alignment)
    return bytes(out).ljust(aligned(len(out), alignment), b"\0")


def _value(typed: TypedValue, where: str) -> bytes:
    is_array = isinstance(typed.value, list)
    items: list[Any] = typed.value if isinstance(typed.value, list) else [typed.value]
    if typed.type is ValueType.STRING:
        # As they are read: only the strings of an array, a vocabulary's tokens, may hold bytes that are not UTF-8.
        packed = b"".join(_string(item, where, "surrogateescape" if is_array else "strict") for item in items)
    else:
        packed = typed.type.packing(len(items)).pack(*items)
    if is_array:
        return struct.pack("<IIQ", ARRAY_ID, typed.type.id, len(items)) + packed
    return struct.pack("<I", typed.type.id) + packed


def _string(text: str, where: str, errors: str = "strict") -> bytes:
    raw = _utf8(text, where, errors)
    return struct.pack("<Q", len(raw)) + raw


def _utf8(text: str, where: str, errors: str = "strict") -> bytes:
    try:
        return text.encode("utf-8", errors)
    except UnicodeEncodeError as error:
        raise UsageError(f"{text!r:.80} is not Unicode text: {error.reason}", where=where) from error


def _write_tensor(file: BinaryIO, tensor: TensorSource, alignment: int) -> None:
    blocks = tensor.blocks()
    if blocks.dtype != np.uint8 or blocks.nbytes != tensor.nbytes:
        raise UsageError(
            f"{blocks.nbytes} bytes of {blocks.dtype} were given for {tensor.type.name} {tensor.shape}, "
            f"which is {tensor.nbytes} bytes of uint8",
            where=f"tensor {tensor.name!r}",
        )
    file.write(np.ascontiguousarray(blocks).data)
    file.write(bytes(aligned(tensor.nbytes, alignment) - tensor.nbytes))


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
