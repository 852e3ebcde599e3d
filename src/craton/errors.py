"""The one exception tree: every refusal says what was wrong, where, and what to do.

The command line prints `what`, `where` and `remedy` and ends with `exit_status`; `--json` output and, later, HTTP
answers carry `code`, which is stable. Anything that is not a `CratonError` is a fault of ours (exit status 3).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class CratonError(Exception):
    """Base of every error that Craton raises on purpose.

    what: one sentence, what was wrong. where: the file, key, tensor or flag. remedy: what the reader can do about it.
    """

    code: ClassVar[str] = "error"
    exit_status: ClassVar[int] = 2

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, str | None]:
        """The JSON form: {"code", "what", "where", "remedy"}."""
        return {"code": self.code, "what": self.what, "where": self.where, "remedy": self.remedy}


class UsageError(CratonError):
    """A wrong flag, argument, setting value or call."""

    code = "usage"


class UnknownName(UsageError):
    """A name (model, flag, key, architecture) that Craton does not know; the remedy suggests the nearest ones."""

    code = "unknown_name"

    def __init__(self, kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> None:
        known = sorted(known)
        near = did_you_mean(name, known)
        remedy = f"did you mean {near}?" if near else (f"known: {', '.join(known)}" if known else None)
        super().__init__(f"unknown {kind} {name!r}", where=where, remedy=remedy)


class ContextOverflow(UsageError):
    """The prompt and the tokens asked for do not fit the model's context. Nothing is ever cut silently."""

    code = "context_overflow"


class DeadlineExceeded(CratonError):
    """A request whose answer was not complete by the time that it named."""

    code = "deadline"


class FileFormatError(CratonError):
    """A file that is not what its format says: truncated, corrupted, lying about its sizes, or refused (pickle)."""

    code = "bad_file"


class CheckpointError(CratonError):
    """Readable files that do not make a model: no architecture, wrong shapes, missing or surplus tensors, NaN."""

    code = "bad_checkpoint"


class TemplateError(CratonError):
    """A chat template that is malformed, leaves the sandbox or exceeds its limits, or messages that it refuses."""

    code = "bad_template"


class StoreError(CratonError):
    """The store on disk could not be read or written (no space, no permission, damaged artifact)."""

    code = "store"


class DownloadError(CratonError):
    """A model could not be fetched (no network, refused, wrong checksum). What had arrived is kept for a resume."""

    code = "download"


class DataError(CratonError):
    """Training data that cannot be used: wrong keys, mixed schemas, bad encoding, nothing to train on."""

    code = "bad_data"


class TrainingError(CratonError):
    """A run that must not go on: loss or gradient not finite, or a checkpoint that does not belong to it."""

    code = "training"


def did_you_mean(name: str, known: Iterable[str], limit: int = 3) -> str | None:
    """The known names nearest to `name`, as "'a' or 'b'", or None if nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=limit, cutoff=0.6)
    return " or ".join(repr(n) for n in near) or None
