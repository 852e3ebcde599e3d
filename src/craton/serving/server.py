"""One process that serves: it binds, loads, answers, and on SIGTERM lets what runs finish before it ends."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from craton.errors import UsageError
from craton.inference.plan import DTypeChoice
from craton.serving import logs
from craton.serving.app import make_app
from craton.serving.settings import ServeSettings, check_exposure
from craton.serving.state import ServerState

# Clients that do not close their connections after the drain get so long.
LAST_SECONDS = 3
KEEP_ALIVE_SECONDS = 30


class _Server(uvicorn.Server):
    """Uvicorn with a drain: SIGTERM refuses what is new and gives what runs its time."""

    def __init__(self, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config)
        self._state = state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = self._state.start_draining()
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # Uvicorn raises the signal anew when it has stopped, which would end the process before the engine has.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run(
    models: Sequence[str], settings: ServeSettings, *, dtype: DTypeChoice = "auto", threads: int | None = None
) -> None:
    """Serve until SIGTERM or SIGINT. Raises UsageError for an address that cannot be had, and what loading raises."""
    logs.start_logging()
    gc.freeze()  # what was imported stays: no collection, which answers would wait for, looks at it again
    asyncio.run(serve(models, settings, dtype=dtype, threads=threads))


async def serve(
    models: Sequence[str],
    settings: ServeSettings,
    *,
    dtype: DTypeChoice = "auto",
    threads: int | None = None,
    on_start: Callable[[_Server, ServerState, int], None] = lambda server, state, port: None,
) -> None:
    """Serve in the running event loop. on_start: is given the server, its state and its port once it listens."""
    check_exposure(settings)
    bound = _bind(settings)
    port = int(bound.getsockname()[1])
    state = None
    try:
        state = ServerState(models, settings, dtype=dtype, threads=threads)
        if state.keys is not None:
            state.keys.keys()  # a file that cannot be read is said at once
        server = _Server(_config(state), state)
        logs.event("listening", url=f"http://{settings.host}:{port}", models=[name for name, *_ in state.shelf.listing])
        on_start(server, state, port)
        loading = asyncio.create_task(_load(state, server))
        await server.serve(sockets=[bound])
        if loading.done():
            loading.result()
        loading.cancel()
    finally:
        bound.close()
        if state is not None:
            await state.close()
        logs.event("stopped")


async def _load(state: ServerState, server: _Server) -> None:
    if state.settings.load == "start":
        try:
            await state.shelf.load_all()
        except Exception:
            server.should_exit = True
            raise
        state.started = True
        logs.event("ready")


def _config(state: ServerState) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(state),
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(state.settings.drain) + LAST_SECONDS,
    )


def _bind(settings: ServeSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host.strip("[]"), settings.port), family=family, backlog=512)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror}",
            remedy="choose another --port, or stop what listens there",
        ) from None
