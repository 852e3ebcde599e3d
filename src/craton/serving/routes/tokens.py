"""`/v1/tokenize` and `/v1/detokenize`: no model runs."""

from __future__ import annotations

import asyncio
from typing import Any

from craton.serving.call import Call
from craton.serving.conversation import Chat, prepare
from craton.serving.errors import ApiError
from craton.serving.http import Reply
from craton.serving.logprobs import token_name
from craton.serving.models import Served
from craton.serving.routes.chat import message_of
from craton.serving.schemas.tokens import DetokenizeRequest, TokenizeRequest


async def tokenize(call: Call, body: TokenizeRequest) -> Reply:
    """The tokens of a text, or of a conversation as the model would read it."""
    call.model = body.model
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either a prompt or messages", param="prompt")
    if body.messages is not None and body.add_special_tokens is not None:
        raise ApiError(400, "a conversation has the tokens that its template writes", param="add_special_tokens")
    if body.prompt is not None and body.tools is not None:
        raise ApiError(400, "tools need messages", param="tools")
    served = await call.borrow(body.model)
    if served.application is not None and body.messages is not None:
        raise ApiError(
            400, f"{body.model} writes its prompt itself: count it with /v1/messages/count_tokens", param="model"
        )
    ids = await asyncio.to_thread(_ids, served, body)
    call.prompt_tokens = len(ids)
    found: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": served.model.context}
    if body.return_token_strs:
        found["token_strs"] = [token_name(i, served.model.tokenizer) for i in ids]
    return found


async def detokenize(call: Call, body: DetokenizeRequest) -> Reply:
    """The text of tokens, special ones included."""
    call.model = body.model
    served = await call.borrow(body.model)
    return {"prompt": await asyncio.to_thread(served.model.tokenizer.decode, body.tokens, skip_special_tokens=False)}


def _ids(served: Served, body: TokenizeRequest) -> list[int]:
    if body.messages is None:
        return served.model.tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return prepare(served, Chat([message_of(message) for message in body.messages], {}, tools)).ids
