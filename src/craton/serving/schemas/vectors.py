"""`/v1/embeddings` (OpenAI's) and `/v1/rerank` (Cohere's and Jina's)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from craton.serving.schemas.common import Body, Name

Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(Body):
    """Texts to be made vectors."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1)]
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
