"""The models of one server: names that clients ask by, loaded at the start or on first use, always in the worker."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from craton.checkpoints.sources import SourceKind
from craton.errors import CratonError, UsageError, did_you_mean
from craton.finetuning.loading import load
from craton.inference.engine import Engine
from craton.inference.model import Model
from craton.inference.plan import DTypeChoice
from craton.models import CausalLM
from craton.serving import logs
from craton.serving.errors import ApiError
from craton.serving.worker import EngineWorker
from craton.store import find

if TYPE_CHECKING:
    from craton.compare.application import Application


@dataclass
class Served:
    """A model under its public name, loaded. application: where the name is that of a whole adaptation."""

    id: str
    model: Model
    application: Application | None = None

    @property
    def writes(self) -> bool:
        """Whether it is a language model and not an encoder."""
        return isinstance(self.model.module, CausalLM)

    def engine(self) -> Engine:
        """Its engine; call it in the worker's thread."""
        return self.model.engine

    def check_writes(self) -> None:
        """Raises ApiError for an encoder."""
        if not self.writes:
            raise ApiError(400, f"{self.id} is an encoder: it reads text and writes none", param="model")


@dataclass
class _Place:
    id: str
    source: str
    created: int = field(default_factory=lambda: int(time.time()))
    served: Served | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Shelf:
    """What a server has. Only names that it was started with lead anywhere."""

    def __init__(
        self,
        names: Sequence[str],
        worker: EngineWorker,
        *,
        dtype: DTypeChoice = "auto",
        threads: int | None = None,
        on_load: Callable[[str, float], None] = lambda name, seconds: None,
    ) -> None:
        self._worker, self._dtype, self._threads, self._on_load = worker, dtype, threads, on_load
        self._places: dict[str, _Place] = {}
        for name in names:
            place = _Place(public_name(name), name)
            if place.id in self._places:
                raise UsageError(f"two models would both be called {place.id}", remedy="rename a folder")
            self._places[place.id] = place

    @property
    def listing(self) -> list[tuple[str, int, bool]]:
        """(name, when it was registered, whether it is loaded) of each model."""
        return [(place.id, place.created, place.served is not None) for place in self._places.values()]

    def check_known(self, name: str) -> None:
        """Raises ApiError 404 for a model that this server does not have."""
        if name not in self._places:
            near = did_you_mean(name, self._places)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self._places)}"
            raise ApiError(
                404, f"this server has no model {name[:100]!r}: {hint}", param="model", code="model_not_found"
            )

    async def get(self, name: str) -> Served:
        """The model, loaded if it is not yet. Raises ApiError 404 for a name that this server does not have, 503 for a
        model that cannot be loaded."""
        self.check_known(name)
        try:
            return await self._loaded(name)
        except CratonError as error:
            logs.fault("a model cannot be loaded", error, model=name)
            raise ApiError(503, f"{name} cannot be loaded: {error.what}", param="model", code=error.code) from None

    async def load_all(self) -> None:
        """Load every model. Raises what loading raises."""
        for name in self._places:
            await self._loaded(name)

    async def _loaded(self, name: str) -> Served:
        place = self._places[name]
        async with place.lock:
            if place.served is None:
                # Whoever asked first may leave; the others still want it.
                loading = asyncio.ensure_future(self._worker.call(lambda: self._load(place)))
                place.served = await asyncio.shield(loading)
        return place.served

    def _load(self, place: _Place) -> Served:
        started = time.perf_counter()
        if find(place.source).kind is SourceKind.APPLICATION:
            # Imported here: what an application is made of takes a second to load, and most servers have none.
            from craton.compare.application import open_application

            application = open_application(place.source, dtype=self._dtype, threads=self._threads)
            served = Served(place.id, application.model, application)
        else:
            served = Served(place.id, load(place.source, dtype=self._dtype, threads=self._threads))
        self._on_load(place.id, time.perf_counter() - started)
        return served


def public_name(source: str) -> str:
    """What clients call a model: its stored name, or the last part of its path. Raises where there is no such model."""
    found = find(source)
    if found.version:
        return source
    path = Path(source)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return source.removeprefix("hf:")
