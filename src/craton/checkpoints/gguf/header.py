"""The header of a GGUF file, versions 2 and 3: parsed into metadata and tensor places, and believed in nothing.

A file is a header (magic, version, counts, metadata, tensor infos), padding, and the tensors' data, each aligned.
Counts, lengths, dimensions and offsets are held against the file's real size before they are used, so a hostile
file costs a refusal and a bounded amount of memory. Spec: docs/gguf.md of the GGML project.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, replace

from craton.checkpoints.gguf.cursor import MAX_NAME_BYTES, Cursor
from craton.checkpoints.gguf.metadata import ARRAY_ID, VALUE_TYPE_OF_ID, TypedValue, ValueType
from craton.checkpoints.gguf.types import TYPE_OF_ID, UNSUPPORTED_TYPES, GGMLType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT_KEY = "general.alignment"
MAX_ALIGNMENT = 64 << 10
ALIGNMENT_RULE = f"a U32 power of two from 8 to {MAX_ALIGNMENT}"
MAX_DIMENSIONS = 4  # of a tensor, in GGML
MAX_ENTRIES = 1 << 16  # metadata keys, and tensors; the largest models have some thousands


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor's place. `shape` is row-major (GGML's dimensions reversed); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    nbytes: int

    @property
    def rows(self) -> int:
        """The product of all dimensions but the last."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True, slots=True)
class Header:
    """All that stands before the tensors' data."""

    version: int
    alignment: int
    metadata: dict[str, TypedValue]
    tensors: dict[str, TensorInfo]


def read_header(data: mmap.mmap, path: str) -> Header:
    """Parse the whole file's header; `path` is for the words of a refusal. Raises FileFormatError."""
    cursor = Cursor(data, path)
    version = _read_version(cursor)
    tensor_count, key_count = cursor.u64(), cursor.u64()
    if max(tensor_count, key_count) > MAX_ENTRIES:
        cursor.refuse(f"{tensor_count} tensors and {key_count} metadata keys; at most {MAX_ENTRIES} are read", at=8)
    metadata = _read_metadata(cursor, key_count)
    alignment = alignment_of(metadata)
    if alignment is None:
        cursor.subject = f"key {ALIGNMENT_KEY!r}"
        cursor.refuse(f"the alignment is not {ALIGNMENT_RULE}")
    tensors = [_read_tensor(cursor, index, tensor_count) for index in range(tensor_count)]
    data_start = aligned(cursor.position, alignment)
    placed = [replace(tensor, offset=data_start + tensor.offset) for tensor in tensors]
    _check_places(cursor, placed, alignment, len(data))
    return Header(version, alignment, metadata, {tensor.name: tensor for tensor in placed})


def alignment_of(metadata: dict[str, TypedValue]) -> int | None:
    """What the tensors' offsets are multiples of; None where the metadata asks for one that is not allowed."""
    typed = metadata.get(ALIGNMENT_KEY, TypedValue(ValueType.U32, 32))
    value = typed.value
    if typed.type is not ValueType.U32 or not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT:
        return None
    return value if value & (value - 1) == 0 else None


def aligned(offset: int, alignment: int) -> int:
    """`offset`, rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def _read_version(cursor: Cursor) -> int:
    magic = cursor.take(len(MAGIC))
    if magic != MAGIC:
        cursor.refuse(
            f"not a GGUF file: it starts with {magic!r}",
            at=0,
            remedy="give a .gguf file; if this is a large-file pointer or a saved web page, fetch the file itself",
        )
    version = cursor.u32()
    if version != 0 and version & 0xFFFF == 0:
        cursor.refuse("a big-endian GGUF file", at=4, remedy="convert it to little-endian with the tool that wrote it")
    if version not in VERSIONS:
        cursor.refuse(f"GGUF version {version}; only 2 and 3 are read", at=4, remedy="convert the model to version 3")
    return version


def _read_metadata(cursor: Cursor, count: int) -> dict[str, TypedValue]:
    metadata: dict[str, TypedValue] = {}
    for index in range(count):
        cursor.subject = f"metadata key {index + 1} of {count}"
        start = cursor.position
        key = cursor.text("key", MAX_NAME_BYTES)
        cursor.subject = f"key {key!r:.80}"
        if not key or key in metadata:
            cursor.refuse("the key appears twice" if key else "an empty key", at=start)
        metadata[key] = _read_value(cursor)
    return metadata


def _read_value(cursor: Cursor) -> TypedValue:
    type_id = cursor.u32()
    if type_id != ARRAY_ID:
        type = _value_type(cursor, type_id)
        return TypedValue(type, cursor.scalar(type))
    type = _value_type(cursor, cursor.u32())
    return TypedValue(type, cursor.array(type, cursor.u64()))


def _value_type(cursor: Cursor, type_id: int) -> ValueType:
    if type_id == ARRAY_ID:
        cursor.refuse("an array of arrays, which programs that read GGUF do not accept", at=cursor.position - 4)
    if type_id not in VALUE_TYPE_OF_ID:
        cursor.refuse(f"unknown value type {type_id}", at=cursor.position - 4)
    return VALUE_TYPE_OF_ID[type_id]


def _read_tensor(cursor: Cursor, index: int, count: int) -> TensorInfo:
    """One tensor info; its offset is still relative to the start of the data."""
    cursor.subject = f"tensor {index + 1} of {count}"
    name = cursor.text("tensor name", MAX_NAME_BYTES)
    cursor.subject = f"tensor {name!r:.80}"
    start = cursor.position
    dimension_count = cursor.u32()
    if not 1 <= dimension_count <= MAX_DIMENSIONS:
        cursor.refuse(f"{dimension_count} dimensions; a tensor has 1 to {MAX_DIMENSIONS}", at=start)
    shape = tuple(cursor.u64() for _ in range(dimension_count))[::-1]
    if 0 in shape:
        cursor.refuse(f"a dimension of 0 in the shape {shape}", at=start)
    type = _tensor_type(cursor)
    if shape[-1] % type.block_size:
        cursor.refuse(f"rows of {shape[-1]} values are not whole {type.name} blocks of {type.block_size}", at=start)
    return TensorInfo(name, shape, type, cursor.u64(), math.prod(shape) // type.block_size * type.block_bytes)


def _tensor_type(cursor: Cursor) -> GGMLType:
    start = cursor.position
    type_id = cursor.u32()
    if type_id in UNSUPPORTED_TYPES:
        readable = "F32, F16, BF16, Q8_0, Q4_0 to Q5_1 or Q2_K to Q6_K"
        cursor.refuse(
            f"the tensor type {UNSUPPORTED_TYPES[type_id]} cannot be read", at=start, remedy=f"use a file in {readable}"
        )
    if type_id not in TYPE_OF_ID:
        cursor.refuse(f"unknown tensor type {type_id}", at=start)
    return TYPE_OF_ID[type_id]


def _check_places(cursor: Cursor, tensors: list[TensorInfo], alignment: int, file_bytes: int) -> None:
    """Every tensor has a name of its own and lies whole and alone in the file, at a multiple of the alignment."""
    names: set[str] = set()
    end, neighbour = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        cursor.subject = f"tensor {tensor.name!r:.80}"
        if tensor.name in names:
            cursor.refuse("the tensor appears twice", at=tensor.offset)
        if tensor.offset % alignment:
            cursor.refuse(f"its data is not at a multiple of the alignment, {alignment}", at=tensor.offset)
        if tensor.offset + tensor.nbytes > file_bytes:
            cursor.refuse(
                f"its data is past the end: {tensor.nbytes} bytes, of a file of {file_bytes}", at=tensor.offset
            )
        if tensor.offset < end:
            cursor.refuse(f"its data overlaps with that of tensor {neighbour!r:.80}", at=tensor.offset)
        names.add(tensor.name)
        end, neighbour = tensor.offset + tensor.nbytes, tensor.name
