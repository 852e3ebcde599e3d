"""Numbers of parameters as people write them."""

from __future__ import annotations

import re
from typing import Final

from craton.errors import UsageError

UNITS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_size(text: str) -> int:
    """The number that "30m", "0.5M", "1b" or "1500000" means. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", text.strip().lower())
    value = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if value < 1:
        raise UsageError(f"{text!r} is not a size", remedy="write a number of parameters, such as 5m, 135m or 1b")
    return value
