"""What was made here, as an immutable version in the store: models, PEFT adapters, prompts and applications, with
their lineage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

from craton.checkpoints.disk import disk_errors
from craton.checkpoints.sources import BUILT_IN, Progress, SourceKind, model_files
from craton.errors import UsageError
from craton.store.folders import home, make_folder
from craton.store.locks import held
from craton.store.manifest import MANIFEST_NAME, Manifest, Parent
from craton.store.models import MADE_KINDS, StoredModel, files_below, load_version, silent, versions_of
from craton.store.publishing import building, check_form, hashed, newest, next_version, now, publish

RUN_PREFIX: Final = "run:"
FILE_PREFIX: Final = "file:"
RELATIONS: Final = (
    "base",  # training went on from this model
    "adapter_of",  # useless without this model
    "merged_from",
    "quantised_from",
    "pruned_from",
    "distilled_from",
    "converted_from",  # another form of attention, of positions or of feed-forwards
    "trained_on",  # a data set
    "evaluated_on",  # a data set
    "uses_prompt",
    "uses_adapter",
)
# What is published with a kind of its own and holds no weights: its file by which it is known. An application has a
# prompt, too, so it comes first.
MARKS: Final = {SourceKind.APPLICATION: "application.json", SourceKind.PROMPT: "prompt.toml"}
ADAPTER_CONFIG: Final = "adapter_config.json"  # what PEFT calls it


def check_model_name(name: str) -> None:
    """Refuse a name that a run could not publish under, before it has cost anything.

    Raises:
        UsageError: it is no name, or it belongs to a built-in or a pulled model.
    """
    check_form(name, "the model needs a name")
    owner = newest(name)
    if name in BUILT_IN or (owner is not None and owner.kind not in MADE_KINDS):
        source = f"a model from {owner.source}" if owner is not None else "a built-in model"
        raise UsageError(f"the name {name!r} belongs to {source}", remedy="choose another with --name")


def publish_model(
    name: str,
    build: Callable[[Path], None],
    *,
    source: str,
    parents: tuple[Parent, ...],
    licence: str | None,
    progress: Progress | None = None,
) -> StoredModel:
    """Store what `build` writes into the folder it is given as the next version of `name`.

    build: writes a model in Hugging Face's layout or as one .gguf file, an adapter in PEFT's, with its card, or the
    file of `MARKS` that makes a prompt or an application. source: "run:<ulid>" or "file:<name>". parents: relations
    from `RELATIONS`; an adapter needs an "adapter_of". Until `build` has returned and everything is on the disk,
    nothing of it can be seen in the store.

    Raises:
        UsageError: the name is wrong or taken.
        CheckpointError: `build` wrote no weights.
        StoreError: no space or no permission.
    """
    check_model_name(name)
    report = progress or silent
    unknown = [parent.relation for parent in parents if parent.relation not in RELATIONS]
    if unknown or not source.startswith((RUN_PREFIX, FILE_PREFIX)):
        raise ValueError(f"no lineage that the store knows: {', '.join([source, *unknown])}")
    locks = make_folder(home() / "locks")
    with building() as folder:
        build(folder)
        kind = next((kind for kind, mark in MARKS.items() if (folder / mark).exists()), None)
        if kind is None:
            model_files(folder)  # raises where there are no weights
            kind = SourceKind.ADAPTER if (folder / ADAPTER_CONFIG).exists() else SourceKind.RUN
        if kind is SourceKind.ADAPTER and not any(parent.relation == "adapter_of" for parent in parents):
            raise ValueError("an adapter needs an 'adapter_of' parent")
        names = files_below(folder)
        ggufs = [name for name in names if name.endswith(".gguf")]
        _sync(folder, names)
        files = hashed(folder, names, report)
        with held(locks / f"{name}.lock", lambda: report("waiting for another writer of this model", 0, 0)):
            check_model_name(name)  # somebody may have pulled a model under it meanwhile
            while True:  # once, where there are locks
                manifest = Manifest(
                    name=name,
                    version=next_version(name),
                    kind=kind,
                    source=source,
                    created=now(),
                    location=ggufs[0] if len(ggufs) == 1 else ".",
                    files=files,
                    licence=licence,
                    parents=parents,
                )
                if publish(folder, manifest):
                    return replace(load_version(versions_of(name)[-1][1]), is_new=True)
                (folder / MANIFEST_NAME).unlink()


def _sync(folder: Path, names: list[str]) -> None:
    for name in names:
        with disk_errors(f"write {name}", folder / name), (folder / name).open("rb") as file:
            os.fsync(file.fileno())
