"""What the store knows of a model: `manifest.json`, one beside each stored version, readable and writable by hand."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from craton.checkpoints.disk import disk_errors, write_synced
from craton.checkpoints.sources import SourceKind
from craton.errors import StoreError

MANIFEST_NAME: Final = "manifest.json"
SCHEMA: Final = 1


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts or "\\" in path or not path:
        raise ValueError("a path inside the model's folder is needed")
    return path


class Strict(BaseModel):
    """What the store writes as JSON: nothing unknown, nothing converted."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, populate_by_name=True)


class FileEntry(Strict):
    """One file of a model: path relative to the model's folder, size in bytes. `mtime_ns` only saves a second hash."""

    path: Annotated[str, AfterValidator(_inside)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]
    mtime_ns: int


class Parent(Strict):
    """An edge of the lineage: "base", "adapter_of", "quantised_from" ... and the name of the other model."""

    relation: str
    name: str


D = TypeVar("D", bound=Strict)


class Manifest(Strict):
    """One immutable version of one model.

    `location` is what a loader opens: relative to the manifest's folder where the store holds the files, absolute where
    they lie elsewhere (the hub's cache, the user's own folder) and are read in place.
    """

    schema_version: Annotated[int, Field(alias="schema")] = SCHEMA
    name: str
    version: Annotated[int, Field(ge=1)]
    kind: Annotated[SourceKind, Field(strict=False)]
    source: str
    created: str
    location: str
    files: tuple[FileEntry, ...]
    licence: str | None = None
    parents: tuple[Parent, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether the files lie outside the store, which then never touches them."""
        return Path(self.location).is_absolute()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a new manifest into `folder`. Raises StoreError."""
    path = folder / MANIFEST_NAME
    text = json.dumps(manifest.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False) + "\n"
    with disk_errors(f"write {path.name}", path):
        write_synced(path, [text.encode()])


def read_manifest(folder: Path) -> Manifest:
    """The manifest in `folder`.

    Raises:
        StoreError: it is missing, unreadable, damaged, or of a newer Craton.
    """
    path = folder / MANIFEST_NAME
    remedy = "remove the model and pull it again"
    manifest = read_document(path, Manifest, SCHEMA, remedy)
    try:
        return manifest if manifest.in_place else manifest.model_copy(update={"location": _inside(manifest.location)})
    except ValueError as error:
        raise _damaged(path, str(error), remedy) from error


def read_document(path: Path, cls: type[D], schema: int, remedy: str) -> D:
    """The `cls` in a JSON file whose "schema" is at most `schema`; `remedy` is for one that is damaged.

    Raises:
        StoreError: it is missing, unreadable, damaged, or of a newer Craton.
    """
    with disk_errors(f"read {path.name}", path):
        raw = path.read_bytes()
    try:
        table = json.loads(raw)
        if isinstance(table, dict) and isinstance(table.get("schema"), int) and table["schema"] > schema:
            raise StoreError(
                f"{path.name} was written by a newer Craton (schema {table['schema']}, this one knows {schema})",
                where=str(path),
                remedy="update Craton",
            )
        return cls.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{at}: {first['msg']}", remedy) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error), remedy) from error


def _damaged(path: Path, why: str, remedy: str) -> StoreError:
    return StoreError(f"the {path.stem} is damaged: {why}", where=str(path), remedy=remedy)
