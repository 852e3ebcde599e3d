"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from craton.serving import sse
from craton.serving.asking import Whole, answering, merged, prepare_chat, read_all, text_of
from craton.serving.call import Call
from craton.serving.conversation import Chat, Message, Prepared
from craton.serving.errors import ApiError
from craton.serving.http import Reply, Stream
from craton.serving.logprobs import chat_logprobs
from craton.serving.models import Served
from craton.serving.parsing import AnswerParser, Said
from craton.serving.schemas.chat import ChatRequest, JsonObjectFormat, JsonSchemaFormat, NamedChoice
from craton.serving.schemas.common import Body
from craton.serving.worker import Piece

if TYPE_CHECKING:
    from craton.prompting.answering import Passage


async def chat_completions(call: Call, body: ChatRequest) -> Reply:
    """Answer a conversation."""
    call.model, call.stream = body.model, bool(body.stream)
    _check(body)
    served = await call.borrow(body.model)
    prepared = await prepare_chat(call, served, chat_of(body))
    head = {"id": f"chatcmpl-{call.id}", "created": int(time.time()), "model": body.model}
    if body.stream:
        return Stream(_events(call, body, served, prepared, head), sse.openai_failure)
    async with answering(call, served, prepared) as answers:
        wholes = await read_all(call, answers, prepared.parsers)
    call.log_texts["answers"] = [vars(whole) | {"tokens": len(whole.tokens)} for whole in wholes]
    choices = [_choice(call, number, whole, body, served) for number, whole in enumerate(wholes)]
    return {**head, "object": "chat.completion", "choices": choices, "usage": usage(call), **sources(prepared.sources)}


def chat_of(body: ChatRequest) -> Chat:
    """The conversation in the form that all endpoints share."""
    sampling = body.sampling()
    length = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if length is not None:
        sampling["max_tokens"] = length
    if body.logprobs:
        sampling["logprobs"] = body.top_logprobs or 0
    match body.response_format:
        case JsonObjectFormat():
            sampling["json_schema"] = {"type": "object"}
        case JsonSchemaFormat(json_schema=schema):
            sampling["json_schema"] = schema.schema_ or {}
    choice = body.tool_choice or "auto"
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    return Chat(
        messages=[message_of(message) for message in body.messages],
        sampling=sampling,
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=choice.function.name if isinstance(choice, NamedChoice) else choice,
        named_tool=isinstance(choice, NamedChoice),
        parallel=body.parallel_tool_calls is not False,
        variables=variables,
    )


def message_of(message: Body) -> Message:
    """A message as plain data."""
    return message.model_dump(exclude_none=True, exclude={"annotations", "refusal"})


def usage(call: Call) -> dict[str, Any]:
    """What the request has cost so far."""
    return {
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "total_tokens": call.prompt_tokens + call.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": call.cached_tokens},
    }


def sources(passages: Sequence[Passage]) -> dict[str, Any]:
    """The passages that an application showed its model, as an extension field."""
    return {"sources": [{"name": p.name, "text": p.text} for p in passages]} if passages else {}


def tool_call(call: Call, choice: int, number: int, name: str, arguments: str) -> dict[str, Any]:
    """A call of a function in OpenAI's form."""
    return {
        "id": f"call_{call.id.removeprefix('req_')}_{choice}_{number}",
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _check(body: ChatRequest) -> None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise ApiError(400, "max_tokens and max_completion_tokens are one setting: give one", param="max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs", param="top_logprobs")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")
    shaped = isinstance(body.response_format, JsonObjectFormat | JsonSchemaFormat)
    guided = [name for name in ("json", "regex", "choice", "grammar") if getattr(body, f"guided_{name}") is not None]
    if shaped and guided:
        raise ApiError(400, f"an answer has one form: response_format or guided_{guided[0]}", param="response_format")


def _choice(call: Call, number: int, whole: Whole, body: ChatRequest, served: Served) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": whole.content or (None if whole.calls else "")}
    if whole.reasoning:
        message["reasoning_content"] = whole.reasoning
    if whole.calls:
        calls = enumerate(whole.calls)
        message["tool_calls"] = [tool_call(call, number, i, name, arguments) for i, (name, arguments) in calls]
    logprobs = chat_logprobs(whole.tokens, served.model.tokenizer, body.top_logprobs or 0) if body.logprobs else None
    return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": whole.finish_reason}


async def _events(
    call: Call, body: ChatRequest, served: Served, prepared: Prepared, head: Mapping[str, Any]
) -> AsyncGenerator[bytes, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = {**head, "object": "chat.completion.chunk"}
    # With usage asked for, OpenAI writes a null in every chunk but the last.
    tail: dict[str, Any] = {"usage": None} if with_usage else {}
    writers = [_Writer(call, number, parser) for number, parser in enumerate(prepared.parsers)]
    begun: set[int] = set()
    async with answering(call, served, prepared) as answers, aclosing(merged(call, answers)) as coming:
        async for number, piece in coming:
            if number not in begun:
                begun.add(number)
                first = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                yield sse.data({**head, "choices": [first], **tail, **sources(prepared.sources)})
            for choice in writers[number].choices(piece, body, served):
                yield sse.data({**head, "choices": [choice], **tail})
    if with_usage:
        yield sse.data({**head, "choices": [], "usage": usage(call)})
    yield sse.DONE


class _Writer:
    """Turns the pieces of one answer into the deltas of one choice."""

    def __init__(self, call: Call, number: int, parser: AnswerParser) -> None:
        self._call, self._number, self._parser, self._calls = call, number, parser, 0

    def choices(self, piece: Piece, body: ChatRequest, served: Served) -> list[dict[str, Any]]:
        said = self._parser.push(text_of(piece))
        if piece.finish_reason is not None:
            said += self._parser.finish()
        deltas = [self._delta(one) for one in said]
        reason: str | None = piece.finish_reason
        if reason is not None and self._calls:
            reason = "tool_calls"
        logprobs = None
        if body.logprobs and piece.tokens:
            logprobs = chat_logprobs(piece.tokens, served.model.tokenizer, body.top_logprobs or 0)
            deltas = deltas or [{}]
        chosen: list[dict[str, Any]] = [
            {"index": self._number, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        if logprobs is not None:
            chosen[0]["logprobs"] = logprobs
        if reason is not None:
            chosen.append({"index": self._number, "delta": {}, "logprobs": None, "finish_reason": reason})
        return chosen

    def _delta(self, said: Said) -> dict[str, Any]:
        match said.kind:
            case "reasoning":
                return {"reasoning_content": said.text}
            case "call":
                written = tool_call(self._call, self._number, self._calls, said.text, said.arguments)
                self._calls += 1
                return {"tool_calls": [{"index": self._calls - 1, **written}]}
            case _:
                return {"content": said.text}
