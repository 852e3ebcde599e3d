"""Data sets of the Hugging Face hub, row by row through the `datasets` library; no code of theirs is run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from craton.data.formats import missing_extra
from craton.errors import DownloadError, UsageError


def read_hub(name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The numbered rows of "org/name", "org/name:split" or "org/name/configuration:split"; the split is else "train".

    Raises UsageError without the library or for a malformed name, DownloadError for what it cannot get.
    """
    where = f"hf:{name}"
    path, _, split = name.partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3 or ":" in split:
        raise UsageError(f"{where!r} is no data set's name", remedy="write hf:org/name or hf:org/name:split")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise missing_extra("data sets from the hub", "datasets", where) from None
    repository, configuration = "/".join(parts[:2]), (parts[2] if len(parts) == 3 else None)
    number = 0
    try:
        # Never `trust_remote_code`: a data set that needs its own code is refused by the library.
        for row in datasets.load_dataset(repository, configuration, split=split or "train", streaming=True):
            number += 1
            yield number, row
    except Exception as error:  # the library's own, the hub client's, the network's: all mean that rows do not come
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise DownloadError(f"the data set cannot be read: {first}", where=f"{where}#{number + 1}") from error
