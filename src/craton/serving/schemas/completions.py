"""`/v1/completions`: https://platform.openai.com/docs/api-reference/completions/create"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craton.serving.schemas.common import Name, SamplingFields, StreamOptions, TokenId

Ids = Annotated[list[TokenId], Field(min_length=1)]
Prompts = str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """Texts, or token ids, to be continued."""

    model: Name
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
