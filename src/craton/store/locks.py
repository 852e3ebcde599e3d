"""A lock between processes, held by the operating system: it is free again when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from craton.checkpoints.disk import disk_errors

if sys.platform == "win32":
    import msvcrt
    import time

    def _acquire(descriptor: int, wait: bool) -> None:
        while True:  # msvcrt's own waiting gives up after ten seconds
            try:
                return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    raise
            time.sleep(0.2)
else:
    import fcntl

    def _acquire(descriptor: int, wait: bool) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


_BUSY = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextlib.contextmanager
def held(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file `path` in the block; `on_wait` is called once if another process has it.

    Some network file systems have no locks. There the block runs without one: what is published appears by a rename
    either way, so the lock saves work and a shared download, not the truth.

    Raises:
        StoreError: the lock file cannot be created.
    """
    with disk_errors(f"create the lock {path.name}", path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            _acquire(descriptor, wait=False)
        except OSError as error:
            if error.errno in _BUSY:
                on_wait()
                with disk_errors(f"wait for the lock {path.name}", path):
                    _acquire(descriptor, wait=True)
            elif error.errno not in _NO_LOCKS_HERE:
                with disk_errors(f"lock {path.name}", path):
                    raise
        yield
    finally:
        os.close(descriptor)
