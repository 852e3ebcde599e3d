"""What is in the store: find, list and verify models. Files are the truth; torch is not needed to read them.

`<home>/models/<name>/v<N>/manifest.json` describes one immutable version. The model's files lie beside it if the store
fetched them; a model of the hub's cache or of a user's folder is read where it lies. `publishing` is what writes here.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from craton.checkpoints.disk import disk_errors, sha256_of
from craton.checkpoints.sources import Progress, SourceKind, hub_snapshot, licence_of, model_files, parse_reference
from craton.errors import CheckpointError, StoreError, UnknownName, UsageError
from craton.store.folders import home
from craton.store.manifest import MANIFEST_NAME, FileEntry, Parent, read_manifest

NAME: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,94}[a-z0-9])?")
ID: Final = re.compile(rf"({NAME.pattern})(?:@v([1-9][0-9]{{0,8}}))?")  # "name" or "name@v3"
FOLDER_KINDS: Final = (SourceKind.HUB, SourceKind.FOLDER)
MADE_KINDS: Final = (SourceKind.RUN, SourceKind.ADAPTER, SourceKind.PROMPT, SourceKind.APPLICATION)


@dataclass(frozen=True)
class StoredModel:
    """A model that can be opened: `path` is its folder or file.

    `folder` is its place in the store; a model used in place without being stored has none, and version 0.
    `is_new` is true only of the answer of the pull that stored it.
    """

    name: str
    version: int
    kind: SourceKind
    source: str
    path: Path
    files: tuple[FileEntry, ...] = ()
    created: str | None = None
    licence: str | None = None
    parents: tuple[Parent, ...] = ()
    folder: Path | None = None
    is_new: bool = False

    @property
    def id(self) -> str:
        """`name@v3`, or the bare name of a model that is not stored."""
        return f"{self.name}@v{self.version}" if self.version else self.name

    @property
    def size(self) -> int:
        """The bytes of its recorded files."""
        return sum(file.size for file in self.files)

    @property
    def base(self) -> str | None:
        """The model that this is an adapter of, or None."""
        return next((parent.name for parent in self.parents if parent.relation == "adapter_of"), None)

    @property
    def in_place(self) -> bool:
        """Whether the files lie outside the store, which then never deletes them."""
        return self.folder is None or not self.path.is_relative_to(self.folder)

    @property
    def root(self) -> Path:
        """The folder that the paths of `files` are relative to."""
        if self.folder is not None and not self.in_place:
            return self.folder
        return self.path if self.kind in FOLDER_KINDS else self.path.parent


@dataclass(frozen=True)
class Problem:
    """One file that is not as the manifest says."""

    what: Literal["changed", "missing", "extra"]
    path: str

    def __str__(self) -> str:
        return f"{self.what}: {self.path}"


def list_models() -> list[StoredModel]:
    """Every readable stored version, by name and version. What cannot be read is in `damaged_models`."""
    return [model for model in _scan() if isinstance(model, StoredModel)]


def damaged_models() -> list[StoreError]:
    """One error for each stored version whose manifest cannot be read; `remove` still removes such a version."""
    return [model for model in _scan() if isinstance(model, StoreError)]


def find(name_or_path: str) -> StoredModel:
    """The model that a user means: a stored name, `name@vN`, a built-in name, `hf:...`, or a path used in place.

    Never fetches anything.

    Raises:
        UnknownName: a name or version that is neither stored nor built in.
        UsageError: a built-in model that was not pulled yet, or a path with nothing there.
        StoreError: a stored model whose files are gone or damaged.
        DownloadError: a hub model that is not in the hub's cache.
    """
    stored = stored_model(name_or_path)
    if stored is not None:
        return _usable(stored)
    models = list_models()
    reference = parse_reference(name_or_path, known={model.name for model in models})
    if reference.path is not None:
        return StoredModel(reference.path.stem, 0, reference.kind, reference.text, reference.path)
    for model in reversed(models):  # pulled under another name
        if model.source == reference.text:
            return _usable(model)
    if reference.repo is None:
        raise UsageError(f"{name_or_path} has not been fetched yet", remedy=f"craton pull {name_or_path}")
    folder = hub_snapshot(reference.repo, reference.revision, cached_only=True)
    name = reference.repo.partition("/")[2]
    return StoredModel(name, 0, reference.kind, reference.text, folder, licence=licence_of(folder))


def verify(name: str, progress: Progress | None = None) -> list[Problem]:
    """Hash every file of a stored model again and say what differs from its manifest: nothing, if all is well.

    Raises:
        UnknownName: no stored model has this name.
        StoreError: the manifest or a file cannot be read.
    """
    stored = stored_model(name)
    if stored is None:
        raise UnknownName("stored model", name, [model.id for model in list_models()])
    return problems_of(stored, progress or silent, trust_times=False)


# --- for this room ------------------------------------------------------------------------------------------------


def stored_model(text: str) -> StoredModel | None:
    """The stored model `name` (its newest version) or `name@vN`; None if nothing of that name is stored."""
    match = ID.fullmatch(text)
    versions = dict(versions_of(match[1])) if match else {}
    if not match or not versions:
        return None
    if match[2] is None:
        return load_version(versions[max(versions)])
    if int(match[2]) not in versions:
        raise UnknownName("version", text, [f"{match[1]}@v{version}" for version in versions])
    return load_version(versions[int(match[2])])


def versions_of(name: str) -> list[tuple[int, Path]]:
    """The versions of a name and their folders, oldest first."""
    folder = home() / "models" / name
    with disk_errors("read the store", folder):
        paths = list(folder.iterdir()) if folder.is_dir() else []
    found = [(re.fullmatch(r"v([1-9][0-9]{0,8})", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def load_version(folder: Path) -> StoredModel:
    """The model in the version folder `folder`. Raises StoreError for a manifest that cannot be read or lies."""
    manifest = read_manifest(folder)
    if (manifest.name, f"v{manifest.version}") != (folder.parent.name, folder.name):
        raise StoreError(
            f"the manifest is of {manifest.name}@v{manifest.version}, not of the folder it lies in",
            where=str(folder),
            remedy="move the folder back to where it was, or remove it",
        )
    return StoredModel(
        name=manifest.name,
        version=manifest.version,
        kind=manifest.kind,
        source=manifest.source,
        path=folder / manifest.location,  # an absolute location stands for itself
        files=manifest.files,
        created=manifest.created,
        licence=manifest.licence,
        parents=manifest.parents,
        folder=folder,
    )


def problems_of(model: StoredModel, report: Progress, *, trust_times: bool) -> list[Problem]:
    """What differs from the manifest. trust_times: a file of the recorded size and modification time is not read."""
    count = counter(report, "checking", model.size)
    problems = []
    for file in model.files:
        path = model.root / file.path
        with disk_errors(f"check {file.path}", path):
            stat = path.stat() if path.is_file() else None
        if stat is None:
            problems.append(Problem("missing", file.path))
        elif trust_times and (stat.st_size, stat.st_mtime_ns) == (file.size, file.mtime_ns):
            continue
        elif stat.st_size != file.size or sha256_of(path, count) != file.sha256:
            problems.append(Problem("changed", file.path))
    extra = set(_present_files(model)) - {file.path for file in model.files}
    return problems + [Problem("extra", path) for path in sorted(extra)]


def files_below(root: Path) -> list[str]:
    """Every file below `root`, as sorted POSIX paths relative to it."""
    with disk_errors("read the model", root):
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir())


def counter(report: Progress, stage: str, total: int) -> Callable[[int], None]:
    """A function that adds up the sizes it is given and reports the sum as the progress of `stage`."""
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        report(stage, done, total)

    return count


def silent(stage: str, done: int, total: int) -> None:
    """The progress of a caller who does not want any."""


def _scan() -> Iterator[StoredModel | StoreError]:
    models = home() / "models"
    with disk_errors("read the store", models):
        names = sorted(path.name for path in models.iterdir()) if models.is_dir() else []
    for name in names:
        for _, folder in versions_of(name) if NAME.fullmatch(name) else ():
            try:
                yield load_version(folder)
            except StoreError as error:
                yield error


def _usable(model: StoredModel) -> StoredModel:
    if not os.path.exists(model.path):
        raise StoreError(
            f"{model.id} lay at {model.path}, which is gone",
            where=str(model.folder),
            remedy=f"craton pull {model.name}, or forget it: craton rm {model.id}",
        )
    if not model.in_place:
        for file in model.files:
            path = model.root / file.path
            if not os.path.isfile(path) or os.path.getsize(path) != file.size:
                raise StoreError(
                    f"{model.id} is damaged: {file.path} is missing or cut short",
                    where=str(path),
                    remedy=f"remove it with craton rm {model.id}; {model.source} made it and may tell how"
                    if model.kind in MADE_KINDS
                    else f"craton pull {model.name} fetches it again",
                )
    return model


def _present_files(model: StoredModel) -> list[str]:
    if not model.in_place:
        return [name for name in files_below(model.root) if name != MANIFEST_NAME]
    if model.kind in FOLDER_KINDS:
        with contextlib.suppress(CheckpointError):  # no weights any more: those are reported as missing
            return model_files(model.root)
    return []
