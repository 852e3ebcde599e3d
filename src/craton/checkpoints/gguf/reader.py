"""Opening GGUF files: metadata as Python values, tensors as blocks or as numbers."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from craton.checkpoints.disk import release_pages
from craton.checkpoints.gguf.cursor import DOWNLOAD_AGAIN
from craton.checkpoints.gguf.dequantize import Blocks, dequantize
from craton.checkpoints.gguf.header import Header, TensorInfo, read_header
from craton.checkpoints.gguf.metadata import PlainValue
from craton.checkpoints.gguf.types import GGMLType
from craton.errors import FileFormatError, UnknownName

_INTEGERS = {GGMLType.I8: "<i1", GGMLType.I16: "<i2", GGMLType.I32: "<i4", GGMLType.I64: "<i8"}


class GGUFFile:
    """An open GGUF file: metadata in memory, tensors mapped read-only. Use it as a context manager.

    version: 2 or 3. alignment: bytes. tensors: the TensorInfo of each name, in the file's order.
    typed_metadata: the TypedValue of each key, which `write_gguf` takes as it is.
    """

    def __init__(self, path: Path, data: mmap.mmap, header: Header) -> None:
        self.path = path
        self.version = header.version
        self.alignment = header.alignment
        self.typed_metadata = header.metadata
        self.tensors = header.tensors
        self._data = data

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Map and check the file. Raises FileFormatError where it cannot be opened or is not a sound GGUF file.

        The file must not shrink while it is open: the system ends a program that reads a mapping past the end.
        """
        path = Path(path)
        data = _map(path)
        try:
            return cls(path, data, read_header(data, str(path)))
        except BaseException:
            data.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the file. Arrays that `blocks` gave out stay valid: the mapping then goes with the last of them."""
        with contextlib.suppress(BufferError):
            self._data.close()

    def release(self) -> None:
        """Give back the memory that reading tensors has filled (see `release_pages`); they stay valid."""
        release_pages(self._data)

    @property
    def metadata(self) -> dict[str, PlainValue]:
        """The plain Python value of each key: bool, int, float, str, or a list of one of them."""
        return {key: typed.value for key, typed in self.typed_metadata.items()}

    def blocks(self, name: str) -> Blocks:
        """The tensor's bytes as they lie in the file: a read-only view [rows, bytes per row]. Raises UnknownName."""
        tensor = self._tensor(name)
        flat = np.frombuffer(self._data, np.uint8, count=tensor.nbytes, offset=tensor.offset)
        return flat.reshape(tensor.rows, -1)

    def array(self, name: str) -> NDArray[Any]:
        """The tensor's values in its shape, in memory of their own: float32, or integers where it holds integers.

        Raises UnknownName, and FileFormatError for a type that holds no weights (Q8_1, Q8_K).
        """
        tensor = self._tensor(name)
        blocks = self.blocks(name)
        if tensor.type in _INTEGERS:
            return blocks.view(_INTEGERS[tensor.type]).reshape(tensor.shape).copy()
        return dequantize(blocks, tensor.type).reshape(tensor.shape)

    def _tensor(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise UnknownName("tensor", name, self.tensors, where=str(self.path))
        return self.tensors[name]


def _map(path: Path) -> mmap.mmap:
    """The whole file, mapped read-only. Raises FileFormatError."""
    try:
        # Asked before opening: opening a named pipe would wait for a writer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise FileFormatError("not a file", where=str(path), remedy="give the path of a .gguf file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise FileFormatError("the file is empty", where=str(path), remedy=DOWNLOAD_AGAIN)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FileFormatError(
            f"cannot open the file: {reason}", where=str(path), remedy="check the path and its permissions"
        ) from error
