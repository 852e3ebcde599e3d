"""Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

from __future__ import annotations

import json
from typing import Any

from craton.serving.errors import ApiError

DONE = b"data: [DONE]\n\n"


def data(value: Any) -> bytes:
    """An event without a name. JSON has no line breaks, so it is one line whatever the text."""
    return b"data: " + _json(value) + b"\n\n"


def named(name: str, value: Any) -> bytes:
    """An event with a name."""
    return f"event: {name}\n".encode() + data(value)


def openai_failure(error: ApiError) -> bytes:
    """What OpenAI's clients raise in the middle of a stream."""
    return data(error.body()) + DONE


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
