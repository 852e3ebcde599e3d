"""The models of one server: names that clients ask by, loaded at the start or on first use, always in the worker."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from craton.checkpoints.sources import SourceKind
from craton.errors import CratonError, UsageError, did_you_mean
from craton.finetuning.loading import load, load_images
from craton.inference.engine import Engine
from craton.inference.images import ImageModel, sees
from craton.inference.model import Model
from craton.inference.plan import DTypeChoice
from craton.inference.settings import KV
from craton.models import CausalLM
from craton.serving import logs
from craton.serving.errors import ApiError
from craton.serving.memory import held_bytes, shown, stored_bytes
from craton.serving.worker import EngineWorker
from craton.store import find, list_models

if TYPE_CHECKING:
    from craton.compare.application import Application

# Seconds after which a client may ask again for a model that had no room beside those in use.
BUSY_RETRY = 10

MIN_CACHE_BYTES = 1 << 20  # as `EngineSettings` wants it


@dataclass
class Served:
    """A model under its public name, loaded. application: where the name is that of a whole adaptation."""

    id: str
    loaded: Model | ImageModel
    application: Application | None = None

    @property
    def model(self) -> Model:
        """What reads or hears. Raises ApiError for a model that sees, which makes vectors and no answers."""
        if isinstance(self.loaded, ImageModel):
            raise ApiError(400, f"{self.id} makes vectors of what it sees: ask /v1/embeddings", param="model")
        return self.loaded

    @property
    def writes(self) -> bool:
        """Whether it is a language model and not an encoder."""
        return isinstance(self.model.module, CausalLM)

    def engine(self) -> Engine:
        """Its engine; call it in the worker's thread."""
        return self.model.engine

    def check_writes(self) -> None:
        """Raises ApiError for an encoder."""
        if self.model.hears:
            raise ApiError(400, f"{self.id} hears: ask /v1/audio/transcriptions", param="model")
        if not self.writes:
            raise ApiError(400, f"{self.id} is an encoder: it reads text and writes none", param="model")


@dataclass
class Place:
    """A name and the model behind it. served: while it is loaded. users: requests that it must stay loaded for.
    last_used: when the last of them ended. nbytes: the memory that it took when it was last loaded."""

    id: str
    source: str
    created: int = field(default_factory=lambda: int(time.time()))
    served: Served | None = None
    loading: asyncio.Task[None] | None = None
    users: int = 0
    last_used: float = 0.0
    nbytes: int = 0


class Shelf:
    """What a server has. Only names that it was started with, or was told to load, lead anywhere."""

    def __init__(
        self,
        names: Sequence[str],
        worker: EngineWorker,
        *,
        dtype: DTypeChoice = "auto",
        threads: int | None = None,
        memory: int | None = None,
        slots: int = 8,
        kv: KV = "auto",
        on_load: Callable[[str, float], None] = lambda name, seconds: None,
        on_unload: Callable[[str], None] = lambda name: None,
    ) -> None:
        """memory: bytes that loaded models may take together; the one that was used longest ago makes room, and keys
        and values of each get at most a quarter of it. slots: answers that an engine writes at once. kv: see
        `EngineSettings`."""
        self._worker, self._dtype, self._threads, self._memory = worker, dtype, threads, memory
        self._on_load, self._on_unload = on_load, on_unload
        self._engine: dict[str, Any] = {
            "slots": slots,
            "kv": kv,
            "cache_bytes": None if memory is None else max(MIN_CACHE_BYTES, memory // 4),
        }
        self._places: dict[str, Place] = {}
        self._leaving: list[Place] = []
        self._changing = asyncio.Lock()  # one model is loaded at a time: it must know what the others take
        self._given_back = asyncio.Event()
        for name in names:
            place = Place(public_name(name), name)
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
            hint = f"did you mean {near}?" if near else f"it has {', '.join(self._places) or 'none'}"
            raise ApiError(
                404, f"this server has no model {name[:100]!r}: {hint}", param="model", code="model_not_found"
            )

    async def borrow(self, name: str) -> Place:
        """The model, loaded if it is not yet, and kept so until `give_back`.

        Raises ApiError 404 for a name that this server does not have, 503 for a model that cannot be loaded or has no
        room.
        """
        self.check_known(name)
        place = self._places[name]
        place.users += 1
        try:
            await self._loaded(place)
        except CratonError as error:
            self.give_back(place)
            logs.fault("a model cannot be loaded", error, model=name)
            raise ApiError(503, f"{name} cannot be loaded: {error.what}", param="model", code=error.code) from None
        except BaseException:
            self.give_back(place)
            raise
        return place

    def give_back(self, place: Place) -> None:
        """A user of the model less."""
        place.users -= 1
        place.last_used = time.monotonic()
        self._given_back.set()

    async def load_all(self) -> None:
        """Load every model; those that have no room beside the others wait for their first use. Raises what loading
        raises, UsageError for a model that has no room alone."""
        for place in list(self._places.values()):
            if self._memory is not None:
                needed = await asyncio.to_thread(stored_bytes, place.source)
                if sum(nbytes for _, nbytes in await self._held()) + needed > self._memory >= needed:
                    continue
            try:
                await self._loaded(place)
            except ApiError as error:
                raise UsageError(error.message, where="--memory") from None

    async def add(self, name: str) -> None:
        """Load a model of the store, by its name alone. Raises ApiError: 404 for a name that the store does not have,
        409 for a model that is loaded already or is just being unloaded, and what `borrow` raises."""
        if any(place.id == name for place in self._leaving):
            raise ApiError(409, f"{name} is just being unloaded", param="model", code="model_unloading")
        if name not in self._places:
            await asyncio.to_thread(_check_stored, name)
        place = self._places.setdefault(name, Place(name, name))
        if place.served is not None:
            raise ApiError(409, f"{name} is loaded already", param="model", code="model_loaded")
        known_before = place.users > 0 or place.loading is not None or place.nbytes > 0
        try:
            self.give_back(await self.borrow(name))
        except BaseException:
            if not known_before and place.served is None and self._places.get(name) is place:
                del self._places[name]
            raise

    async def remove(self, name: str) -> None:
        """Take a model out of the server: new requests for it are refused at once, those that run are answered, and
        then it is unloaded. Raises ApiError 404 for a name that this server does not have."""
        self.check_known(name)
        place = self._places.pop(name)
        self._leaving.append(place)
        # Whoever asked may leave; it happens all the same.
        await asyncio.shield(asyncio.create_task(self._leave(place)))

    async def _leave(self, place: Place) -> None:
        while place.users:
            self._given_back.clear()
            await self._given_back.wait()
        await self._unload(place)
        self._leaving.remove(place)

    async def _loaded(self, place: Place) -> None:
        if place.served is not None:
            return
        if place.loading is None:
            place.loading = asyncio.create_task(self._load_into(place))
            place.loading.add_done_callback(_looked_at)
        await asyncio.shield(place.loading)  # whoever asked first may leave; the others still want it

    async def _load_into(self, place: Place) -> None:
        try:
            async with self._changing:
                if self._memory is not None:
                    # Before it was loaded once, its files say about what it takes.
                    await self._make_room(place, place.nbytes or await asyncio.to_thread(stored_bytes, place.source))
                served, place.nbytes = await self._worker.call(lambda: self._load(place))
                await self._make_room(place, place.nbytes)
                place.served, place.last_used = served, time.monotonic()
        finally:
            place.loading = None

    async def _make_room(self, wanted: Place, needed: int) -> None:
        if self._memory is None:
            return
        said = f"{wanted.id} takes {shown(needed)} of memory"
        if needed > self._memory:
            raise ApiError(
                503,
                f"{said}, and all models together may take {shown(self._memory)} (--memory)",
                param="model",
                code="model_too_large",
            )
        held = await self._held()
        busy = sum(nbytes for place, nbytes in held if place.users)
        if busy + needed <= self._memory:
            left = sum(nbytes for _, nbytes in held) + needed
            for place, nbytes in sorted(held, key=lambda one: one[0].last_used):
                if left <= self._memory:
                    return
                if not place.users:
                    await self._unload(place)
                    left -= nbytes
            if left <= self._memory:
                return
        raise ApiError(
            503,
            f"{said}; of {shown(self._memory)}, models that are just being used take {shown(busy)}",
            param="model",
            code="memory_full",
            retry_after=BUSY_RETRY,
        )

    async def _held(self) -> list[tuple[Place, int]]:
        """The loaded models and the bytes that each takes now."""
        loaded = [
            (place, place.served.loaded)
            for place in (*self._places.values(), *self._leaving)
            if place.served is not None
        ]
        sizes = await self._worker.call(lambda: [held_bytes(model) for _, model in loaded])
        return [(place, nbytes) for (place, _), nbytes in zip(loaded, sizes, strict=True)]

    async def _unload(self, place: Place) -> None:
        if place.served is not None:
            place.served = None
            await self._worker.call(gc.collect)  # a model and its engine hold each other
            self._on_unload(place.id)

    def _load(self, place: Place) -> tuple[Served, int]:
        started = time.perf_counter()
        kind = find(place.source).kind
        if kind is SourceKind.APPLICATION:
            # Imported here: what an application is made of takes a second to load, and most servers have none.
            from craton.compare.application import open_application

            application = open_application(place.source, dtype=self._dtype, threads=self._threads, **self._engine)
            served = Served(place.id, application.model, application)
        elif kind is not SourceKind.PROMPT and sees(place.source):
            served = Served(place.id, load_images(place.source, dtype=self._dtype, threads=self._threads))
        else:
            served = Served(place.id, load(place.source, dtype=self._dtype, threads=self._threads, **self._engine))
        self._on_load(place.id, time.perf_counter() - started)
        return served, held_bytes(served.loaded)


def _looked_at(loading: asyncio.Task[None]) -> None:
    # Where all who waited have left, nobody else asks how it ended.
    if not loading.cancelled():
        loading.exception()


def _check_stored(name: str) -> None:
    # The store's list is compared with, and nothing is opened: a path leads nowhere.
    stored = {known for model in list_models() for known in (model.name, model.id)}
    if name not in stored:
        near = did_you_mean(name, stored)
        hint = f": did you mean {near}?" if near else ""
        raise ApiError(404, f"the store has no model {name[:100]!r}{hint}", param="model", code="model_not_found")


def public_name(source: str) -> str:
    """What clients call a model: its stored name, or the last part of its path. Raises where there is no such model."""
    found = find(source)
    if found.version:
        return source
    path = Path(source)
    if path.exists():
        return path.resolve().stem if path.is_file() else path.resolve().name
    return source.removeprefix("hf:")
