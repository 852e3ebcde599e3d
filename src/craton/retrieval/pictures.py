"""An index of a folder's pictures: made once, brought up to date at each use, searched by text or by picture.

One safetensors file for each folder and model, in the home folder: a vector of length 1 for each picture, and in the
metadata each one's path, size and time of change. It is replaced as a whole, so a crash leaves the old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.errors import FileFormatError, StoreError, UsageError
from craton.inference.images import ImageModel
from craton.modalities.image import list_images
from craton.store.folders import home, make_folder

VERSION: Final = "1"
TOGETHER: Final = 64  # pictures between two reports of progress
KEPT_EVERY: Final = 1024  # pictures: what was read so far is kept on disk

Vectors = NDArray[np.float32]


class PictureHit(NamedTuple):
    """A picture that was found. score: the cosine."""

    path: Path
    score: float


@dataclass
class PictureSync:
    """What bringing an index up to date came to. unreadable: files that are no pictures, with the reason."""

    added: int = 0
    removed: int = 0
    unchanged: int = 0
    unreadable: tuple[tuple[Path, str], ...] = ()


class PictureIndex:
    """The pictures of one folder as one model sees them. Make one with `open_pictures`."""

    def __init__(self, folder: Path, model: ImageModel, file: Path) -> None:
        self.folder, self.model, self.file = folder, model, file
        self.paths, self.vectors, self._stamps = _load(file, model.width)

    def sync(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> PictureSync:
        """Read what is new or has changed, forget what is gone, and keep the result on disk.

        A file that is no picture is left out and reported. on_progress: (pictures read, pictures to read).
        """
        found = list_images(self.folder)
        stamps = {}
        for path in found:
            with contextlib.suppress(FileNotFoundError):  # it went away just now
                stamps[str(path.relative_to(self.folder))] = _stamp(path)
        known = {name: row for row, name in enumerate(self.paths) if self._stamps[row] == stamps.get(name)}
        missing = [name for name in stamps if name not in known]
        report = PictureSync(0, len(self.paths) - len(known), len(known))
        self._keep(stamps, known, {})
        for start in range(0, len(missing), KEPT_EVERY):
            part = missing[start : start + KEPT_EVERY]
            vectors, unreadable = self._embed(
                part,
                lambda done, first=start: on_progress(first + done, len(missing)),  # type: ignore[misc]
            )
            report.added += len(vectors)
            report.unreadable += tuple(unreadable)
            self._keep(stamps, {name: row for row, name in enumerate(self.paths)}, vectors)
            self._save()
        if report.removed and not missing:
            self._save()
        return report

    def _keep(self, stamps: dict[str, tuple[int, int]], known: dict[str, int], vectors: dict[str, Vectors]) -> None:
        kept = [name for name in stamps if name in known or name in vectors]
        rows = [self.vectors[known[name]] if name in known else vectors[name] for name in kept]
        self.vectors = np.stack(rows) if rows else np.zeros((0, self.model.width), np.float32)
        self.paths, self._stamps = kept, [stamps[name] for name in kept]

    def search(self, vector_D: Vectors, k: int = 5) -> list[PictureHit]:
        """The k pictures nearest to the vector of a text or of a picture, best first, equals by path."""
        scores = self.vectors @ vector_D
        order = np.argsort(-scores, kind="stable")[:k]
        return [PictureHit(self.folder / self.paths[i], float(scores[i])) for i in order]

    def _embed(
        self, names: Sequence[str], on_progress: Callable[[int], None]
    ) -> tuple[dict[str, Vectors], list[tuple[Path, str]]]:
        vectors: dict[str, Vectors] = {}
        unreadable: list[tuple[Path, str]] = []
        for start in range(0, len(names), TOGETHER):
            some = names[start : start + TOGETHER]
            try:
                rows = self.model.embed_images([self.folder / name for name in some]).numpy()
                vectors |= dict(zip(some, rows, strict=True))
            except (FileFormatError, UsageError):
                # One of them is no picture: they are read one by one to find it.
                for name in some:
                    try:
                        vectors[name] = self.model.embed_images([self.folder / name]).numpy()[0]
                    except (FileFormatError, UsageError) as error:
                        unreadable.append((self.folder / name, error.what))
            on_progress(min(start + TOGETHER, len(names)))
        return vectors, unreadable

    def _save(self) -> None:
        make_folder(self.file.parent)
        rows = [[name, *stamp] for name, stamp in zip(self.paths, self._stamps, strict=True)]
        facts = {"version": VERSION, "folder": str(self.folder), "model": self.model.name, "pictures": json.dumps(rows)}
        write_safetensors(self.file, {"vectors": torch.from_numpy(self.vectors)}, metadata=facts)


def open_pictures(folder: str | Path, model: ImageModel) -> PictureIndex:
    """The index of `folder` under `model`, empty if it is not made yet. Raises UsageError for what is no folder."""
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UsageError("there is no such folder", where=str(folder), remedy="name a folder of pictures")
    # The model's weights are part of the name, since vectors of two versions are not to be compared.
    facts = (str(path), model.identity, model.preprocessing.model_dump_json())
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:24]
    return PictureIndex(path, model, home() / "pictures" / f"{digest}.safetensors")


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _load(file: Path, width: int) -> tuple[list[str], Vectors, list[tuple[int, int]]]:
    nothing: tuple[list[str], Vectors, list[tuple[int, int]]] = ([], np.zeros((0, width), np.float32), [])
    if not file.exists():
        return nothing
    opened = SafetensorsFile.open(file)
    if opened.metadata.get("version") != VERSION:
        return nothing
    rows = json.loads(opened.metadata["pictures"])
    vectors = opened.tensor("vectors").numpy().copy()
    if vectors.shape != (len(rows), width):
        raise StoreError("the index of pictures is damaged", where=str(file), remedy="remove it: it is made anew")
    return [row[0] for row in rows], vectors, [(row[1], row[2]) for row in rows]
