"""`/v1/completions`: continuation of plain prompts, and exact log-probabilities of the prompts themselves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from craton.inference.engine import Token
from craton.serving import sse
from craton.serving.asking import merged, pieces, running, settle_length, text_of
from craton.serving.call import Call
from craton.serving.errors import ApiError
from craton.serving.http import Reply, Stream
from craton.serving.logprobs import named_logprobs, token_name
from craton.serving.models import Served
from craton.serving.prompt_scores import PromptToken, prompt_scores
from craton.serving.routes.chat import usage
from craton.serving.schemas.completions import CompletionRequest
from craton.serving.worker import Answer

# OpenAI's own.
DEFAULT_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0


@dataclass
class _Prompt:
    """A prompt as tokens and as the text that `echo` gives back, with its scores where they are asked for."""

    ids: list[int]
    text: str
    scores: list[PromptToken] = field(default_factory=list)


@dataclass
class _Continuation:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str = "length"


async def completions(call: Call, body: CompletionRequest) -> Reply:
    """Continue prompts."""
    call.model, call.stream = body.model, bool(body.stream)
    _check(body)
    served = await call.borrow(body.model)
    served.check_writes()
    if served.application is not None:
        raise ApiError(400, f"{body.model} answers conversations: ask /v1/chat/completions", param="model")
    prompts = await asyncio.to_thread(_read, served, body)
    if len(prompts) * (body.n or 1) > call.state.settings.max_batch:
        raise ApiError(400, f"at most {call.state.settings.max_batch} answers in one request", param="prompt")
    call.prompt_tokens = sum(len(prompt.ids) for prompt in prompts)
    sampling = {"temperature": DEFAULT_TEMPERATURE, **body.sampling()}
    if body.max_tokens:
        sampling["max_tokens"] = body.max_tokens
    if body.logprobs is not None:
        sampling["logprobs"] = body.logprobs
    room = served.model.context - max(len(prompt.ids) for prompt in prompts)
    sampling = settle_length(call, sampling, room, DEFAULT_TOKENS)
    if body.echo and body.logprobs is not None:
        for prompt in prompts:
            parts = await call.state.worker.work(prompt_scores(served.model, prompt.ids, body.logprobs))
            prompt.scores = [token for part in parts for token in part]
    head = {"id": f"cmpl-{call.id}", "object": "text_completion", "created": int(time.time()), "model": body.model}
    if body.stream:
        return Stream(_events(call, body, served, prompts, sampling, head), sse.openai_failure)
    if body.max_tokens == 0:
        found = [_Continuation() for _ in range(len(prompts) * (body.n or 1))]
    else:
        async with running(call, served, [prompt.ids for prompt in prompts], sampling) as answers:
            found = await asyncio.gather(*(_read_continuation(call, answer) for answer in answers))
    call.log_texts["answers"] = [one.text for one in found]
    choices = [_choice(i, prompts[i // (body.n or 1)], one, body, served) for i, one in enumerate(found)]
    return {**head, "choices": choices, "usage": usage(call)}


def _check(body: CompletionRequest) -> None:
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise ApiError(400, "0 tokens can be asked for only with echo, and without stream", param="max_tokens")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream", param="stream_options")


def _read(served: Served, body: CompletionRequest) -> list[_Prompt]:
    tokenizer, given = served.model.tokenizer, body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    prompts = []
    for number, one in enumerate(several):
        ids = tokenizer.encode(one) if isinstance(one, str) else list(one)
        if not ids and served.model.start_id is not None:
            ids = [served.model.start_id]  # the beginning of a text
        if not ids:
            raise ApiError(400, f"prompt {number + 1} is empty", param="prompt")
        bad = next((i for i in ids if i >= served.model.module.config.vocab), None)
        if bad is not None:
            raise ApiError(400, f"token id {bad} is not in the vocabulary of {served.id}", param="prompt")
        text = one if isinstance(one, str) else tokenizer.decode(ids, skip_special_tokens=False)
        prompts.append(_Prompt(ids, text))
    return prompts


async def _read_continuation(call: Call, answer: Answer) -> _Continuation:
    found = _Continuation()
    async with aclosing(pieces(call, answer)) as coming:
        async for piece in coming:
            found.text += text_of(piece)
            found.tokens += piece.tokens
            found.finish_reason = piece.finish_reason or found.finish_reason
    return found


def _choice(
    number: int, prompt: _Prompt, found: _Continuation, body: CompletionRequest, served: Served
) -> dict[str, Any]:
    text, logprobs = found.text, None
    if body.echo:
        text = prompt.text + text
    if body.logprobs is not None:
        scored = _scored(found.tokens)
        logprobs = _logprobs(prompt.scores + scored if body.echo else scored, served)
    return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": found.finish_reason}


def _scored(tokens: Sequence[Token]) -> list[PromptToken]:
    return [PromptToken(token.id, token.logprob, token.top_logprobs or []) for token in tokens]


def _logprobs(tokens: Sequence[PromptToken], served: Served, offset: int = 0) -> dict[str, Any]:
    tokenizer = served.model.tokenizer
    offsets = []
    decoder = tokenizer.stream(skip_special_tokens=False)
    for token in tokens:
        offsets.append(offset)
        offset += len(decoder.push(token.id))
    return {
        "tokens": [token_name(token.id, tokenizer) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            None if token.logprob is None else named_logprobs(_with_own(token), tokenizer) for token in tokens
        ],
        "text_offset": offsets,
    }


def _with_own(token: PromptToken) -> list[tuple[int, float]]:
    # As OpenAI does: the token itself stands among the likeliest, so there may be one more than was asked for.
    assert token.logprob is not None
    own = [] if any(i == token.id for i, _ in token.top) else [(token.id, token.logprob)]
    return [(i, max(logprob, -9999.0)) for i, logprob in [*token.top, *own]]


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, -9999.0)


async def _events(
    call: Call,
    body: CompletionRequest,
    served: Served,
    prompts: Sequence[_Prompt],
    sampling: Mapping[str, Any],
    head: Mapping[str, Any],
) -> AsyncGenerator[bytes, None]:
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    tail: dict[str, Any] = {"usage": None} if with_usage else {}
    n = body.n or 1
    async with running(call, served, [prompt.ids for prompt in prompts], sampling) as answers:
        begun = False
        ends = [0] * len(answers)  # characters of each choice that were sent
        async with aclosing(merged(call, answers)) as coming:
            async for number, piece in coming:
                if body.echo and not begun:
                    for i in range(len(answers)):
                        prompt = prompts[i // n]
                        echoed = _logprobs(prompt.scores, served) if body.logprobs is not None else None
                        choice = {"index": i, "text": prompt.text, "logprobs": echoed, "finish_reason": None}
                        ends[i] = len(prompt.text)
                        yield sse.data({**head, "choices": [choice], **tail})
                begun = True
                text, logprobs = text_of(piece), None
                if body.logprobs is not None and piece.tokens:
                    logprobs = _logprobs(_scored(piece.tokens), served, ends[number])
                ends[number] += len(text)
                if text or logprobs or piece.finish_reason:
                    choice = {"index": number, "text": text, "logprobs": logprobs}
                    choice["finish_reason"] = piece.finish_reason
                    yield sse.data({**head, "choices": [choice], **tail})
    if with_usage:
        yield sse.data({**head, "choices": [], "usage": usage(call)})
    yield sse.DONE
