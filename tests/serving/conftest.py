"""A real server on loopback, in a thread of the test process, with a tiny random model."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra [serve]")
httpx = pytest.importorskip("httpx")


@dataclass
class Running:
    """A server, and what a test wants to know of it."""

    url: str
    state: Any
    server: Any
    loop: asyncio.AbstractEventLoop
    thread: threading.Thread = field(repr=False)
    http: httpx.Client = field(repr=False)

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((name + " ", name + "{")))

    def settled(self, seconds: float = 1.0) -> bool:
        """Whether nothing runs or waits within so much time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.state.worker.running == self.state.gate.running == self.state.gate.waiting == 0:
                return True
            time.sleep(0.01)
        return False

    def stop(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running_server(models, **settings) -> Iterator[Running]:
    """Start a server and stop it."""
    from craton.serving.server import serve
    from craton.serving.settings import ServeSettings

    started, found, failed = threading.Event(), [], []

    def on_start(server, state, port) -> None:
        url = f"http://127.0.0.1:{port}"
        client = httpx.Client(base_url=url, timeout=300)
        found.append(Running(url, state, server, asyncio.get_running_loop(), thread, client))
        started.set()

    def run() -> None:
        try:
            chosen = ServeSettings(**{"port": 0, "drain": 2.0, **settings})
            asyncio.run(serve([str(m) for m in models], chosen, threads=1, on_start=on_start))
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(120)
    if not found:
        thread.join()
        raise failed[0]
    until = time.monotonic() + 60
    while not found[0].state.ready and time.monotonic() < until and thread.is_alive():
        time.sleep(0.01)
    try:
        yield found[0]
    finally:
        found[0].stop()
        if failed:
            raise failed[0]


@pytest.fixture(scope="session")
def serving():
    """A context manager that starts a server with settings of one's own."""
    return running_server


@pytest.fixture
def slow_engine(monkeypatch):
    """slow(seconds): from now on every step of an engine takes that much longer. The tiny model writes hundreds of
    tokens in the time that a busy machine may keep a client waiting, and then there is nothing left to interrupt."""
    from craton.inference.engine import Engine

    step = Engine.step

    def slow(seconds: float) -> None:
        def slowed(self):
            time.sleep(seconds)
            return step(self)

        monkeypatch.setattr(Engine, "step", slowed)

    return slow


@pytest.fixture(scope="session")
def server(tiny_model) -> Iterator[Running]:
    """One server for all tests that change nothing in it."""
    with running_server([tiny_model]) as running:
        yield running


@pytest.fixture(scope="session")
def model_id(tiny_model) -> str:
    return tiny_model.name


@pytest.fixture(scope="session")
def client(server):
    """OpenAI's own client."""
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)
