"""ULIDs (github: ulid/spec): 26 characters that sort by time, 48 bits of milliseconds before 80 random bits."""

from __future__ import annotations

import secrets
import time
from typing import Final

_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # Crockford's base 32


def new_ulid() -> str:
    """A fresh ULID for the present moment."""
    number = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def ulid_seconds(text: str) -> float | None:
    """When `text` was made, in seconds since 1970; None if it is no ULID."""
    if len(text) != 26 or text[0] > "7" or not set(text) <= set(_ALPHABET):
        return None
    milliseconds = 0
    for char in text[:10]:
        milliseconds = milliseconds << 5 | _ALPHABET.index(char)
    return milliseconds / 1000
