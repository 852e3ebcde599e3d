"""Files on a disk that may be full, read-only or gone: errors in words, digests, writes that survive a power cut."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import mmap
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

from craton.errors import StoreError

# The errors that are about the disk, and what can be done.
DISK_FAULTS: Final = {
    errno.ENOSPC: "free some space on this disk, or use another one",
    errno.EDQUOT: "free some of your quota on this disk, or use another one",
    errno.EACCES: "choose a place that you may use, or change its permissions",
    errno.EPERM: "choose a place that you may use, or change its permissions",
    errno.EROFS: "this disk is read-only: choose another place",
}


@contextlib.contextmanager
def disk_errors(doing: str, path: Path) -> Iterator[None]:
    """Turn an OSError into a StoreError that says what was being done ("write model.safetensors") and where."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise StoreError(f"cannot {doing}: {why}", where=str(path), remedy=DISK_FAULTS.get(error.errno or 0)) from error


def trim_heap() -> None:
    """Give memory that was freed back to the system. glibc keeps what lies between blocks that are still used, which
    after weights have been moved is as much as the weights; other C libraries are left alone."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_pages(data: mmap.mmap) -> None:
    """Give back the memory that reading a file's map has filled; what is read again comes from the disk again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        data.madvise(mmap.MADV_DONTNEED)


def sha256_of(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of a file, in hex. `on_bytes` is told the size of each piece as it is read.

    Raises:
        StoreError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with disk_errors(f"read {path.name}", path), path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
    return digest.hexdigest()


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a new file and wait until its bytes are on the disk. Raises OSError, FileExistsError included."""
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in place of `path`, or leave what is there: never half of it. Raises StoreError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with disk_errors(f"write {path.name}", path):
        try:
            write_synced(part, [content])
            os.replace(part, path)
            sync_folder(path.parent)
        finally:
            part.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk. Raises OSError."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and its renames need no flush
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
