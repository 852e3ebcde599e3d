"""`/v1/responses`, without state: what a client wants remembered, it sends again."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from craton.errors import CratonError
from craton.serving import sse
from craton.serving.asking import Whole, answering, pieces, prepare_chat, read_whole, text_of
from craton.serving.call import Call
from craton.serving.conversation import Chat, Message, Prepared
from craton.serving.errors import ApiError, from_any
from craton.serving.http import Reply, Stream
from craton.serving.models import Served
from craton.serving.parsing import Said
from craton.serving.routes.chat import sources
from craton.serving.schemas.chat import JsonObjectFormat
from craton.serving.schemas.common import sampling_values
from craton.serving.schemas.responses import (
    CallItem,
    ChosenFunction,
    ImageItem,
    MessageItem,
    OutputItem,
    ResponsesRequest,
    SchemaFormat,
)


async def responses(call: Call, body: ResponsesRequest) -> Reply:
    """Answer items."""
    call.model, call.stream = body.model, bool(body.stream)
    served = await call.borrow(body.model)
    prepared = await _prepared(call, served, chat_of(body))
    created = int(time.time())
    if body.stream:
        return Stream(_events(call, body, served, prepared, created), _failure)
    async with answering(call, served, prepared) as answers:
        whole = await read_whole(call, answers[0], prepared.parsers[0])
    call.log_texts["answers"] = [whole.content]
    return _response(call, body, created, _output(call, whole), whole.finish_reason) | sources(prepared.sources)


def chat_of(body: ResponsesRequest) -> Chat:
    """The conversation in the form that all endpoints share."""
    conversation: list[Message] = []
    if body.instructions:
        conversation.append({"role": "system", "content": body.instructions})
    given = [MessageItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    for item in given:
        _add(conversation, item)
    shape = body.text.format if body.text else None
    schema = None
    if isinstance(shape, JsonObjectFormat):
        schema = {"type": "object"}
    elif isinstance(shape, SchemaFormat):
        schema = shape.schema_
    sampling = sampling_values(
        temperature=body.temperature, top_p=body.top_p, max_tokens=body.max_output_tokens, json_schema=schema
    )
    choice = body.tool_choice or "auto"
    named = isinstance(choice, ChosenFunction)
    return Chat(
        messages=conversation,
        sampling=sampling,
        tools=[
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type", "strict"})}
            for tool in body.tools or ()
        ],
        tool_choice=choice.name if isinstance(choice, ChosenFunction) else choice,
        named_tool=named,
        parallel=body.parallel_tool_calls is not False,
    )


async def _prepared(call: Call, served: Served, chat: Chat) -> Prepared:
    try:
        return await prepare_chat(call, served, chat)
    except (ApiError, CratonError) as error:
        refusal = from_any(error)
        if refusal.param == "messages":
            refusal.param = "input"  # what this endpoint calls a conversation
        raise refusal from None


def _add(conversation: list[Message], item: MessageItem | CallItem | OutputItem) -> None:
    match item:
        case MessageItem():
            conversation.append({"role": item.role, "content": _content(item)})
        case OutputItem():
            conversation.append({"role": "tool", "tool_call_id": item.call_id, "content": item.output})
        case CallItem():
            # Calls belong to the message that they were made in.
            if not conversation or conversation[-1]["role"] != "assistant":
                conversation.append({"role": "assistant", "content": ""})
            function = {"name": item.name, "arguments": item.arguments}
            calls = conversation[-1].setdefault("tool_calls", [])
            calls.append({"id": item.call_id, "type": "function", "function": function})


def _content(item: MessageItem) -> Any:
    """Text, or with pictures the parts that chat completions know."""
    if isinstance(item.content, str):
        return item.content
    pictures = [part for part in item.content if isinstance(part, ImageItem)]
    if not pictures:
        return "".join(part.text for part in item.content if not isinstance(part, ImageItem))
    if item.role != "user":
        raise ApiError(400, "only a user's message may show pictures", param="input")
    if any(part.file_id is not None for part in pictures):
        raise ApiError(
            400, "no files are kept here: send pictures as image_url and not as file_id", param="input", code="no_files"
        )
    if any(part.image_url is None for part in pictures):
        raise ApiError(400, "a picture needs its image_url", param="input")
    return [
        {"type": "image_url", "image_url": {"url": part.image_url}}
        if isinstance(part, ImageItem)
        else {"type": "text", "text": part.text}
        for part in item.content
    ]


def _message(call: Call, text: str, status: str) -> dict[str, Any]:
    content = [_text_part(text)] if status == "completed" else []
    return {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "status": status, "content": content}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _reasoning(call: Call, text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": f"rs_{call.id}", "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def _call(call: Call, number: int, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    key = f"{call.id}_{number}"
    item = {"id": f"fc_{key}", "type": "function_call", "call_id": f"call_{key}", "name": name}
    return {**item, "arguments": arguments, "status": status}


def _output(call: Call, whole: Whole) -> list[dict[str, Any]]:
    items = [_reasoning(call, whole.reasoning)] if whole.reasoning else []
    if whole.content or not whole.calls:
        items.append(_message(call, whole.content, "completed"))
    return items + [_call(call, number, *one) for number, one in enumerate(whole.calls)]


def _response(
    call: Call, body: ResponsesRequest, created: int, output: list[dict[str, Any]], finish_reason: str | None
) -> dict[str, Any]:
    """The response object; without a finish reason, as it is while it is written."""
    status = {None: "in_progress", "length": "incomplete"}.get(finish_reason, "completed")
    usage = {
        "input_tokens": call.prompt_tokens,
        "input_tokens_details": {"cached_tokens": call.cached_tokens},
        "output_tokens": call.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": call.prompt_tokens + call.completion_tokens,
    }
    asked = body.model_dump(include={"instructions", "max_output_tokens", "temperature", "top_p"})
    choice = body.tool_choice
    return {
        "id": f"resp_{call.id}",
        "object": "response",
        "created_at": created,
        "status": status,
        "model": body.model,
        "output": output,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        **asked,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": choice.model_dump() if isinstance(choice, ChosenFunction) else choice or "auto",
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "store": False,
        "usage": None if finish_reason is None else usage,
    }


def _failure(error: ApiError) -> bytes:
    return sse.named("error", {"type": "error", "code": error.code, "message": error.message, "param": error.param})


async def _events(
    call: Call, body: ResponsesRequest, served: Served, prepared: Prepared, created: int
) -> AsyncGenerator[bytes, None]:
    writer = _Writer(call)
    parser = prepared.parsers[0]
    begun = False
    async with answering(call, served, prepared) as answers, aclosing(pieces(call, answers[0])) as coming:
        async for piece in coming:
            if not begun:
                begun = True
                for name in ("response.created", "response.in_progress"):
                    yield writer.event(name, response=_response(call, body, created, [], None))
            said = parser.push(text_of(piece))
            if piece.finish_reason is not None:
                said += parser.finish()
            for one in said:
                for event in writer.say(one):
                    yield event
            if piece.finish_reason is not None:
                reason = "tool_calls" if writer.calls else piece.finish_reason
                if not writer.output and not writer.is_open:
                    for event in writer.say(Said("content", "")):
                        yield event
                for event in writer.close():
                    yield event
                response = _response(call, body, created, writer.output, reason) | sources(prepared.sources)
                name = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
                yield writer.event(name, response=response)


class _Writer:
    """Writes the items of one response as numbered events."""

    def __init__(self, call: Call) -> None:
        self._call, self._number = call, 0
        self._kind, self._text = "", ""
        self.output: list[dict[str, Any]] = []
        self.calls = 0

    @property
    def is_open(self) -> bool:
        """Whether an item is being written."""
        return bool(self._kind)

    def event(self, name: str, /, **values: Any) -> bytes:
        """One event with its number."""
        self._number += 1
        return sse.named(name, {"type": name, "sequence_number": self._number - 1, **values})

    def say(self, said: Said) -> list[bytes]:
        """What a piece of an answer becomes."""
        if said.kind == "call":
            return [*self.close(), *self._whole_call(said)]
        events = []
        if self._kind != said.kind:
            events = [*self.close(), *self._begin(said.kind)]
        self._text += said.text
        name = "response.output_text.delta" if said.kind == "content" else "response.reasoning_text.delta"
        extra: dict[str, Any] = {"logprobs": []} if said.kind == "content" else {}
        return [*events, self.event(name, **self._place, content_index=0, delta=said.text, **extra)]

    def close(self) -> list[bytes]:
        """The end of the item that is open."""
        if not self._kind:
            return []
        place, text = {**self._place, "content_index": 0}, self._text
        if self._kind == "content":
            item = _message(self._call, text, "completed")
            events = [
                self.event("response.output_text.done", **place, text=text, logprobs=[]),
                self.event("response.content_part.done", **place, part=_text_part(text)),
            ]
        else:
            item = _reasoning(self._call, text)
            events = [self.event("response.reasoning_text.done", **place, text=text)]
        events.append(self.event("response.output_item.done", output_index=len(self.output), item=item))
        self.output.append(item)
        self._kind, self._text = "", ""
        return events

    @property
    def _place(self) -> dict[str, Any]:
        prefix = "msg" if self._kind == "content" else "rs"
        return {"item_id": f"{prefix}_{self._call.id}", "output_index": len(self.output)}

    def _begin(self, kind: str) -> list[bytes]:
        self._kind = kind
        item = _message(self._call, "", "in_progress") if kind == "content" else _reasoning(self._call, "")
        if kind != "content":
            item |= {"status": "in_progress", "content": []}
        events = [self.event("response.output_item.added", output_index=len(self.output), item=item)]
        if kind == "content":
            events.append(
                self.event("response.content_part.added", **self._place, content_index=0, part=_text_part(""))
            )
        return events

    def _whole_call(self, said: Said) -> list[bytes]:
        item = _call(self._call, self.calls, said.text, said.arguments)
        place = {"item_id": item["id"], "output_index": len(self.output)}
        name = "response.function_call_arguments"
        events = [
            self.event(
                "response.output_item.added",
                output_index=len(self.output),
                item=item | {"arguments": "", "status": "in_progress"},
            ),
            self.event(f"{name}.delta", **place, delta=said.arguments),
            self.event(f"{name}.done", **place, arguments=said.arguments, name=said.text),
            self.event("response.output_item.done", output_index=len(self.output), item=item),
        ]
        self.output.append(item)
        self.calls += 1
        return events
