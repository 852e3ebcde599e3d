"""A load generator for any OpenAI-compatible server, which times what users feel: prompts arrive as a Poisson process,
or each of so many clients sends its next one when it has its answer.

HTTP/1.1 is spoken here by hand, so that the measuring costs next to nothing and needs no package.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from craton.errors import UsageError


@dataclass
class Sample:
    """One request. Times in seconds; error: None where the stream ended as it should."""

    started: float
    first_token: float | None = None
    between: list[float] = field(default_factory=list)
    ended: float = 0.0
    pieces: int = 0
    tokens: int | None = None
    prompt_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Load:
    """What to send. rate: arrivals a second (0: as soon as a client is free). clients: at most so many at once (0: no
    bound). max_tokens: answers' longest lengths, taken in turn as the prompts are. system: stands before every prompt.
    temperature: none: the server's own."""

    prompts: Sequence[str]
    model: str
    requests: int = 100
    rate: float = 2.0
    clients: int = 0
    max_tokens: Sequence[int] = (64,)
    seed: int = 0
    timeout: float = 600.0
    system: str | None = None
    temperature: float | None = None

    def body(self, number: int) -> dict[str, Any]:
        """The request of this number."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": self.prompts[number % len(self.prompts)]}],
            "max_tokens": self.max_tokens[number % len(self.max_tokens)],
            "seed": number,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({} if self.temperature is None else {"temperature": self.temperature})


async def run_load(url: str, load: Load, key: str | None = None) -> dict[str, Any]:
    """Send the load; gives throughput, times to the first token and between tokens, and errors."""
    draw = random.Random(load.seed)
    bound = asyncio.Semaphore(load.clients or load.requests)
    started = time.perf_counter()

    async def one(number: int, due: float) -> Sample:
        await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        # A request's time begins when it is due: waiting for a client's turn is waiting. Where none is due at a time,
        # it begins when a client sends it.
        sample = Sample(time.perf_counter())
        async with bound:
            if not load.rate:
                sample.started = time.perf_counter()
            try:
                async with asyncio.timeout(load.timeout):
                    await _ask(url, load.body(number), key, sample)
            except (OSError, TimeoutError, ValueError, EOFError) as error:
                sample.error = f"{type(error).__name__}: {error}"[:200]
        sample.ended = time.perf_counter()
        return sample

    due, arrivals = 0.0, []
    for _ in range(load.requests):
        arrivals.append(due)
        due += draw.expovariate(load.rate) if load.rate else 0.0
    samples = await asyncio.gather(*(one(number, at) for number, at in enumerate(arrivals)))
    return summary(samples, time.perf_counter() - started)


def summary(samples: Sequence[Sample], seconds: float) -> dict[str, Any]:
    """The report of a run."""
    good = [sample for sample in samples if sample.error is None]
    tokens = sum(sample.tokens if sample.tokens is not None else sample.pieces for sample in good)
    between = [gap for sample in good for gap in sample.between]
    return {
        "requests": len(samples),
        "errors": len(samples) - len(good),
        "error_kinds": dict(Counter(sample.error for sample in samples if sample.error is not None).most_common(5)),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "completion_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "first_token_seconds": _percentiles([s.first_token for s in good if s.first_token is not None]),
        "between_tokens_seconds": _percentiles(between),
        "request_seconds": _percentiles([sample.ended - sample.started for sample in good]),
    }


async def served_models(url: str, key: str | None = None) -> list[str]:
    """The names that a server lists. Raises UsageError where none answers."""
    try:
        async with asyncio.timeout(10), aclosing(_lines(url, "GET", "/v1/models", None, key)) as lines:
            text = "".join([line async for line in lines])
        return [str(entry["id"]) for entry in json.loads(text)["data"]]
    except (OSError, TimeoutError, ValueError, EOFError, KeyError, TypeError) as error:
        raise UsageError(
            f"no OpenAI-compatible server answers: {error or type(error).__name__}",
            where=url,
            remedy="start one: craton serve",
        ) from None


def _percentiles(values: list[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    ranks = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    # The smallest value that so much of the sample does not exceed.
    return {
        name: round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4) if ordered else None
        for name, share in ranks.items()
    }


async def _ask(url: str, body: dict[str, Any], key: str | None, sample: Sample) -> None:
    last, complete = 0.0, False
    async with aclosing(_lines(url, "POST", "/v1/chat/completions", body, key)) as lines:
        async for line in lines:
            if not line.startswith("data:"):
                continue
            data = line[5:].strip()
            if data == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ValueError(str(event["error"].get("message")))
            if usage := event.get("usage"):
                sample.tokens, sample.prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
            choices = event.get("choices", ())
            complete = complete or any(choice.get("finish_reason") for choice in choices)
            if any(_says(choice) for choice in choices):
                now = time.perf_counter()
                if sample.first_token is None:
                    sample.first_token = now - sample.started
                else:
                    sample.between.append(now - last)
                last = now
                sample.pieces += 1
    if not complete:  # some servers send no [DONE]
        raise EOFError("the stream ended before its answer did")


def _says(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta", {})
    return bool(delta.get("content") or delta.get("reasoning_content") or delta.get("tool_calls"))


async def _lines(
    url: str, method: str, path: str, body: dict[str, Any] | None, key: str | None
) -> AsyncGenerator[str, None]:
    """The lines of a response's body as they come. Raises ValueError for another status than 200."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise ValueError(f"{url!r} is no http address")
    port = parts.port or (443 if secure else 80)
    context = ssl.create_default_context() if secure else None
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=context, limit=1 << 20)
    try:
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {parts.path.rstrip('/').removesuffix('/v1')}{path} HTTP/1.1", f"Host: {parts.netloc}"]
        head += ["Content-Type: application/json", f"Content-Length: {len(data)}", "Connection: close"]
        head += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + data)
        await writer.drain()
        status = (await reader.readline()).split()
        headers = {}
        while (line := (await reader.readline()).decode("latin-1").strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        if status[1:2] != [b"200"]:
            code = status[1].decode() if len(status) > 1 else "no status"
            raise ValueError(f"HTTP {code}")
        held = b""
        async with aclosing(_chunks(reader) if chunked else _rest(reader)) as chunks:
            async for chunk in chunks:
                *whole, held = (held + chunk).split(b"\n")
                for one in whole:
                    yield one.decode()
        if held:
            yield held.decode()
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _rest(reader: asyncio.StreamReader) -> AsyncGenerator[bytes, None]:
    while data := await reader.read(1 << 16):
        yield data
