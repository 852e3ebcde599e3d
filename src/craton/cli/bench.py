"""`craton bench`: measure what runs."""

from __future__ import annotations

import json as json_format
import os
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from craton.cli.options import Json
from craton.cli.terminal import print_json, stderr, stdout
from craton.errors import UsageError

# Of everyday lengths, for a server that is tried without prompts of one's own.
PROMPTS = (
    "What is the capital of France?",
    "Explain in three sentences why the sky is blue.",
    "Write a polite e-mail that declines an invitation to a conference next month.",
    "Summarise the plot of Hamlet for a twelve-year-old.",
    "یک شعر کوتاه درباره باران بنویس.",
    "Give me a Python function that removes duplicates from a list and keeps their order, with a docstring.",
    "Translate into German: The meeting was moved to Thursday because the room was taken.",
    "List five questions to ask before renting a flat, and say of each why it matters.",
)

bench = App(name="bench", help="Measure servers under load.")


@bench.command
def serve(
    url: Annotated[str, Parameter(help="a server's address, such as http://127.0.0.1:8000")] = "http://127.0.0.1:8000",
    /,
    *,
    model: Annotated[str | None, Parameter(name=["--model", "-m"], help="default: the first that it lists")] = None,
    prompts: Annotated[
        Path | None,
        Parameter(help='a file of prompts: one a line, or JSON lines with "prompt"; default: eight of ours'),
    ] = None,
    requests: Annotated[int, Parameter(help="how many requests")] = 100,
    rate: Annotated[float, Parameter(help="arrivals a second, a Poisson process (0: when a client is free)")] = 2.0,
    clients: Annotated[int, Parameter(help="at most so many requests at once (0: no bound)")] = 0,
    max_tokens: Annotated[int, Parameter(help="longest answer")] = 64,
    seed: Annotated[int, Parameter(help="of the arrivals")] = 0,
    key_env: Annotated[str, Parameter(help="the environment variable that holds the API key")] = "OPENAI_API_KEY",
    json: Json = False,
) -> None:
    """Send prompts to an OpenAI-compatible server as users would, and report throughput, time to the first token, time
    between tokens (p50, p95, p99) and errors. Exit code 1 if any request failed."""
    import asyncio

    from craton.serving.load import Load, run_load, served_models

    if requests < 1 or rate < 0 or clients < 0 or max_tokens < 1:
        raise UsageError("requests and max-tokens are at least 1, rate and clients at least 0")
    key = os.environ.get(key_env)
    name = model or next(iter(asyncio.run(served_models(url, key))), None)
    if name is None:
        raise UsageError("the server lists no model", where=url, remedy="name one with --model")
    load = Load(_read(prompts) if prompts else PROMPTS, name, requests, rate, clients, (max_tokens,), seed)
    if not json:
        stderr.print(f"[dim]{requests} requests to {stderr.escape(name)}, {rate:g} a second[/]")
    found = {"url": url, "model": name, "rate": rate, "clients": clients} | asyncio.run(run_load(url, load, key))
    if json:
        print_json(found)
    else:
        _show(found)
    if found["errors"]:
        raise SystemExit(1)


def _read(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the prompts cannot be read: {error}", where=str(path)) from None
    found = [_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if not found:
        raise UsageError("there are no prompts", where=str(path))
    return found


def _prompt(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        return str(json_format.loads(line)["prompt"])
    except (ValueError, KeyError, RecursionError):
        raise UsageError('a JSON line needs "prompt"', where=where) from None


def _show(found: dict[str, object]) -> None:
    stdout.print(f"{found['requests']} requests, {found['errors']} errors, {found['seconds']} s")
    stdout.print(f"throughput      {found['tokens_per_second']} tokens/s, {found['requests_per_second']} requests/s")
    for label, name in (("first token", "first_token"), ("between tokens", "between_tokens"), ("request", "request")):
        times = found[f"{name}_seconds"]
        assert isinstance(times, dict)
        cells = [f"{rank} {value * 1000:.0f} ms" for rank, value in times.items() if value is not None]
        stdout.print(f"{label:<15} {'   '.join(cells) or 'none'}")
    kinds = found["error_kinds"]
    assert isinstance(kinds, dict)
    for kind, count in kinds.items():
        stderr.print(f"  [red]{count} x[/] {stderr.escape(kind)}")
