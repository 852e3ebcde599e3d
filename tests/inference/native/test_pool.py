"""The thread pool: many callers, a fork, and no work done while there is none."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from craton.errors import UsageError
from craton.inference import native

pytestmark = pytest.mark.usefixtures("kernels")

SCRIPT_START = """
import os, signal, time
import torch
from craton.inference import native
weight = native.PackedWeight.from_gguf_blocks("Q8_0", torch.arange(4000 * 34, dtype=torch.uint8).reshape(4000, 34) % 60)
x = torch.randn(9, 32)
expected = native.linear(x, weight, threads=3)
"""


def run(script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT_START + script], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr


def test_several_python_threads_at_once(make_blocks):
    def engine(seed: int) -> bool:
        weight = native.PackedWeight.from_gguf_blocks("Q4_1", make_blocks("Q4_1", 700, 96, seed)[0])
        x = torch.randn(5, 96)
        alone = native.linear(x, weight, threads=1)
        return all(torch.equal(native.linear(x, weight, threads=3), alone) for _ in range(200))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(engine, range(8)))


def test_a_fork_has_a_pool_of_its_own():
    run(
        """
import threading
stop = threading.Event()
def keep_busy():
    while not stop.is_set():
        native.linear(x, weight, threads=3)
busy = threading.Thread(target=keep_busy)
busy.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for the parent's threads would wait for ever
        same = all(torch.equal(native.linear(x, weight, threads=3), expected) for _ in range(50))
        threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 3
        os._exit(0 if same and threads == 3 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
busy.join()
assert torch.equal(native.linear(x, weight, threads=3), expected)
"""
    )


def test_idle_threads_sleep():
    run(
        """
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
used = time.process_time() - before
assert used < 0.25, f"{used} s of processor time in 0.5 s without work"
"""
    )


def test_set_threads_refuses_none_at_all():
    with pytest.raises(UsageError, match="0 threads"):
        native.set_threads(0)
