"""How much memory there is for keys and values."""

from __future__ import annotations

import os
from pathlib import Path

# Of the memory that this process may use. Weights, activations and other processes need theirs.
CACHE_SHARE = 0.25


def default_cache_bytes() -> int:
    """A quarter of the machine's memory, or of what a cgroup allows."""
    return int(CACHE_SHARE * min(_physical(), _cgroup_limit()))


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cgroup_limit() -> int:
    # cgroup v2: "max", or bytes.
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return _physical()
