"""What a person sees of a run: the estimate before it, a line while it goes on, what came of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.markup import escape

from craton.cli.flags import given
from craton.cli.terminal import print_json, size, stderr
from craton.config import Settings

if TYPE_CHECKING:
    from craton.store.runs import Run
    from craton.training.estimate import Estimate
    from craton.training.session import Hooks, Job, Result
    from craton.training.state import Progress

# Without a terminal, a line is printed so often.
LINE_SECONDS = 10.0
# A sample is generated at most so often, so that it costs little of the time.
SAMPLE_SECONDS = 60.0
SAMPLE_TOKENS = 24

AnySettings = TypeVar("AnySettings", bound=Settings)


def duration(seconds: float) -> str:
    """Seconds for people: "45 s", "3 min 20 s", "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole < 600 else f"{round(whole / 60)} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: float) -> str:
    """A count for people: "30.0M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


class Display:
    """An observer that draws on standard error: a bar on a terminal, lines elsewhere. quiet: nothing at all."""

    def __init__(self, job: Job, *, total: int, flops: float, peak: float, quiet: bool, prompt: str | None) -> None:
        self._job, self._flops, self._peak, self._quiet, self._prompt = job, flops, peak, quiet, prompt
        self._started, self._printed, self._sampled = time.monotonic(), time.monotonic(), time.monotonic()
        self._first_step: int | None = None
        self._smooth: float | None = None
        self._bar: Any
        self._task: Any
        self._bar, self._task = _bar(total) if not quiet and stderr.is_terminal else (None, None)

    def on_step(self, progress: Progress, steps: int, values: Mapping[str, float]) -> None:
        if self._first_step is None:
            self._first_step = progress.step - 1
        # Single steps of a small batch say little: an average over about the last ten.
        self._smooth = values["loss"] if self._smooth is None else 0.9 * self._smooth + 0.1 * values["loss"]
        rate = values["tokens"] / values["seconds"]
        share = rate * self._flops / self._peak
        left = (time.monotonic() - self._started) / (progress.step - self._first_step) * (steps - progress.step)
        line = f"loss {self._smooth:.4f} · {count(rate)} tokens/s"
        if 0 < values["trained_tokens"] < 0.95 * values["tokens"]:
            line += f" ({count(values['trained_tokens'] / values['seconds'])} trained)"
        line += f" · {share:.0%} of peak · gradient {values['gradient_norm']:.2g} · {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.step, line=line)
        elif not self._quiet and (time.monotonic() - self._printed > LINE_SECONDS or progress.step == steps):
            self._printed = time.monotonic()
            stderr.print(f"step {progress.step}/{steps} · {line}")
        if self._prompt is not None and time.monotonic() - self._sampled > SAMPLE_SECONDS:
            self._sample(progress)

    def on_evaluation(self, progress: Progress, values: Mapping[str, float]) -> None:
        self._print(f"step {progress.step} · {evaluation_line(values)}")

    def on_checkpoint(self, progress: Progress, path: Path) -> None:
        if self._bar is None and not self._quiet:
            stderr.print(f"[dim]step {progress.step} · checkpoint {path.name}[/]")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def _sample(self, progress: Progress) -> None:
        from craton.inference.preview import preview
        from craton.models import CausalLM

        model, tokenizer = self._job.trainer.model, self._job.tokenizer
        assert tokenizer is not None, "only a language model is given a prompt"
        if isinstance(model, CausalLM) and self._job.trainer.ranks.world == 1 and self._prompt:
            text = preview(model, tokenizer, tokenizer.encode(self._prompt), SAMPLE_TOKENS)
            self._print(f"step {progress.step} · [dim]{escape(self._prompt)}[/]{escape(' '.join(text.split()))}")
        self._sampled = time.monotonic()

    def _print(self, line: str) -> None:
        if not self._quiet:
            (self._bar.console if self._bar is not None else stderr).print(line)


def evaluation_line(values: Mapping[str, float]) -> str:
    """The numbers of an evaluation, for people."""
    parts = [f"held-out loss {values['loss']:.4f}"]
    if "bits_per_byte" in values:
        parts.append(f"{values['bits_per_byte']:.4f} bits per byte")
    if "correct" in values:
        parts.append(f"{values['correct']:.2%} right")
    parts += [f"{k} {v:.4g}" for k, v in values.items() if k not in ("loss", "bits_per_byte", "correct", "targets")]
    return " · ".join(parts)


def show_estimate(run: Run | None, job: Job, expected: Estimate) -> None:
    """What the run will take, before its first step."""
    from craton.training.optimisers import describe

    trainer = job.trainer
    trained = "all trained"
    if expected.trained_parameters < expected.parameters:
        share = expected.trained_parameters / expected.parameters
        trained = f"{count(expected.trained_parameters)} trained ({share:.2%})"
    low, high = expected.memory
    rows = [
        ("parameters", f"{count(expected.parameters)}, {trained}"),
        ("steps", f"{expected.steps} of {trainer.settings.batch} examples, {count(expected.tokens)} tokens in all"),
        ("arithmetic", f"{expected.flops:.2g} FLOPs; products run at {expected.peak / 1e12:.2f} TFLOP/s here"),
        ("memory", f"{size(int(low))} to {size(int(high))}"),
        ("time", f"{duration(expected.seconds[0])} to {duration(expected.seconds[1])}"),
        ("disk", f"{size(int(expected.disk))} for checkpoints and the result"),
    ]
    if run is not None:
        rows.insert(0, ("run", f"{run.id}  [dim]{escape(str(run.folder))}[/]"))
    for name, value in rows:
        stderr.print(f"  [bold]{name:<11}[/] {value}")
    groups = describe(trainer.optimisers.groups)
    for decision in (*job.decisions, f"weight decay by group: {groups}"):
        stderr.print(f"  [dim]· {escape(decision)}[/]")


@contextmanager
def followed(json: bool, prompt: str | None = None) -> Iterator[Hooks]:
    """Hooks that show a run as it goes on; nothing but errors if `json` is asked for. On an interrupt, how to go on."""
    from craton.training.flops import token_flops
    from craton.training.session import Hooks

    hooks = Hooks()
    state: dict[str, Any] = {}

    def on_ready(run: Run | None, job: Job, expected: Estimate) -> None:
        state["run"] = run
        if run is None:
            if json:
                print_json(expected.as_dict() | {"decisions": job.decisions})
            else:
                show_estimate(None, job, expected)
            return
        if not json:
            show_estimate(run, job, expected)
        flops = token_flops(job.trainer.model, job.length).training
        display = Display(job, total=job.trainer.steps, flops=flops, peak=expected.peak, quiet=json, prompt=prompt)
        state["display"] = display
        job.trainer.observers.append(display)

    def on_progress(doing: str) -> None:
        if not json:
            stderr.print(f"[dim]{escape(doing)} ...[/]")

    hooks.on_ready, hooks.on_progress = on_ready, on_progress
    if int(os.environ.get("RANK", "0")) > 0:
        hooks.on_progress = lambda doing: None
    try:
        yield hooks
    except KeyboardInterrupt:
        _close(state)
        run = state.get("run")
        if run is not None:
            stderr.print(f"stopped; nothing of what was learnt is lost. Go on with: craton runs resume {run.id}")
        raise
    finally:
        _close(state)


def trained(start: Callable[[Hooks], Result | None], json: bool) -> None:
    """Train, or go on, while a person or a script follows it, and say what came of it; a dry run has no result."""
    with followed(json) as hooks:
        result = start(hooks)
    if result is not None:
        show_result(result, json)


def with_recipe(
    kind: type[AnySettings], usual: tuple[str, Mapping[str, Any]], recipe: Path | None, flags: Any
) -> tuple[AnySettings, dict[str, str]]:
    """Settings and where each comes from: what is usual (its name and values), a recipe over it, flags over both."""
    from craton.config.resolve import FLAGS, read_toml, resolve

    layers: list[tuple[str, Mapping[str, Any]]] = [usual]
    if recipe is not None:
        layers.append((str(recipe), read_toml(recipe)))
    return resolve(kind, [*layers, (FLAGS, given(flags))])


def show_result(result: Result, json: bool) -> None:
    """What came of a run."""
    if result.model is None:
        return
    if json:
        print_json(
            {
                "run": result.run.id,
                "model": result.model.id,
                "path": str(result.model.path),
                "steps": result.outcome.progress.step,
                "tokens": result.outcome.progress.tokens,
                "seconds": round(result.outcome.progress.seconds, 3),
                "loss": result.outcome.loss,
                "evaluation": result.outcome.evaluation,
            }
        )
        return
    progress = result.outcome.progress
    stderr.print(
        f"[bold green]done[/] {progress.step} steps, {count(progress.tokens)} tokens in {duration(progress.seconds)}"
    )
    if result.outcome.evaluation:
        stderr.print(f"  [bold]measured[/]    {evaluation_line(result.outcome.evaluation)}")
    stderr.print(f"  [bold]model[/]       {escape(result.model.id)}  [dim]{escape(str(result.model.path))}[/]")
    stderr.print(f"  [bold]look at it[/]  craton runs show {result.run.id}")


def _close(state: dict[str, Any]) -> None:
    display: Display | None = state.get("display")
    if display is not None:
        display.close()


def _bar(total: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=20), TextColumn("{task.fields[line]}"))
    bar = Progress(*columns, console=stderr, transient=True)
    bar.start()
    return bar, bar.add_task("training", total=total, line="")
