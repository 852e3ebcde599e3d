"""`craton prompt`: prompt files, run, improved and kept."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter
from rich.markup import escape

from craton.cli.flags import Flags, given
from craton.cli.options import DEFAULT_CHAT_MODEL, DEFAULT_EMBED_MODEL, DType, Json, Threads
from craton.cli.terminal import load_model, print_json, status, stderr, stdout
from craton.errors import UsageError
from craton.prompting.settings import OptimizeSettings

if TYPE_CHECKING:
    from craton.prompting.prompt import Prompt

ModelName = Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")]
EncoderName = Annotated[str, Parameter(help="the model that examples are compared by")]

prompt = App(name="prompt", help="Run prompt files, search for better ones, keep them in the store.")


@prompt.command
def run(
    prompt: Annotated[str, Parameter(help="a .toml or .md file, or a stored prompt's name")],
    /,
    *inputs: Annotated[str, Parameter(help="texts; without any, JSON lines of variables from standard input")],
    model: ModelName = DEFAULT_CHAT_MODEL,
    examples: Annotated[Path | None, Parameter(help="a data file that the prompt's examples are chosen from")] = None,
    encoder: EncoderName = DEFAULT_EMBED_MODEL,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Answer inputs by a prompt, one line for each."""
    from craton.evaluation.items import Item
    from craton.evaluation.tasks import read_items
    from craton.prompting.answering import PromptedModel
    from craton.prompting.examples import ExamplePool
    from craton.prompting.stored import load_prompt
    from craton.retrieval.index import Encoder

    loaded_prompt = load_prompt(prompt)
    pool = ExamplePool(read_items(examples), Encoder(encoder, threads)) if examples else None
    asked = [{"input": text} for text in inputs] if inputs else list(_variables())
    if not asked:
        raise UsageError("there is no input", remedy='name texts, or send JSON lines: {"input": "..."}')
    answers = sorted({item.answers[0] for item in pool.items}) if pool else []
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
    prompted = PromptedModel(
        loaded, loaded_prompt, choices=answers if loaded_prompt.answer.scoring != "generate" else (), pool=pool
    )
    for number, values in enumerate(asked, 1):
        fields = {key: value if isinstance(value, str) else json_module.dumps(value) for key, value in values.items()}
        answer = prompted(Item(f"input {number}", fields.get("input", ""), ("",), "", fields=fields))
        if json:
            print_json(vars(answer) | {"variables": values})
        else:
            stdout.print(answer.text, markup=False, soft_wrap=True)


@prompt.command
def optimize(
    task: Annotated[str, Parameter(help="a task file or a data file")],
    /,
    *,
    prompt: Annotated[
        str | None, Parameter(help="where to begin: a file or a stored prompt (none: by the task)")
    ] = None,
    model: ModelName = DEFAULT_CHAT_MODEL,
    encoder: EncoderName = DEFAULT_EMBED_MODEL,
    name: Annotated[str | None, Parameter(help="keep the best prompt in the store under this name")] = None,
    out: Annotated[Path | None, Parameter(help="write the best prompt to this new .toml file")] = None,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
    settings: Flags[OptimizeSettings] | None = None,
) -> None:
    """Search instructions, examples and scoring on the development items of a task, and report on its test items,
    which the search never sees."""
    from craton.checkpoints.disk import replace_file
    from craton.compare.study import find_task
    from craton.config.resolve import FLAGS, resolve
    from craton.evaluation.paired import paired_difference
    from craton.evaluation.runner import evaluate, summary
    from craton.prompting.answering import PromptedModel
    from craton.prompting.defaults import default_prompt
    from craton.prompting.examples import ExamplePool
    from craton.prompting.optimize import optimize_prompt
    from craton.prompting.prompt import prompt_toml
    from craton.prompting.stored import load_prompt, save_prompt
    from craton.retrieval.index import Encoder
    from craton.store.artifacts import check_model_name

    if name is not None:
        check_model_name(name)
    if out is not None and (out.exists() or out.suffix != ".toml"):
        raise UsageError(f"{out} exists already or is no .toml file", remedy="choose another name")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}", where="--out", remedy="make it first, or name another one")
    chosen, _ = resolve(OptimizeSettings, [(FLAGS, given(settings))])
    loaded_task = find_task(task)
    base = load_prompt(prompt) if prompt else default_prompt(loaded_task.kind, loaded_task.instruction)
    loaded = load_model(model, dtype=dtype, threads=threads, quiet=json)
    embed = Encoder(encoder, threads)
    with status(quiet=json) as say:
        search = optimize_prompt(loaded, loaded_task, base, chosen, embed=embed, on_progress=say)
        items = loaded_task.test.open()
        pool = ExamplePool(loaded_task.train, embed)
        rows = {}
        for label, one in (("before", base), ("after", search.best.candidate)):
            answerer = PromptedModel(loaded, one, choices=loaded_task.choices, pool=pool)
            say(f"testing the prompt {label}")
            rows[label] = evaluate(items, answerer, loaded_task.metric)
    before, after = (summary(rows[label], loaded_task.metric)[loaded_task.metric] for label in ("before", "after"))
    gain = paired_difference(
        [r.score for r in rows["before"]],
        [r.score for r in rows["after"]],
        [r.group for r in rows["after"]],
        score=True,
    )
    best = search.best.candidate
    made = save_prompt(best, name, file=Path(task).name) if name is not None else None
    if out is not None:
        replace_file(out, prompt_toml(best).encode())
    if json:
        print_json(
            {
                "prompt": best.model_dump(mode="json"),
                "digest": best.digest,
                "before": before.as_dict(),
                "after": after.as_dict(),
                "gain": gain.as_dict(),
                "tokens": search.tokens,
                "stopped": search.stopped,
                "trials": [
                    {"score": t.score, "items": len(t.rows), "prompt": t.candidate.model_dump(mode="json")}
                    for t in search.trials
                ],
                "stored": made.id if made else None,
            }
        )
        return
    _tell_search(search, best)
    stdout.print(
        f"test {loaded_task.metric}: {before.value:.1%} before, {after.value:.1%} after "
        f"({gain.value:+.1%}, 95 %: {gain.low:+.1%} to {gain.high:+.1%}; {len(items)} items)"
    )
    if gain.low <= 0:
        stdout.print("[yellow]no detectable gain[/]: keep the simpler prompt")
    if made is not None:
        stderr.print(f"stored as [bold]{escape(made.id)}[/]")


@prompt.command
def save(
    file: Annotated[Path, Parameter(help="a .toml or .md file")],
    /,
    *,
    name: Annotated[str, Parameter(help="the name in the store")],
    json: Json = False,
) -> None:
    """Keep a prompt file in the store, as the next version of a name."""
    from craton.prompting.prompt import read_prompt
    from craton.prompting.stored import save_prompt

    made = save_prompt(read_prompt(file), name, file=file.name)
    if json:
        print_json({"id": made.id, "path": str(made.path)})
        return
    stderr.print(f"stored as [bold]{escape(made.id)}[/]")


@prompt.command
def show(
    prompt: Annotated[str, Parameter(help="a .toml or .md file, or a stored prompt's name")], /, *, json: Json = False
) -> None:
    """Show a prompt as TOML: everything that differs from the defaults."""
    from craton.prompting.prompt import prompt_toml
    from craton.prompting.stored import load_prompt

    loaded = load_prompt(prompt)
    if json:
        print_json(loaded.model_dump(mode="json") | {"digest": loaded.digest, "variables": sorted(loaded.variables)})
        return
    stdout.print(prompt_toml(loaded), markup=False, soft_wrap=True, end="")


def _variables() -> Iterator[dict[str, Any]]:
    for number, line in enumerate(sys.stdin, 1):
        if line.strip():
            try:
                value = json_module.loads(line)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"not JSON: {error}", where=f"standard input, line {number}") from None
            if not isinstance(value, dict):
                raise UsageError("a line must be an object of variables", where=f"standard input, line {number}")
            yield value


def _tell_search(search: Any, best: Prompt) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("dev score", "items", "form", "examples", "scoring", "instruction"):
        table.add_column(column, overflow="fold")
    for trial in search.trials:
        one = trial.candidate
        shown = f"{one.examples.count} {one.examples.choose}" if one.examples.count else "none"
        style = "bold green" if one is best else ""
        cells = [
            f"{trial.score:.1%}",
            str(len(trial.rows)),
            one.form,
            shown,
            one.answer.scoring,
            escape(one.system or ""),
        ]
        table.add_row(*cells, style=style)
    stdout.print(table)
    ended = "" if search.stopped == "done" else f", stopped by the budget of {search.stopped}"
    stdout.print(f"[dim]{search.tokens:,} tokens in {search.seconds:.0f} s{ended}[/]")
