"""An index: a collection of documents in the home folder, and the encoder that its vectors come from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from craton.checkpoints.disk import disk_errors
from craton.errors import UnknownName, UsageError
from craton.inference.model import Model, load
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.filters import Filter
from craton.retrieval.readers import Reading, find_sources
from craton.retrieval.search import Hit, Rerank
from craton.retrieval.sync import SyncReport
from craton.store.folders import home, make_folder

SUFFIX: Final = ".sqlite"
NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?")


class Encoder:
    """Texts to vectors of length 1, by a model that is loaded at the first text. Usable as an `Embed`."""

    def __init__(self, name: str, threads: int | None = None) -> None:
        self.name, self._threads = name, threads
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The loaded encoder."""
        if self._model is None:
            self._model = load(self.name, threads=self._threads)
        return self._model

    def __call__(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """[B, D], fp32. A text that is longer than the encoder reads is read as far as it does."""
        limit = (self.model.checkpoint.pooling.max_tokens if self.model.checkpoint.pooling else None) or 512
        vectors = self.model.embed([self._cut(text, min(limit, self.model.context)) for text in texts]).numpy()
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors / np.maximum(lengths, 1e-12)).astype(np.float32)

    def count(self, text: str) -> int:
        """The tokens of a text, without those that the encoder puts around it."""
        return len(self.model.tokenizer.encode(text, add_special_tokens=False))

    def _cut(self, text: str, limit: int) -> str:
        tokenizer = self.model.tokenizer
        kept = room = limit - len(tokenizer.encode(""))  # tokens around every text
        spans = tokenizer.encode_with_offsets(text or " ")[1]
        while len(spans) > room:
            # Half of a word may be more tokens than that half was of the whole, so what is left is counted again.
            text = text[: max(end for _, end in spans[:kept])]
            spans = tokenizer.encode_with_offsets(text)[1]
            kept -= 1
        return text if text.strip() else "."


class Index:
    """An open index. Make one with `create_index` or `open_index`; close it, or use it in a `with`."""

    def __init__(self, collection: Collection, encoder: Encoder, name: str) -> None:
        self.collection, self.encoder, self.name = collection, encoder, name

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *error: Any) -> None:
        self.collection.close()

    def sync(
        self,
        sources: Sequence[str | Path],
        *,
        prune: bool,
        on_progress: Callable[[str], None] = lambda doing: None,
    ) -> tuple[SyncReport, Reading]:
        """Bring the index up to date with `sources`: only what changed is read and embedded. prune: what is in the
        index and not in `sources` goes away."""
        reading = Reading()
        files = list(find_sources(list(sources), reading=reading))
        report = self.collection.sync(files, self.encoder, self.encoder.count, prune=prune, on_progress=on_progress)
        return report, reading

    def search(
        self,
        question: str,
        k: int = 5,
        *,
        where: Filter | None = None,
        mmr: float | None = None,
        rerank: Rerank | None = None,
    ) -> list[Hit]:
        """The passages that fit a question best, by the collection's own fusion, and then by `rerank`."""
        vector = self.encoder([question])[0]
        return self.collection.search(question, vector, k=k, where=where, mmr=mmr, rerank=rerank)


def index_path(name: str) -> Path:
    """Where the index of this name lies. Raises UsageError for what cannot be a name."""
    if not NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be an index's name", remedy="use a-z, 0-9, '.', '_' and '-'")
    return home() / "indexes" / f"{name}{SUFFIX}"


def list_indexes() -> list[str]:
    """The names of all indexes."""
    folder = home() / "indexes"
    with disk_errors("read the indexes", folder):
        return sorted(path.stem for path in folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []


def create_index(name: str, settings: CollectionSettings, threads: int | None = None) -> Index:
    """A new index, or the one of this name. Raises UsageError if that one has other settings."""
    path = index_path(name)
    if path.exists():
        return open_index(name, threads)
    make_folder(path.parent)
    return Index(Collection.create(path, settings), Encoder(settings.encoder, threads), name)


def open_index(name: str, threads: int | None = None) -> Index:
    """The index of this name, or in this file. Raises UnknownName if there is none."""
    path = Path(name).expanduser() if name.endswith(SUFFIX) else index_path(name)
    if not path.exists():
        unknown = UnknownName("index", name, list_indexes())
        unknown.remedy = unknown.remedy or f"make it: craton index add DOCS --index {name}"
        raise unknown
    collection = Collection.open(path)
    return Index(collection, Encoder(collection.settings.encoder, threads), path.stem)


def remove_index(name: str) -> None:
    """Remove an index; the documents that it was made from are not touched. Raises UnknownName if there is none."""
    path = index_path(name)
    if not path.exists():
        raise UnknownName("index", name, list_indexes())
    beside = [path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm")]
    for file in (path, *beside, path.with_name(f".{path.name}.lock")):
        with disk_errors(f"remove {file.name}", file):
            file.unlink(missing_ok=True)
