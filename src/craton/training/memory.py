"""glibc told to keep its large buffers, which a training step frees and asks for again all the time."""

from __future__ import annotations

import ctypes
import sys

# From malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_buffers() -> bool:
    """Serve large buffers from a heap that is never given back to the system, from now on; whether that was possible.

    By default each buffer beyond 32 MB is a fresh map, and every page of it a fault at every step: 20 to 50 % of the
    time of a small model's step on a CPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
