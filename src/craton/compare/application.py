"""What a comparison is for: the winning way as one named thing: a model with its prompt, index, examples, adapter."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import NonNegativeInt

from craton.checkpoints.disk import replace_file
from craton.checkpoints.sources import SourceKind
from craton.compare.verdict import seconds
from craton.compare.ways import Recipe
from craton.config import Settings, parse
from craton.config.resolve import read_toml
from craton.errors import CratonError, UsageError
from craton.evaluation.items import Answer, Item
from craton.finetuning.loading import load
from craton.inference.model import Choice, Completion, Model
from craton.inference.plan import DTypeChoice
from craton.prompting.answering import FindPassages, Passage, PromptedModel
from craton.prompting.examples import ExamplePool
from craton.prompting.prompt import Prompt, prompt_toml
from craton.retrieval.collection import Collection
from craton.retrieval.index import Encoder, Index
from craton.store import find
from craton.store.artifacts import RUN_PREFIX, publish_model
from craton.store.manifest import Parent
from craton.store.models import StoredModel, list_models
from craton.store.run_files import read_rows
from craton.store.runs import Run

if TYPE_CHECKING:
    from craton.compare.study import Comparison

APPLICATION_NAME: Final = "application.json"
PROMPT_NAME: Final = "prompt.toml"
EXAMPLES_NAME: Final = "examples.jsonl"
INDEX_NAME: Final = "index.sqlite"
DRAFT: Final = "application"  # the folder of a comparison's run that holds what it recommends, ready to be published


class ApplicationSettings(Settings):
    """`application.json`. model: the base; adapter: merged into it, or none. passages: shown with each question."""

    schema_version: Literal[1] = 1
    task: str
    way: str
    model: str
    adapter: str | None = None
    encoder: str
    dtype: DTypeChoice = "auto"
    choices: tuple[str, ...] = ()
    passages: NonNegativeInt = 0
    measured: str


class Application:
    """A model that answers as it was measured. It chats like a `Model`: each question is answered for itself, with its
    passages, examples and form. Make one with `open_application`."""

    def __init__(self, name: str, settings: ApplicationSettings, model: Model, prompted: PromptedModel) -> None:
        self.name, self.settings, self.model, self.prompted = name, settings, model, prompted
        self.plan = model.plan

    def answer(self, text: str) -> Answer:
        """The answer to one question."""
        return self.prompted(_item(text))

    def render(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> list[int]:
        """The tokens that the last question of a conversation becomes."""
        return self.prompted.read(_item(_question(messages)))[0]

    def chat(self, messages: Sequence[Mapping[str, Any]], *, stream: bool = False, **sampling: Any) -> Any:
        """Answer the last question, as a `Completion`, or piece by piece. The application's form of an answer goes
        before `sampling`."""
        prompt = self.prompted.prompt
        if prompt.answer.scoring != "generate" or prompt.samples > 1 or prompt.reasoning:
            said = Said(self.answer(_question(messages)))
            return said if stream else said.completion
        settings, ids = {**sampling, **self.prompted.form}, self.render(messages)
        return self.model.generate(ids, stream=True, **settings) if stream else self.model.generate(ids, **settings)


class Said:
    """An answer that came at once, in the form of a stream."""

    def __init__(self, answer: Answer) -> None:
        self._text = answer.text
        choice = Choice(answer.text, [], "stop", 0)
        self.completion = Completion([choice], answer.prompt_tokens, 0, answer.seconds, answer.seconds)

    def __iter__(self) -> Iterator[str]:
        yield self._text


def is_application(name: str) -> bool:
    """Whether the store has an application of this name."""
    with contextlib.suppress(CratonError):  # what is wrong with a name, loading it says
        return find(name).kind is SourceKind.APPLICATION
    return False


def open_application(
    name: str, *, dtype: DTypeChoice = "auto", threads: int | None = None, **engine: Any
) -> Application:
    """Load an application with its model, index and examples. engine: the fields of `EngineSettings`.

    Raises UnknownName and StoreError where it, its model or its adapter is not in the store.
    """
    stored = find(name)
    if stored.kind is not SourceKind.APPLICATION:
        raise UsageError(f"{name} is no application", remedy="craton compare TASK --apply makes one")
    settings = _settings(stored.path)
    prompt = parse(Prompt, read_toml(stored.path / PROMPT_NAME, "the prompt"), where=str(stored.path))
    chosen = settings.dtype if dtype == "auto" else dtype
    model = load(settings.adapter or settings.model, dtype=chosen, threads=threads, **engine)
    encoder = Encoder(settings.encoder, threads)
    rows = read_rows(stored.path / EXAMPLES_NAME)
    pool = ExamplePool([_stored_item(row) for row in rows], encoder) if rows else None
    passages = _finder(stored.path / INDEX_NAME, encoder, settings.passages) if settings.passages else None
    prompted = PromptedModel(model, prompt, choices=settings.choices, pool=pool, passages=passages)
    return Application(name, settings, model, prompted)


def draft(found: Comparison) -> None:
    """Write down what the verdict recommends, in the run's folder, so that `apply` needs nothing but the run."""
    chosen = next(m for m in found.measurements if m.label == found.verdict.recommended)
    recipe = chosen.recipe
    assert recipe is not None
    quality = found.verdict.quality[chosen.label]
    settings = ApplicationSettings(
        task=found.task.name,
        way=recipe.way,
        model=recipe.model,
        adapter=recipe.adapters[_middle(chosen.rows)] if recipe.adapters else None,
        encoder=found.settings.encoder,
        dtype=found.dtype,
        choices=found.task.choices,
        passages=recipe.passages,
        measured=f"{found.task.metric} {quality.value:.1%} ({quality.low:.1%} to {quality.high:.1%}), "
        f"{seconds(chosen.figures['latency_p50'].value)} an answer",
    )
    folder = found.run.folder / DRAFT
    folder.mkdir(exist_ok=True)
    replace_file(folder / PROMPT_NAME, prompt_toml(recipe.prompt).encode())
    replace_file(folder / "README.md", _card(found, recipe, settings).encode())
    if recipe.prompt.examples.count:
        rows = "".join(json.dumps(asdict(item)) + "\n" for item in found.task.train)
        replace_file(folder / EXAMPLES_NAME, rows.encode())
    # Last: what is without it is no draft.
    replace_file(folder / APPLICATION_NAME, (settings.model_dump_json(indent=2) + "\n").encode())


def apply(run: Run, name: str | None = None) -> StoredModel:
    """Publish what a finished comparison recommends as an application: one name (none: the comparison's) for model,
    prompt, index, examples and adapter. What was published of this run before under it is given as it is.

    Raises UsageError for a run that is no comparison or not finished, and for a name that is taken.
    """
    drafted = run.folder / DRAFT
    if not (drafted / APPLICATION_NAME).exists():
        raise UsageError(
            f"run {run.id} has nothing to publish: it is no comparison, or not finished",
            where=str(run.folder),
            remedy=f"go on with an interrupted one: craton runs resume {run.id}",
        )
    settings, source = _settings(drafted), f"{RUN_PREFIX}{run.id}"
    name = name or run.name or settings.task
    made = [model for model in list_models() if (model.name, model.source) == (name, source)]
    if made:
        return made[-1]

    def build(folder: Path) -> None:
        shutil.copytree(drafted, folder, dirs_exist_ok=True)
        if settings.passages:
            copy_database(run.folder / INDEX_NAME, folder / INDEX_NAME)

    parents = [Parent(relation="base", name=settings.model)]
    if settings.adapter is not None:
        parents.append(Parent(relation="uses_adapter", name=settings.adapter))
    licence = find(settings.model).licence
    return publish_model(name, build, source=source, parents=tuple(parents), licence=licence)


def copy_database(source: Path, target: Path) -> None:
    """A whole copy of an SQLite file, whatever lies in its log."""
    with contextlib.closing(sqlite3.connect(source)) as one, contextlib.closing(sqlite3.connect(target)) as other:
        one.backup(other)
        other.execute("PRAGMA journal_mode=DELETE")


def _middle(rows: Sequence[Sequence[Any]]) -> int:
    """The seed of median quality: taking the best one would promise its luck, too."""
    means = [sum(row.score for row in seed) / len(seed) for seed in rows]
    return sorted(range(len(means)), key=lambda i: means[i])[len(means) // 2]


def _finder(path: Path, encoder: Encoder, count: int) -> FindPassages:
    # SQLite writes a log beside a file that it opens; what is in the store is never written to, so a copy is opened.
    # It goes away with the function that searches it.
    folder = tempfile.TemporaryDirectory(prefix="craton-")
    copy = Path(folder.name) / path.name
    shutil.copyfile(path, copy)
    index = Index(Collection.open(copy), encoder, path.stem)

    def found(item: Item, kept: object = folder) -> list[Passage]:
        return [Passage(hit.document, hit.text) for hit in index.search(item.input, count)]

    return found


def _settings(folder: Path) -> ApplicationSettings:
    table = json.loads((folder / APPLICATION_NAME).read_bytes())
    return parse(ApplicationSettings, table, where=str(folder))


def _item(text: str) -> Item:
    return Item("question", text, ("",), "question", fields={"input": text})


def _question(messages: Sequence[Mapping[str, Any]]) -> str:
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        raise UsageError("there is no question in the conversation")
    return str(asked[-1])


def _stored_item(row: Mapping[str, Any]) -> Item:
    return Item(**{**row, "answers": tuple(row["answers"]), "gold": tuple(row["gold"])})


def _card(found: Comparison, recipe: Recipe, settings: ApplicationSettings) -> str:
    lines = [f"# {found.settings.name}", "", found.verdict.sentence, "", found.verdict.margin, ""]
    lines += [f"- task: {settings.task}", f"- way: {recipe.way}", f"- measured: {settings.measured}"]
    lines += [f"- comparison: run {found.run.id}"]
    return "\n".join(lines) + "\n"
