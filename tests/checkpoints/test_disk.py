"""Files on a disk, and memory that goes back to the system."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import pytest

from craton.checkpoints.disk import trim_heap


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries give freed memory back by themselves")
def test_freed_memory_between_used_blocks_goes_back_to_the_system() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    size, count = 64 << 10, 1024
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)  # a page counts once it is written
    for number, block in enumerate(blocks):
        if number % 8:
            libc.free(block)
    freed = size * count * 7 // 8
    before = resident()
    trim_heap()
    assert before - resident() > freed // 2
    for block in blocks[::8]:
        libc.free(block)


def resident() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
