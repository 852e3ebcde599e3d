"""`craton generate`: continue a text, or a batch of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from cyclopts import Parameter

from craton.cli.options import (
    DEFAULT_CHAT_MODEL,
    DEFAULT_SAMPLING,
    KV,
    Activations,
    DType,
    Json,
    Sampling,
    Sinks,
    Speculate,
    StreamWindow,
    Threads,
)
from craton.cli.terminal import completion_json, load_model, print_json, speed_line, stderr, write
from craton.errors import UsageError
from craton.inference.settings import SamplingSettings


def generate(
    prompt: Annotated[str | None, Parameter(help="the text to continue; without it, standard input")] = None,
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")] = DEFAULT_CHAT_MODEL,
    jsonl: Annotated[
        bool,
        Parameter(
            negative="",
            help='read JSON lines {"prompt": ...} or {"messages": [...]}, with sampling settings where they differ, '
            "from standard input and write one JSON line for each, in the same order",
        ),
    ] = False,
    sampling: Sampling = DEFAULT_SAMPLING,
    dtype: DType = "auto",
    threads: Threads = None,
    activations: Activations = "auto",
    speculate: Speculate = "ngram",
    kv: KV = "auto",
    stream_window: StreamWindow = None,
    sinks: Sinks = 4,
    json: Json = False,
) -> None:
    """Continue a text. The text goes to standard output, notes go to standard error."""
    checked = sampling.settings()
    engine = {
        "activations": activations,
        "speculate": speculate,
        "kv": kv,
        "stream_window": stream_window,
        "sinks": sinks,
    }
    if jsonl:
        if prompt is not None:
            raise UsageError("--jsonl reads prompts from standard input", remedy="leave the prompt out")
        _batch(model, checked, dtype, threads, engine)
        return
    settings = checked.model_dump()
    text = sys.stdin.read() if prompt is None else prompt
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json, **engine)
    if json or checked.n > 1:
        completion = loaded.generate(text, **settings)
        if json:
            print_json(completion_json(completion, loaded.name))
            return
        for number, choice in enumerate(completion.choices, 1):
            stderr.print(f"[dim]answer {number}, seed {choice.seed}[/]")
            write(choice.text + "\n")
    else:
        stream = loaded.generate(text, stream=True, **settings)
        for piece in stream:
            write(piece)
        write("\n")
        completion = stream.completion
    stderr.print(f"[dim]{speed_line(completion)}[/]")


def _batch(model: str, sampling: SamplingSettings, dtype: str, threads: int | None, engine: Mapping[str, Any]) -> None:
    from craton.config import parse

    requests: list[tuple[int, dict[str, Any], SamplingSettings]] = []
    for number, row in _rows():
        where = f"standard input, line {number}"
        content: dict[str, Any] = {key: row.pop(key) for key in ("prompt", "messages") if key in row}
        if len(content) != 1:
            raise UsageError('a line needs either "prompt" or "messages"', where=where)
        settings = parse(SamplingSettings, {**sampling.model_dump(), **row}, where=where)
        requests.append((number, content, settings))
    # Every line has been checked before the model is loaded and the first answer is paid for.
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=True, **engine)
    prompts = [
        (loaded.render(content["messages"]) if "messages" in content else content["prompt"], settings)
        for _, content, settings in requests
    ]
    for completion in loaded.generate_many(prompts):
        print_json(completion_json(completion, loaded.name))


def _rows() -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(sys.stdin, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"not JSON: {error}", where=f"standard input, line {number}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt", ""), str):
            raise UsageError(
                'a line must be an object with a "prompt" text or "messages"', where=f"standard input, line {number}"
            )
        yield number, row
