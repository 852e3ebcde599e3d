"""What the endpoints of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from craton.inference.plan import DTypeChoice
from craton.serving import logs
from craton.serving.admission import Gate
from craton.serving.errors import ApiError
from craton.serving.forms import Forms
from craton.serving.keys import KeyFile
from craton.serving.metrics import Metrics
from craton.serving.models import Shelf
from craton.serving.settings import ServeSettings
from craton.serving.worker import EngineWorker


class ServerState:
    """Settings, models, worker, gate and counters. Made in the running event loop."""

    def __init__(
        self, models: Sequence[str], settings: ServeSettings, *, dtype: DTypeChoice = "auto", threads: int | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.keys = KeyFile(settings.api_key_file) if settings.api_key_file is not None else None
        self.gate = Gate(settings.concurrency, settings.queue)
        self.worker = EngineWorker(send_buffer=settings.send_buffer, at_once=settings.concurrency)
        self.forms = Forms()
        self.draining = False
        self.started = settings.load == "use"  # whether what is loaded at the start has been
        try:
            self.shelf = Shelf(
                models,
                self.worker,
                dtype=dtype,
                threads=threads,
                memory=settings.memory_bytes,
                slots=settings.concurrency,
                kv=settings.kv,
                on_load=_log_load,
                on_unload=_log_unload,
            )
        except BaseException:
            self.worker.abandon()
            raise

    @property
    def ready(self) -> bool:
        """Whether requests are welcome and would be answered at once."""
        return self.started and not self.draining and self.worker.alive

    def start_draining(self) -> asyncio.TimerHandle:
        """Refuse what is new, and end what is still being written when the time for it is over."""
        self.draining = True
        logs.event("draining", seconds=self.settings.drain, running=self.worker.running)
        stopping = ApiError(503, "the server is shutting down", code="shutting_down")
        return asyncio.get_running_loop().call_later(self.settings.drain, self.cut_off, stopping)

    async def close(self) -> None:
        """End the threads."""
        self.forms.close()
        await self.worker.close()

    def cut_off(self, error: ApiError) -> None:
        """End everything that runs or waits with an error."""
        self.gate.close(error)
        self.worker.fail_all(error)


def _log_load(name: str, seconds: float) -> None:
    logs.event("model loaded", model=name, seconds=round(seconds, 3))


def _log_unload(name: str) -> None:
    logs.event("model unloaded", model=name)
