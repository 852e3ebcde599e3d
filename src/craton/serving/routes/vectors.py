"""`/v1/embeddings` and `/v1/rerank`."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from craton.inference.images import ImageModel
from craton.serving.call import Call
from craton.serving.errors import ApiError
from craton.serving.http import Reply
from craton.serving.models import Served
from craton.serving.schemas.chat import TextPart
from craton.serving.schemas.vectors import EmbeddingItem, EmbeddingRequest, RerankRequest
from craton.serving.seeing import check_lengths, vectors_of_seen

# Between two parts of so many texts, engines step: answers that are being written do not wait for a long list.
PART = 16


async def embeddings(call: Call, body: EmbeddingRequest) -> Reply:
    """Vectors of texts, and of pictures with a model that sees. Fewer dimensions are the first ones, made unit length
    again (Kusupati 2022, arXiv 2205.13147): good for models that were trained for it."""
    call.model = body.model
    items = _items(body)
    served = await call.borrow(body.model)
    if body.messages is not None and not isinstance(served.loaded, ImageModel):
        raise ApiError(400, f"{served.id} sees no pictures: give it texts as input", param="messages")
    vectors_BD = await _embed(call, served, items, "input" if body.messages is None else "messages")
    if body.dimensions is not None:
        if body.dimensions > vectors_BD.shape[1]:
            raise ApiError(400, f"vectors of {body.model} have {vectors_BD.shape[1]} dimensions", param="dimensions")
        vectors_BD = _unit(vectors_BD[:, : body.dimensions])
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(vector_D, body.encoding_format == "base64")}
        for i, vector_D in enumerate(vectors_BD)
    ]
    return {"object": "list", "data": data, "model": body.model, "usage": _usage(call)}


async def rerank(call: Call, body: RerankRequest) -> Reply:
    """Documents in the order of the cosine of their vectors with the query's; there is no cross-encoder here."""
    call.model = body.model
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    served = await call.borrow(body.model)
    items = [EmbeddingItem(text=text) for text in (body.query, *documents)]
    vectors_BD = _unit(await _embed(call, served, items, "documents"))
    scores = (vectors_BD[1:] @ vectors_BD[0]).tolist()
    order = sorted(range(len(documents)), key=lambda i: (-scores[i], i))[: body.top_n]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if body.return_documents:
        for result in results:
            result["document"] = {"text": documents[result["index"]]}
    return {
        "id": f"rerank-{call.id}",
        "model": body.model,
        "results": results,
        "scored_by": "cosine",
        "usage": {"total_tokens": call.prompt_tokens},
    }


def _items(body: EmbeddingRequest) -> list[EmbeddingItem]:
    """What vectors are asked for. Raises ApiError."""
    if (body.input is None) == (body.messages is None):
        raise ApiError(400, "give either input or messages", param="input")
    if body.messages is not None:
        content = body.messages[0].content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        if len(parts) != 1:
            raise ApiError(400, "one vector is of one text or of one picture: give one part", param="messages")
        part = parts[0]
        if not isinstance(part, TextPart):
            return [EmbeddingItem(image=part.image_url.url)]
        if not part.text:
            raise ApiError(400, "an empty text has no vector", param="messages")
        return [EmbeddingItem(text=part.text)]
    given = [body.input] if isinstance(body.input, str) else body.input or ()
    items = [EmbeddingItem(text=one) if isinstance(one, str) else one for one in given]
    for number, item in enumerate(items):
        if (item.text is None) == (item.image is None):
            raise ApiError(400, f"input[{number}] is either a text or an image", param="input")
    return items


async def _embed(call: Call, served: Served, items: Sequence[EmbeddingItem], field: str) -> np.ndarray[Any, Any]:
    """[B, D] fp32 vectors. Raises ApiError for too many texts, or one that is too long: nothing is cut silently."""
    if len(items) > call.state.settings.max_batch:
        raise ApiError(400, f"at most {call.state.settings.max_batch} texts in one request", param=field)
    if served.application is not None:
        raise ApiError(400, f"{served.id} answers conversations and makes no vectors", param="model")
    if isinstance(served.loaded, ImageModel):
        return await vectors_of_seen(call, served.id, served.loaded, items, field)
    texts = [item.text for item in items if item.text is not None]
    if len(texts) < len(items):
        raise ApiError(400, f"{served.id} makes no vectors of pictures", param=field, code="no_images")
    model = served.model
    encoded = await asyncio.to_thread(model.tokenizer.encode_batch, texts)
    call.prompt_tokens = sum(len(ids) for ids in encoded)
    pooling = model.checkpoint.pooling
    limit = min((pooling.max_tokens if pooling else None) or model.context, model.context)
    check_lengths(served.id, enumerate(encoded), limit, field)
    starts = range(0, len(texts), PART)
    parts = (model.embed(texts[first : first + PART]).float().numpy() for first in starts)
    return np.concatenate(await call.state.worker.work(parts))


def _unit(vectors_BD: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    lengths = np.linalg.norm(vectors_BD, axis=1, keepdims=True)
    return np.asarray(vectors_BD / np.maximum(lengths, 1e-12), dtype=np.float32)


def _encoded(vector_D: np.ndarray[Any, Any], as_base64: bool) -> Any:
    # Little-endian fp32, as OpenAI's clients read it.
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if as_base64 else vector_D.tolist()


def _usage(call: Call) -> dict[str, int]:
    return {"prompt_tokens": call.prompt_tokens, "total_tokens": call.prompt_tokens}
