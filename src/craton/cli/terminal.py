"""What all verbs print with: one console for people on standard error, plain text or JSON on standard output."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

if TYPE_CHECKING:
    from craton.inference.model import Completion, Model


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


def load_model(name: str, *, dtype: str, threads: int | None, quiet: bool = False) -> Model:
    """Load a model and say on standard error what was decided."""
    from craton.inference.model import load

    model = load(name, dtype=dtype, threads=threads)  # type: ignore[arg-type]
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
