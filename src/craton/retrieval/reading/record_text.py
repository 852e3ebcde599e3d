"""Records (JSON lines, JSON, CSV, Parquet): each object is a small document, its fields are lines and metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from craton.retrieval.documents import MetadataValue
from craton.retrieval.reading.content import Content, clean, one_line

TEXT_FIELD: Final = "text"
TITLE_FIELDS: Final = ("title", "name", "question", "id")
MAX_METADATA_CHARACTERS: Final = 200
"""Longer fields are for search, not for filters."""


def record(value: Mapping[str, Any]) -> Content:
    """The content of one object: its `text` field if it has one, else a line "key: value" for each field."""
    own = value.get(TEXT_FIELD)
    if isinstance(own, str) and own.strip():
        text = clean(own)
    else:
        lines = ((clean(key), clean(_written(field))) for key, field in value.items())
        text = "\n".join(f"{key}: {field}" for key, field in lines if field.strip())
    metadata: dict[str, MetadataValue] = {}
    for key, field in value.items():
        if isinstance(field, (str, int, float, bool)) and key != TEXT_FIELD:
            scalar = clean(field) if isinstance(field, str) else field
            if not isinstance(scalar, str) or 0 < len(scalar) <= MAX_METADATA_CHARACTERS:
                metadata[clean(key)] = scalar
    titles = (one_line(str(metadata[name])) for name in TITLE_FIELDS if name in metadata)
    return Content(text, next(titles, ""), metadata=metadata)


def _written(field: Any) -> str:
    if field is None:
        return ""
    if isinstance(field, str):
        return field
    if isinstance(field, list) and all(isinstance(item, (str, int, float)) for item in field):
        return ", ".join(map(str, field))
    return json.dumps(field, ensure_ascii=False, default=str)
