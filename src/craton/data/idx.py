"""MNIST's IDX files: arrays of bytes with their shape before them, plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from craton.checkpoints.disk import disk_errors
from craton.errors import FileFormatError

BYTES: Final = 0x08  # the type of the numbers: unsigned bytes, the only one that pictures and labels have
MOST: Final = 2 * 1024**3  # bytes of one array


def is_idx(path: Path) -> bool:
    """Whether a file's name says that it holds pictures in this format."""
    return "-idx3-ubyte" in path.name or "images.idx3-ubyte" in path.name


def labels_of(path: Path) -> Path | None:
    """The file of labels that belongs to a file of pictures, if it is there."""
    name = path.name.replace("images", "labels").replace("idx3", "idx1")
    beside = path.with_name(name)
    return beside if beside.is_file() and beside != path else None


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of an IDX file of unsigned bytes. Raises FileFormatError for what is none, or is not whole."""
    with disk_errors("read the file", path):
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
                head = file.read(4)
                if len(head) < 4 or head[:2] != b"\0\0" or head[2] != BYTES or not 1 <= head[3] <= 4:
                    raise FileFormatError("this is no IDX file of unsigned bytes", where=str(path))
                sizes = file.read(4 * head[3])
                shape = tuple(np.frombuffer(sizes[: len(sizes) // 4 * 4], ">u4").astype(int).tolist())
                size = int(np.prod(shape, dtype=object))
                if len(shape) != head[3] or not 0 < size <= MOST:
                    raise FileFormatError(f"an array of the shape {list(shape)} is not read", where=str(path))
                data = file.read(size + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise FileFormatError(f"not gzip data, or cut off: {error}", where=str(path)) from None
    if len(data) != size:
        raise FileFormatError(
            f"{'less' if len(data) < size else 'more'} than the {size:,} bytes that its header says are there",
            where=str(path),
            remedy="copy or download it again",
        )
    return np.frombuffer(data, np.uint8).reshape(shape)
