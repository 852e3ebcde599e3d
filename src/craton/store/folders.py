"""The home folder: where models and downloads are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from craton.checkpoints.disk import disk_errors
from craton.errors import StoreError

HOME_VARIABLE: Final = "CRATON_HOME"


def home() -> Path:
    """`$CRATON_HOME`, else `$XDG_DATA_HOME/craton`, else `~/.local/share/craton`; absolute, not necessarily there yet.

    Raises:
        StoreError: the path is no folder, or no home folder can be found at all.
    """
    chosen = os.environ.get(HOME_VARIABLE, "")
    shared = os.environ.get("XDG_DATA_HOME", "")
    if chosen:
        folder = Path(os.path.expanduser(chosen)).absolute()
    elif os.path.isabs(shared):  # the XDG specification: a relative path there is invalid and ignored
        folder = Path(shared) / "craton"
    else:
        folder = Path(os.path.expanduser("~/.local/share/craton"))
    remedy = f"set {HOME_VARIABLE} to a folder that you may write to"
    if not folder.is_absolute():
        raise StoreError("this user has no home folder", remedy=remedy)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise StoreError("the home of Craton is a file, not a folder", where=str(folder), remedy=remedy)
    return folder


def make_folder(path: Path) -> Path:
    """Create `path` and its parents if they are not there; return it.

    Raises:
        StoreError: no permission, a read-only or full disk, or a file in the way.
    """
    with disk_errors(f"create the folder {path.name}", path):
        path.mkdir(parents=True, exist_ok=True)
    return path
