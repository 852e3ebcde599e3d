"""`/v1/messages` and `/v1/messages/count_tokens`, in Anthropic's shape."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from craton.serving import sse
from craton.serving.asking import Whole, answering, pieces, prepare_chat, read_whole, stopped_by, text_of
from craton.serving.call import Call
from craton.serving.conversation import Chat, Message, Prepared
from craton.serving.errors import ApiError
from craton.serving.http import Reply, Stream
from craton.serving.models import Served
from craton.serving.parsing import THINK, Said
from craton.serving.routes.chat import sources
from craton.serving.schemas.common import sampling_values
from craton.serving.schemas.messages import (
    AnyChoice,
    ConversationFields,
    CountTokensRequest,
    ImageBlock,
    ImageBytes,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolChoice,
    ToolResultBlock,
    ToolUseBlock,
)
from craton.serving.tools import template_source

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


async def messages(call: Call, body: MessagesRequest) -> Reply:
    """Answer a conversation."""
    call.model, call.stream = body.model, bool(body.stream)
    served = await call.borrow(body.model)
    sampling = sampling_values(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        stop=tuple(body.stop_sequences or ()) or None,
        json_schema=body.output_config.format.schema_ if body.output_config and body.output_config.format else None,
    )
    prepared = await prepare_chat(call, served, chat_of(body, sampling, served))
    if body.stream:
        return Stream(_events(call, body, served, prepared), _failure)
    async with answering(call, served, prepared) as answers:
        whole = await read_whole(call, answers[0], prepared.parsers[0])
    call.log_texts["answers"] = [whole.content]
    end = _end(body, served, whole.finish_reason, whole.ids)
    return {**_head(call, body), "content": _blocks(call, whole), **end, "usage": _usage(call)} | sources(
        prepared.sources
    )


async def count_tokens(call: Call, body: CountTokensRequest) -> Reply:
    """How many tokens the model would read."""
    call.model = body.model
    served = await call.borrow(body.model)
    prepared = await prepare_chat(call, served, chat_of(body, {}, served))
    return {"input_tokens": len(prepared.ids)}


def chat_of(body: ConversationFields, sampling: dict[str, Any], served: Served) -> Chat:
    """The conversation in the form that all endpoints share."""
    conversation: list[Message] = []
    if body.system:
        conversation.append({"role": "system", "content": _text(body.system)})
    for turn in body.messages:
        conversation += _turn(turn.role, turn.content)
    choice, tool_choice, parallel = body.tool_choice, "auto", True
    if choice is not None:
        tool_choice = {"auto": "auto", "any": "required", "none": "none", "tool": "tool"}[choice.type]
        parallel = not getattr(choice, "disable_parallel_tool_use", False)
    if isinstance(choice, ToolChoice):
        tool_choice = choice.name
    if isinstance(choice, AnyChoice | ToolChoice) and not body.tools:
        raise ApiError(400, "there are no tools to choose from", param="tool_choice")
    tools = [_tool(tool.name, tool.description, tool.input_schema) for tool in body.tools or ()]
    named = isinstance(choice, ToolChoice)
    return Chat(conversation, sampling, tools, tool_choice, named, parallel, _thinking(body, served))


def _thinking(body: ConversationFields, served: Served) -> dict[str, bool]:
    """The template's variable for reasoning; a model that never reasons needs not be told not to."""
    if body.thinking is None:
        return {}
    wanted = body.thinking.type != "disabled"
    reasons = THINK in template_source(served.model.tokenizer, tools=bool(body.tools))
    if wanted and not reasons:
        raise ApiError(400, f"{served.id} does not reason before it answers", param="thinking")
    return {"enable_thinking": wanted} if reasons else {}


def _tool(name: str, description: str | None, schema: dict[str, Any]) -> dict[str, Any]:
    described = {} if description is None else {"description": description}
    return {"type": "function", "function": {"name": name, **described, "parameters": schema}}


def _text(content: str | Sequence[TextBlock]) -> str:
    return content if isinstance(content, str) else "".join(block.text for block in content)


def _turn(role: str, content: Any) -> list[Message]:
    """The messages of a turn: what functions gave is a message of its own for each."""
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    found: list[Message] = []
    said: Message = {"role": role, "content": ""}
    if any(isinstance(block, ImageBlock) for block in content):
        said["content"] = [_part(block) for block in content if isinstance(block, TextBlock | ImageBlock)]
    for block in content:
        match block:
            case TextBlock() if isinstance(said["content"], str):
                said["content"] += block.text
            case ThinkingBlock():
                said["reasoning_content"] = said.get("reasoning_content", "") + block.thinking
            case ToolUseBlock():
                function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
                said.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
            case ToolResultBlock():
                given = _text(block.content)
                text = f"Error: {given}" if block.is_error else given
                found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    if said["content"] or "tool_calls" in said or not found:
        found.append(said)
    return found


def _part(block: TextBlock | ImageBlock) -> dict[str, Any]:
    """A part of a content list in OpenAI's form."""
    if isinstance(block, TextBlock):
        return {"type": "text", "text": block.text}
    source = block.source
    url = f"data:{source.media_type};base64,{source.data}" if isinstance(source, ImageBytes) else source.url
    return {"type": "image_url", "image_url": {"url": url}}


def _head(call: Call, body: MessagesRequest) -> dict[str, Any]:
    return {"id": f"msg_{call.id}", "type": "message", "role": "assistant", "model": body.model}


def _end(body: MessagesRequest, served: Served, finish_reason: str, ids: Sequence[int]) -> dict[str, Any]:
    stops = (body.stop_sequences or ()) if finish_reason == "stop" else ()
    stop = stopped_by(ids, stops, served.model.tokenizer)
    reason = STOP_REASONS[finish_reason] if stop is None else "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": stop}


def _usage(call: Call) -> dict[str, int]:
    # As Anthropic counts: what was read from the cache is not part of the input.
    return {
        "input_tokens": call.prompt_tokens - call.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": call.cached_tokens,
        "output_tokens": call.completion_tokens,
    }


def _tool_use(call: Call, number: int, name: str, arguments: str) -> dict[str, Any]:
    try:
        given = json.loads(arguments)
    except (ValueError, RecursionError):
        given = {"arguments": arguments}
    return {"type": "tool_use", "id": f"toolu_{call.id}_{number}", "name": name, "input": given}


def _blocks(call: Call, whole: Whole) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if whole.reasoning:
        blocks.append({"type": "thinking", "thinking": whole.reasoning, "signature": ""})
    if whole.content or not whole.calls:
        blocks.append({"type": "text", "text": whole.content})
    blocks += [_tool_use(call, number, name, arguments) for number, (name, arguments) in enumerate(whole.calls)]
    return blocks


def _failure(error: ApiError) -> bytes:
    return sse.named("error", error.body("/v1/messages"))


async def _events(call: Call, body: MessagesRequest, served: Served, prepared: Prepared) -> AsyncGenerator[bytes, None]:
    writer = _Writer(call)
    parser = prepared.parsers[0]
    begun, ids = False, list[int]()
    async with answering(call, served, prepared) as answers, aclosing(pieces(call, answers[0])) as coming:
        async for piece in coming:
            if not begun:
                begun = True
                message = {
                    **_head(call, body),
                    "content": [],
                    "stop_reason": None,
                    "stop_sequence": None,
                    "usage": _usage(call) | {"output_tokens": 0},
                }
                yield _event("message_start", message=message | sources(prepared.sources))
                yield _event("ping")
            ids += [token.id for token in piece.tokens]
            said = parser.push(text_of(piece))
            if piece.finish_reason is not None:
                said += parser.finish()
            for one in said:
                for event in writer.say(one):
                    yield event
            if piece.finish_reason is not None:
                for event in writer.close():
                    yield event
                end = _end(body, served, "tool_calls" if writer.calls else piece.finish_reason, ids)
                yield _event("message_delta", delta=end, usage=_usage(call))
    yield _event("message_stop")


class _Writer:
    """Opens, fills and closes the blocks of one message."""

    def __init__(self, call: Call) -> None:
        self._call, self._index, self._open, self.calls = call, -1, "", 0

    def say(self, said: Said) -> list[bytes]:
        if said.kind == "call":
            block = _tool_use(self._call, self.calls, said.text, said.arguments)
            self.calls += 1
            events = [*self.close(), self._start(block | {"input": {}}, "tool_use")]
            return [*events, self._delta(type="input_json_delta", partial_json=said.arguments), *self.close()]
        kind = "text" if said.kind == "content" else "thinking"
        events = []
        if self._open != kind:
            empty = {"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {})
            events = [*self.close(), self._start(empty, kind)]
        return [*events, self._delta(**{"type": f"{kind}_delta", kind: said.text})]

    def close(self) -> list[bytes]:
        if not self._open:
            return []
        self._open = ""
        return [_event("content_block_stop", index=self._index)]

    def _start(self, block: dict[str, Any], kind: str) -> bytes:
        self._index, self._open = self._index + 1, kind
        return _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, **delta: Any) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(name: str, **values: Any) -> bytes:
    return sse.named(name, {"type": name, **values})
