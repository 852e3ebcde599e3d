"""`craton data`: look at data before a run, and prepare it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from typing import TYPE_CHECKING, Annotated, Final, Literal

from cyclopts import App, Parameter
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from craton.cli.options import Json
from craton.cli.terminal import print_json, stderr, stdout
from craton.cli.token_view import LEGEND, TRAINED, harmless, isolated, paint

if TYPE_CHECKING:
    from craton.data.chat_pictures import ChatPictures
    from craton.data.inspection import Inspection, Sample
    from craton.data.records import Reading
    from craton.data.rendering import RenderSettings
    from craton.modalities.text import Tokenizer

Task = Literal["pretrain", "sft", "classify", "embed", "dpo", "orpo", "kto"]

SHOWN_CHARACTERS: Final = 600  # of each value, where there are no tokens to show
SHOWN_LABELS: Final = 8
LEAST_SHARE: Final = 0.0005  # of the letters, for a script to be named

data = App(name="data", help="Look at data before a run, and prepare it.")
data.command("craton.cli.data_prepare:prepare", name="prepare", help="Write data as tokenised shards.")


@data.command
def inspect(
    *sources: Annotated[str, Parameter(help="files, folders, patterns, or hf:org/name[:split]")],
    model: Annotated[str | None, Parameter(name=["--model", "-m"], help="show the tokens of this model")] = None,
    task: Annotated[Task | None, Parameter(help="what the data is for; records of another schema are refused")] = None,
    samples: Annotated[int, Parameter(name=["--samples", "-n"], help="records to show")] = 3,
    max_tokens: Annotated[int | None, Parameter(help="the longest sequence (default: the model's context)")] = None,
    overlong: Annotated[
        Literal["drop", "truncate", "split"], Parameter(help="what becomes of longer sequences; each case is counted")
    ] = "drop",
    template: Annotated[
        bool, Parameter(negative="", help="put prompt and completion into the model's chat template")
    ] = False,
    text_key: Annotated[str | None, Parameter(help="the key that holds the text, if it is not `text`")] = None,
    label_key: Annotated[str | None, Parameter(help="the key that holds the label, if it is not `label`")] = None,
    lines: Annotated[bool, Parameter(negative="", help="text files hold one document a line")] = False,
    json: Json = False,
) -> None:
    """Show real samples with the tokens that are trained, then lengths, duplicates, scripts and what was decided.

    Exit code 1 if a record cannot be trained on: no trained token, two BOS, an end that is not trained.
    """
    from craton.config import parse
    from craton.data.inspection import inspect_records
    from craton.data.records import Reading, read_records
    from craton.data.rendering import RenderSettings
    from craton.data.schema import TASKS, KeySettings, check_schema
    from craton.errors import UsageError

    if not sources:
        raise UsageError("there is no data to look at", remedy="craton data inspect FILE")
    flags = {"max_tokens": max_tokens, "overlong": overlong, "template": template}
    settings = parse(RenderSettings, flags, where="the flags")
    tokenizer, pictures, settings, decision = _reader(model, settings)
    reading = Reading()
    checked = check_schema(
        read_records(sources, lines=lines, reading=reading),
        keys=KeySettings(text_key=text_key, label_key=label_key),
        expected=TASKS[task] if task else (),
    )
    with _counting() as report:
        found = inspect_records(
            checked, tokenizer=tokenizer, settings=settings, samples=samples, on_record=report, pictures=pictures
        )
    found.decisions += [decision] if decision else []
    if json:
        print_json({**found.as_dict(), "files": reading.files, "skipped": reading.skipped})
    else:
        _print(found, reading, settings)
    sys.exit(1 if found.problem_count else 0)


def _reader(
    model: str | None, settings: RenderSettings
) -> tuple[Tokenizer | None, ChatPictures | None, RenderSettings, str | None]:
    """The model's tokeniser, and how it is shown pictures, if it sees; its context is the longest sequence where none
    was given, which is a decision to print."""
    if model is None:
        return None, None, settings, None
    from craton import store
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.data.chat_pictures import ChatPictures
    from craton.models import ImageChatConfig

    checkpoint = Checkpoint.open(store.find(model).path)
    tokenizer, config = checkpoint.tokenizer(), checkpoint.config
    pictures = ChatPictures(config, tokenizer, checkpoint.folder) if isinstance(config, ImageChatConfig) else None
    if settings.max_tokens is not None:
        return tokenizer, pictures, settings, None
    context = checkpoint.text_config.context
    decision = f"sequences of at most {context} tokens, the model's context"
    return tokenizer, pictures, settings.model_copy(update={"max_tokens": context}), decision


@contextmanager
def _counting() -> Iterator[Callable[[int], None]]:
    """Records read so far and their rate, on standard error while they are read."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    began = time.monotonic()
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=stderr, transient=True
    ) as bar:
        task = bar.add_task("reading", total=None)

        def report(count: int) -> None:
            if count % 64 == 0:
                rate = count / max(time.monotonic() - began, 1e-3)
                bar.update(task, description=f"{count:,} records, {rate:,.0f}/s")

        yield report


def _print(found: Inspection, reading: Reading, settings: RenderSettings) -> None:
    colour = stdout.is_terminal and not stdout.no_color
    for sample in found.samples:
        _print_sample(sample, colour)
    if found.report is not None and found.samples:
        how = "trained: bold and green" if colour else f"trained: between {TRAINED[0]} and {TRAINED[1]}"
        stdout.print(f"{how} · {LEGEND}", style="dim", markup=False)
        stdout.print()
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in _facts(found, reading, settings):
        table.add_row(key, escape(value))
    stdout.print(table)
    for problem in found.problems:
        remedy = f" [dim]({escape(problem.remedy)})[/]" if problem.remedy else ""
        stderr.print(f"[red]{escape(problem.where or '')}: {escape(problem.what)}[/]{remedy}")
    if found.problem_count > len(found.problems):
        stderr.print(f"[red]and {found.problem_count - len(found.problems)} more[/]")


def _print_sample(sample: Sample, colour: bool) -> None:
    stdout.print(escape(sample.record.origin), style="bold", soft_wrap=True)
    for name, tokens in sample.sequences.items():
        if len(sample.sequences) > 1:
            stdout.print(f"[dim]{name}:[/]")
        stdout.print(paint(tokens, colour), soft_wrap=True)
    for key, value in {} if sample.sequences else sample.record.value.items():
        shown = value if isinstance(value, str) else dumps(value, ensure_ascii=False, default=str)
        cut = harmless(shown[:SHOWN_CHARACTERS]) + ("…" if len(shown) > SHOWN_CHARACTERS else "")
        stdout.print(Text.assemble((f"{key}: ", "dim"), isolated(cut)), soft_wrap=True)
    label = sample.record.value.get("label")
    if sample.sequences and label is not None:
        stdout.print(Text.assemble(("label: ", "dim"), isolated(harmless(str(label)))))
    stdout.print()


def _facts(found: Inspection, reading: Reading, settings: RenderSettings) -> Iterator[tuple[str, str]]:
    texts = found.texts
    skipped = ", ".join(f"{count} {why}" for why, count in reading.skipped.items())
    source = f" from {reading.files:,} file{'s' if reading.files > 1 else ''}" if reading.files else ""
    yield "schema", found.schema
    yield "records", f"{texts.texts:,}{source}" + (f" (skipped: {skipped})" if skipped else "")
    yield "duplicates", f"{texts.duplicates:,} ({texts.duplicates / max(texts.texts, 1):.1%})"
    if found.report is not None:
        lengths, report = found.tokens.quantiles(), found.report
        yield (
            "tokens",
            f"{found.tokens.total:,}; of {found.kept:,} kept, {found.trained / max(found.kept, 1):.1%} trained",
        )
        yield "tokens each", _quantiles(lengths)
        fate = {"drop": f"{report.dropped:,} dropped", "split": f"{report.split:,} split"}.get(
            settings.overlong,
            f"{report.truncated:,} truncated, {report.emptied:,} dropped since nothing trained was left",
        )
        yield f"over {settings.max_tokens:,}" if settings.max_tokens else "over length", f"{report.overlong:,}: {fate}"
    yield "characters", f"{texts.characters:,} in {texts.words:,} words of {texts.mean_word_length:.1f} characters"
    yield "characters each", _quantiles(texts.lengths.quantiles())
    yield "not letters", f"{texts.non_letters:.1%} of what is visible"
    shares = [f"{name} {share:.1%}" for name, share in texts.script_shares().items() if share >= LEAST_SHARE]
    yield "scripts", " · ".join(shares) or "none"
    if found.labels:
        names = [f"{harmless(name)} {count:,}" for name, count in found.labels.most_common()]
        shown = names if len(names) <= SHOWN_LABELS else [*names[:SHOWN_LABELS], "…", names[-1]]
        yield "labels", f"{len(names)}: " + " · ".join(shown)
    for decision in found.decisions:
        yield "decided", decision
    yield "problems", f"{found.problem_count:,}"


def _quantiles(lengths: Mapping[str, int]) -> str:
    return " · ".join(f"{name} {value:,}" for name, value in lengths.items())
