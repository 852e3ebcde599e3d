"""From a checked request to running answers, and back to whole ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from craton.config import parse
from craton.inference.engine import Request, Token
from craton.inference.pictures import PromptPicture
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer
from craton.serving.applications import prepare_application
from craton.serving.call import Call
from craton.serving.conversation import Chat, Prepared, prepare
from craton.serving.errors import ApiError
from craton.serving.models import Served
from craton.serving.parsing import AnswerParser, Said
from craton.serving.pictures import shows_pictures, with_pixels
from craton.serving.worker import Answer, Piece


@dataclass
class Whole:
    """A finished answer, read. calls: (name, arguments as JSON) of each function that is called."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = "stop"

    @property
    def ids(self) -> list[int]:
        """The ids of its tokens."""
        return [token.id for token in self.tokens]

    def add(self, said: Sequence[Said]) -> None:
        """Take in what was said."""
        for one in said:
            match one.kind:
                case "content":
                    self.content += one.text
                case "reasoning":
                    self.reasoning += one.text
                case "call":
                    self.calls.append((one.text, one.arguments))


def settle_length(call: Call, sampling: Mapping[str, Any], room: int, default: int) -> dict[str, Any]:
    """The sampling values with a length: what was asked for, or the default as far as it fits. Raises ApiError."""
    limits, asked = call.state.settings, sampling.get("max_tokens")
    if asked is not None and asked > limits.max_tokens:
        raise ApiError(
            400, f"at most {limits.max_tokens} tokens may be asked for here, not {asked}", param="max_tokens"
        )
    if sampling.get("n", 1) > limits.max_choices:
        raise ApiError(400, f"at most {limits.max_choices} answers may be asked for here", param="n")
    return {**sampling, "max_tokens": asked or max(1, min(default, limits.max_tokens, room))}


async def prepare_chat(call: Call, served: Served, chat: Chat) -> Prepared:
    """Render a conversation off the event loop: in the worker where an application must search, else in any thread."""
    if shows_pictures(chat):
        # Before anything is fetched or decoded.
        if served.application is not None or not served.model.sees:
            raise ApiError(400, f"{served.id} does not see pictures", param="messages", code="no_images")
        chat = await asyncio.to_thread(with_pixels, chat, call.state.settings.pictures)
    if served.application is not None:
        application = served.application
        prepared = await call.state.worker.call(lambda: prepare_application(application, chat))
    else:
        served.check_writes()
        prepared = await asyncio.to_thread(prepare, served, chat)
    call.prompt_tokens = len(prepared.ids)
    room = served.model.context - len(prepared.ids)
    prepared.sampling.update(settle_length(call, prepared.sampling, room, call.state.settings.default_max_tokens))
    return prepared


@asynccontextmanager
async def running(
    call: Call,
    served: Served,
    prompts: Sequence[Sequence[int]],
    sampling: Mapping[str, Any],
    pictures: Sequence[PromptPicture] = (),
) -> Any:
    """The answers to prompts, `n` for each, while they are written. Leaving cancels what has not ended. pictures: of
    the only prompt."""
    settings = parse(SamplingSettings, sampling, where="the request")
    await call.state.forms.compile(settings, served.model.tokenizer)
    caller = call.caller
    answers = [
        call.state.worker.submit(
            served.engine,
            Request(list(ids), settings, choice, caller.salt, caller.priority, call.deadline, pictures),
            call.id,
        )
        for ids in prompts
        for choice in range(settings.n)
    ]
    for number, answer in enumerate(answers):
        answer.counts_prompt, answer.on_lag = number % settings.n == 0, call.cut
    try:
        yield answers
    finally:
        for answer in answers:
            answer.cancel()


@asynccontextmanager
async def answering(call: Call, served: Served, prepared: Prepared) -> Any:
    """The answers to a prepared conversation; one that was found at once is given in the same form."""
    if prepared.said is None:
        async with running(call, served, [prepared.ids], prepared.sampling, prepared.pictures) as answers:
            yield answers
        return
    answer = Answer(call.state.worker, 1)
    answer.receive(Piece(tail=prepared.said, finish_reason="stop"))
    yield [answer]


async def pieces(call: Call, answer: Answer) -> AsyncGenerator[Piece, None]:
    """The pieces of an answer, counted. Raises ApiError where it failed."""
    first = True
    async for piece in answer:
        call.count(piece)
        call.cached_tokens += piece.cached_tokens if first and answer.counts_prompt else 0
        first = False
        if piece.finish_reason == "cancelled":
            raise ApiError(503, "the answer was cancelled", code="cancelled")
        yield piece


async def merged(call: Call, answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """The pieces of several answers as they come, with each one's number."""
    coming: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(1)

    async def pump(number: int, answer: Answer) -> None:
        try:
            async for piece in pieces(call, answer):
                await coming.put((number, piece))
        except Exception as error:
            await coming.put((number, error))

    pumps = [asyncio.create_task(pump(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(answers)
        while left:
            number, piece = await coming.get()
            if isinstance(piece, Exception):
                raise piece
            yield number, piece
            left -= piece.last
    finally:
        for task in pumps:
            task.cancel()


async def read_whole(call: Call, answer: Answer, parser: AnswerParser) -> Whole:
    """An answer to its end."""
    whole = Whole()
    async with aclosing(pieces(call, answer)) as coming:
        async for piece in coming:
            whole.add(parser.push(text_of(piece)))
            whole.tokens += piece.tokens
            if piece.finish_reason is not None:
                whole.add(parser.finish())
                whole.finish_reason = "tool_calls" if whole.calls else piece.finish_reason
    return whole


async def read_all(call: Call, answers: Sequence[Answer], parsers: Sequence[AnswerParser]) -> list[Whole]:
    """All answers to their ends; the first that fails ends them all."""
    return await asyncio.gather(*(read_whole(call, a, p) for a, p in zip(answers, parsers, strict=True)))


def stopped_by(ids: Sequence[int], stops: Sequence[str], tokenizer: Tokenizer) -> str | None:
    """Which stop string an answer of these tokens ended with, if any. Its text ends before it; its tokens do not."""
    decoder = tokenizer.stream()
    text = "".join([*(decoder.push(i) for i in ids), decoder.finish()])
    found = [(at, -len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[2] if found else None


def text_of(piece: Piece) -> str:
    """All text that a piece brings."""
    return piece.tail + "".join(token.text for token in piece.tokens)
