"""The classes of a classification: names and their numbers, the same in training, evaluation and serving."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from craton.checkpoints.disk import disk_errors, replace_file
from craton.data.json_values import parse_json
from craton.errors import FileFormatError, UnknownName


@dataclass(frozen=True)
class LabelMap:
    """names: of the classes; the place of each is its number."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, labels: Iterable[str]) -> LabelMap:
        """The classes among `labels`, in one order whatever theirs: as numbers if all are, else as text."""
        names = set(labels)
        try:
            return cls(tuple(sorted(names, key=lambda name: (int(name), name))))
        except ValueError:
            return cls(tuple(sorted(names)))

    def index(self, name: str, where: str | None = None) -> int:
        """The number of a class. Raises UnknownName, with `where` it stands, for one that training did not see."""
        if name not in self._indices:
            raise UnknownName("label", name, self.names, where=where)
        return self._indices[name]

    def save(self, path: Path) -> None:
        """Write the map as JSON. Raises StoreError."""
        replace_file(path, (json.dumps({"labels": self.names}, ensure_ascii=False, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> LabelMap:
        """Read what `save` wrote. Raises StoreError if it cannot be read, FileFormatError if it is something else."""
        with disk_errors(f"read {path.name}", path):
            content = path.read_bytes()
        value = parse_json(content.decode(errors="replace"), str(path))
        names = value.get("labels") if isinstance(value, dict) else None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
            raise FileFormatError('not a label map: {"labels": [names, each once]} was expected', where=str(path))
        return cls(tuple(names))

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}
