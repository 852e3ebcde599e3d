"""The lock between processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from craton.errors import StoreError
from craton.store import locks
from craton.store.locks import held

HOLDER = """
import sys
from pathlib import Path
from craton.store.locks import held
with held(Path(sys.argv[1]), lambda: None):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[bytes]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.parametrize("end", ["leave", "kill"])
def test_a_second_process_waits_until_the_first_leaves_or_dies(tmp_path: Path, end: str) -> None:
    holder = hold(tmp_path / "x.lock")
    waited = threading.Event()
    order: list[str] = []

    def second() -> None:
        with held(tmp_path / "x.lock", waited.set):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    assert waited.wait(10)
    assert order == []
    order.append("first ends")
    if end == "kill":
        holder.kill()
    holder.communicate()
    thread.join(10)
    assert order == ["first ends", "second"]


def test_without_contention_nothing_is_said(tmp_path: Path) -> None:
    calls: list[int] = []
    for _ in range(2):
        with held(tmp_path / "x.lock", lambda: calls.append(1)):
            pass
    assert calls == []


def test_file_systems_without_locks_are_served_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(descriptor: int, wait: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks, "_acquire", acquire)
    number = errno.ENOLCK
    entered = False
    with held(tmp_path / "x.lock", lambda: None):
        entered = True
    assert entered
    number = errno.EIO
    with pytest.raises(StoreError, match="cannot lock"), held(tmp_path / "x.lock", lambda: None):
        pass


def test_a_lock_that_cannot_be_created(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot create the lock"), held(tmp_path / "no" / "x.lock", lambda: None):
        pass
