"""What all verbs print with: one console for people on standard error, plain text or JSON on standard output."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from craton.inference.images import ImageModel
    from craton.inference.model import Completion, Model


# Without a terminal, what is being done is said so often.
STATUS_SECONDS = 5.0


class _Stderr(Console):
    """Notes and errors; soft-wrapped so that a path or a command can be copied in one piece."""

    escape = staticmethod(escape)

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*objects, **{"soft_wrap": True, "highlight": False, **options})


stderr = _Stderr(stderr=True)
stdout = Console(highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output, in one line."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def write(text: str) -> None:
    """A piece of streamed text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def load_talker(name: str, *, dtype: str, threads: int | None, **engine: Any) -> Model:
    """Load what can be chatted with, a model, an adapter or an application, and say what was decided. engine: fields of
    `EngineSettings`; an application has its own."""
    from craton.compare.application import is_application, open_application

    if not is_application(name):
        return load_model(name, dtype=dtype, threads=threads, **engine)
    application = open_application(name, dtype=dtype, threads=threads)  # type: ignore[arg-type]
    facts = application.settings
    said = f"{name} · {facts.way} on {facts.adapter or facts.model}, found best for {facts.task}: {facts.measured}"
    stderr.print(f"[dim]{escape(said)}[/]")
    return application  # type: ignore[return-value]


def load_model(name: str, *, dtype: str, threads: int | None, quiet: bool = False, **engine: Any) -> Model:
    """Load a model and say on standard error what was decided. engine: fields of `EngineSettings`."""
    from craton.finetuning.loading import load

    model = load(name, dtype=dtype, threads=threads, **engine)  # type: ignore[arg-type]
    if not quiet:
        stderr.print(f"[dim]{escape(model.name)} · " + escape(" · ".join(model.plan.decisions)) + "[/]")
    return model


def load_seeing(name: str, *, dtype: str, threads: int | None, quiet: bool = False) -> ImageModel:
    """Load a model of pictures and say on standard error what was decided."""
    from craton.finetuning.loading import load_images

    model = load_images(name, dtype=dtype, threads=threads)  # type: ignore[arg-type]
    if not quiet:
        stderr.print(f"[dim]{escape(model.name)} · " + escape(" · ".join(model.plan.decisions)) + "[/]")
    return model


def speed_line(completion: Completion) -> str:
    """Tokens, rates and times of an answer, for people."""
    parts = [f"{completion.completion_tokens} tokens"]
    if completion.tokens_per_second:
        parts.append(f"{completion.tokens_per_second:.1f} tokens/s")
    parts.append(f"first token after {completion.first_token_seconds:.2f} s")
    cached = f", {completion.cached_tokens} of them cached" if completion.cached_tokens else ""
    parts.append(f"prompt {completion.prompt_tokens} tokens{cached}")
    if completion.drafted_tokens:
        parts.append(f"{completion.accepted_tokens} of {completion.drafted_tokens} guesses right")
    return " · ".join(parts)


def completion_json(completion: Completion, model: str) -> dict[str, Any]:
    """The JSON form of a completion."""
    choices = []
    for choice in completion.choices:
        value: dict[str, Any] = {"text": choice.text, "finish_reason": choice.finish_reason, "seed": choice.seed}
        if choice.tokens and choice.tokens[0].logprob is not None:
            value["logprobs"] = [
                {"id": t.id, "text": t.text, "logprob": t.logprob, "top": t.top_logprobs} for t in choice.tokens
            ]
        choices.append(value)
    return {
        "model": model,
        "choices": choices,
        "usage": {
            "prompt_tokens": completion.prompt_tokens,
            "cached_tokens": completion.cached_tokens,
            "completion_tokens": completion.completion_tokens,
            "drafted_tokens": completion.drafted_tokens,
            "accepted_tokens": completion.accepted_tokens,
        },
        "first_token_seconds": round(completion.first_token_seconds, 4),
        "seconds": round(completion.seconds, 4),
        "tokens_per_second": round(completion.tokens_per_second, 2),
    }


def size(nbytes: int) -> str:
    """Bytes for people, in decimal units."""
    value, units = float(nbytes), ["TB", "GB", "MB", "kB", "B"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop()
    return f"{value:.3g} {units[-1]}"


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar with rate and time left on standard error; gives a callback (stage, bytes done, bytes in all)."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(escape(stage), total=None)
            bar.update(tasks[stage], completed=done, total=total or None)

        yield report


@contextmanager
def status(*, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """One line on standard error that says what is being done: replaced in place on a terminal, else a line every few
    seconds. quiet: nothing at all."""
    if quiet:
        yield lambda doing: None
    elif stderr.is_terminal:
        with stderr.status("") as line:
            yield lambda doing: line.update(f"[dim]{escape(doing)}[/]")
    else:
        told = [-STATUS_SECONDS]

        def say(doing: str) -> None:
            if time.monotonic() - told[0] >= STATUS_SECONDS:
                told[0] = time.monotonic()
                stderr.print(f"[dim]{escape(doing)}[/]")

        yield say
