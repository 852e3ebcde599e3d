"""`/v1/tokenize` and `/v1/detokenize`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craton.serving.schemas.chat import ChatMessage, Tool
from craton.serving.schemas.common import Body, Name, TokenId


class TokenizeRequest(Body):
    """A text, or a conversation, to be made tokens."""

    model: Name
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """Tokens to be made text."""

    model: Name
    tokens: list[TokenId]
