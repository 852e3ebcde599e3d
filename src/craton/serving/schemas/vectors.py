"""`/v1/embeddings` (OpenAI's) and `/v1/rerank` (Cohere's and Jina's)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from craton.serving.schemas.chat import UserMessage
from craton.serving.schemas.common import Body, Name

Text = Annotated[str, Field(min_length=1)]


class EmbeddingItem(Body):
    """A text or a picture, in Jina's form. image: a data URL, a file in base64, or an address where the server fetches
    them."""

    text: Text | None = None
    image: Text | None = None


class EmbeddingRequest(Body):
    """Texts and pictures to be made vectors. messages: in the place of `input`, for a model that sees, one message with
    the only text or picture, as vLLM's clients send it."""

    model: Name
    input: Text | Annotated[list[Text | EmbeddingItem], Field(min_length=1)] | None = None
    messages: Annotated[list[UserMessage], Field(min_length=1, max_length=1)] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


class Document(Body):
    """A document to be ranked."""

    text: Text


class RerankRequest(Body):
    """Documents to be put in the order of their likeness to a query."""

    model: Name
    query: Text
    documents: Annotated[list[Text | Document], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    return_documents: bool | None = None
