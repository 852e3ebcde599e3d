"""The comparison from a task to a verdict: each way made ready, the test opened once, every answer kept.

Order matters and is fixed: split and leaks first, then all choices on training and development items, then, when every
way is written down, the sealed test. An interrupted comparison goes on where it stopped: ways that are ready, trainings
and answers to the test are taken up, and only a search that was under way begins again.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import numpy as np

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.compare.application import INDEX_NAME, apply, draft
from craton.compare.library_task import NAME, SMALL_NAME, library_task
from craton.compare.settings import LORA, LORA_RETRIEVAL, ZERO_SHOT, CompareSettings
from craton.compare.verdict import Measured, Verdict, decide, detectable_effect
from craton.compare.ways import (
    MAJORITY,
    ORACLE,
    RANDOM,
    Recipe,
    Workshop,
    majority,
    oracle,
    random_passages,
    slug,
    tune,
)
from craton.config import parse
from craton.errors import DataError, UsageError
from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.items import Answerer, Item
from craton.evaluation.runner import Row, evaluate, slices, summary
from craton.evaluation.tasks import Kind, Metric, Task, load_task
from craton.evaluation.text_metrics import bits_per_byte
from craton.inference.model import Model
from craton.inference.plan import DTypeChoice, fast_bfloat16
from craton.prompting.examples import ExamplePool
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.documents import Document, OneDocument
from craton.retrieval.index import Encoder, Index
from craton.retrieval.readers import Reading, find_sources
from craton.retrieval.sync import Source
from craton.store import find
from craton.store.artifacts import check_model_name
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run

KIND: Final = "compare"
WAY_KIND: Final = "compare-way"
RESULT_NAME: Final = "comparison.json"
REPORT_NAME: Final = "report.html"
GENERAL_TEXT: Final = ("argparse", "collections", "decimal", "email", "json", "logging", "random", "subprocess")


@dataclass
class Watch:
    """How a caller follows a comparison. on_plan: before anything costs: what will be done, a sentence each.
    on_progress: what is being done. on_measured: a way has answered the whole test."""

    on_plan: Callable[[Run, Sequence[str]], None] = lambda run, lines: None
    on_progress: Callable[[str], None] = lambda doing: None
    on_measured: Callable[[str, Estimate], None] = lambda way, quality: None


@dataclass(frozen=True)
class Measurement:
    """A way after the test. rows: [seeds][items]. memory: bytes of its weights and vectors."""

    label: str
    recipe: Recipe | None
    rows: tuple[tuple[Row, ...], ...]
    figures: dict[str, Estimate]
    slices: dict[str, dict[str, Estimate]]
    memory: int
    run: str | None
    diagnostic: bool = False
    forgetting: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All that a comparison found. plan: the sentences from before the run; opened: when the test was opened; model:
    what was published, if that was wished."""

    run: Run
    task: Task
    settings: CompareSettings
    verdict: Verdict
    measurements: tuple[Measurement, ...]
    plan: tuple[str, ...]
    opened: tuple[float, ...]
    dtype: str
    model: StoredModel | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "run": self.run.id,
            "task": {"name": self.task.name, "digest": self.task.digest, "test": len(self.task.test)},
            "settings": self.settings.model_dump(mode="json"),
            "plan": list(self.plan),
            "verdict": self.verdict.as_dict(),
            "ways": [
                {
                    "way": m.label,
                    "diagnostic": m.diagnostic,
                    "run": m.run,
                    "figures": {name: one.as_dict() for name, one in m.figures.items()},
                    "slices": {k: {v: one.as_dict() for v, one in values.items()} for k, values in m.slices.items()},
                    "seconds": {"setup": m.recipe.setup, "update": m.recipe.update} if m.recipe else None,
                    "adapters": list(m.recipe.adapters) if m.recipe else [],
                    "tried": m.recipe.tried if m.recipe else 0,
                    "memory": m.memory,
                    "bits_per_byte_of_general_text": m.forgetting,
                }
                for m in self.measurements
            ],
        }


def compare(
    source: str,
    settings: CompareSettings,
    provenance: dict[str, str],
    watch: Watch | None = None,
    *,
    publish: bool = False,
    report: Path | None = None,
) -> Comparison:
    """Compare the ways on the task in `source` (see `load_task`). Everything is kept in a run, and with it the wishes:
    to publish the recommended way, and to write the report to a file besides the one in the run's folder.

    Raises UsageError, DataError and FileFormatError for a task, documents, settings or a file that cannot be used.
    """
    watch = watch or Watch()
    task = find_task(source)
    check(task, settings)
    name = settings.name or slug(task.name)
    check_model_name(name)
    check_report(report)
    if source not in (NAME, SMALL_NAME):
        source = str(Path(source).expanduser().absolute())  # to be found again from any folder
    bases = [find(model) for model in settings.models]
    # Found again from any folder, and as they are now: a name may come to mean a newer version meanwhile.
    pinned = {"docs": tuple(map(_findable, settings.docs)), "models": tuple(map(_pinned, bases))}
    settings = settings.model_copy(update={"name": name, **pinned})
    parents = (
        *(Parent(relation="base", name=base.id) for base in bases),
        Parent(relation="evaluated_on", name=source),
    )
    config = {
        "sources": [source],
        "settings": settings.model_dump(mode="json"),
        "task": task.digest,
        "publish": publish,
        "report": str(report.absolute()) if report is not None else None,
    }
    origins = {f"settings.{key}": origin for key, origin in provenance.items()}
    run = Run.create(KIND, config=config, provenance=origins, parents=parents, name=settings.name)
    return _at_work(run, task, settings, watch)


def resume(run: Run, watch: Watch | None = None) -> Comparison:
    """Go on with an interrupted comparison, and do with it what was wished at its beginning.

    Raises DataError if the task is not what it was, UsageError if the report can no longer be written where it
    was to be.
    """
    config = run.config()
    settings = parse(CompareSettings, config["settings"], where=str(run.folder))
    task = find_task(config["sources"][0])
    if task.digest != config["task"]:
        raise DataError(
            "the task is not what it was when this comparison began",
            where=config["sources"][0],
            remedy="put its files back as they were, or start a new comparison",
        )
    check_report(wished_report(run))
    return _at_work(run, task, settings, watch or Watch())


def wished_report(run: Run) -> Path | None:
    """Where a comparison is to write its report, besides its own folder."""
    report = run.config().get("report")
    return Path(report) if report is not None else None


def check_report(path: Path | None) -> None:
    """Refuse a file that the report could not be written to, before it has cost anything. Raises UsageError."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.absolute().parent}"
        raise UsageError(what, where="--report", remedy="make the folder, or name a file in another one")


def _findable(doc: str) -> str:
    return doc if doc.startswith("package:") else str(Path(doc).expanduser().absolute())


def _pinned(base: StoredModel) -> str:
    return base.id if base.folder is not None else str(base.path.absolute())


def find_task(source: str) -> Task:
    """The task in a file (see `load_task`), or the one that is built in under this name."""
    return library_task(source) if source in (NAME, SMALL_NAME) else load_task(source)


def check(task: Task, settings: CompareSettings) -> None:
    """Refuse what cannot be compared, before it costs anything. Raises UsageError and DataError."""
    if not task.train or not task.dev:
        raise DataError(
            "a comparison needs training and development items, too", where=task.name, remedy="see docs/compare.md"
        )
    if len(set(settings.ways)) < 2 and len(settings.models) < 2:
        raise UsageError("one way alone is no comparison", remedy="name two or more: --ways zero-shot,lora")
    if len(task.test) < 10:
        raise DataError(
            f"{len(task.test)} test items can show nothing", remedy="give the task at least ten, better 200"
        )


def _at_work(run: Run, task: Task, settings: CompareSettings, watch: Watch) -> Comparison:
    with run.lock():
        study = _Study(run, task, settings, watch)
        found = study.carry_out()
        replace_file(run.folder / RESULT_NAME, json_bytes(found.as_dict()))
        draft(found)
        _write_report(found)
        # Before the run is done: what fails here can be gone on with.
        if run.config().get("publish"):
            found = replace(found, model=apply(run))
        quality = found.verdict.quality[found.verdict.recommended].value
        published = {"model": found.model.id} if found.model is not None else {}
        result = {"recommended": found.verdict.recommended, "metrics": {task.metric: quality}}
        run.finish("done", result | published)
        return found


def _write_report(found: Comparison) -> None:
    from craton.compare.report import report  # it imports this module

    page, wished = report(found).encode(), wished_report(found.run)
    for path in (found.run.folder / REPORT_NAME, *([wished] if wished is not None else [])):
        replace_file(path, page)


class _Study:
    def __init__(self, run: Run, task: Task, settings: CompareSettings, watch: Watch) -> None:
        self.run, self.task, self.settings, self.watch = run, task, settings, watch
        self.encoder = Encoder(settings.encoder, settings.threads)
        self.dtype, why = one_format(settings.models)
        self.plan = plan(task, settings, why)

    def carry_out(self) -> Comparison:
        self.watch.on_plan(self.run, self.plan)
        index, index_seconds, said = self._index()
        pool = ExamplePool(self.task.train, self.encoder)
        shops = [
            Workshop(
                self.task, self.settings, model, self.dtype, pool, index, index_seconds, self.run.folder, self._say
            )
            for model in self.settings.models
        ]
        recipes = []
        for shop in shops:
            for way in self.settings.ways:
                self._say(f"making ready: {self._label(shop, way)}")
                recipes.append((shop, shop.prepare(way)))
            shop.release()
        # From here on nothing is chosen any more.
        self.run.event("opened", digest=self.task.test.digest, items=len(self.task.test))
        items = self.task.test.open()
        measurements = [self._measured(shop, recipe, items) for shop, recipe in recipes]
        measurements += self._diagnostics(shops[0], index, recipes, items)
        verdict = decide(
            [measured(one) for one in measurements],
            [item.group for item in items],
            queries=self.settings.queries,
            updates=self.settings.updates,
            seed=self.settings.seed,
        )
        if index is not None:
            index.collection.close()
        opened = tuple(float(event["time"]) for event in self.run.events() if event.get("event") == "opened")
        return Comparison(
            self.run,
            self.task,
            self.settings,
            verdict,
            tuple(measurements),
            (*self.plan, *said),
            opened,
            self.dtype,
        )

    def _say(self, doing: str) -> None:
        self.run.log(doing)
        self.watch.on_progress(doing)

    def _label(self, shop: Workshop, way: str) -> str:
        return way if len(self.settings.models) == 1 else f"{shop.model}: {way}"

    def _index(self) -> tuple[Index | None, float, list[str]]:
        """The index of the documents, what it took to build and tune, and what was decided."""
        sources = [*self.settings.docs, *self.task.sources]
        if not sources and not self.task.passages:
            return None, 0.0, ["no documents: the training examples nearest to a question are what is retrieved"]
        path, facts = self.run.folder / INDEX_NAME, self.run.folder / "index.json"
        settings = CollectionSettings(encoder=self.settings.encoder)
        collection = Collection.open(path) if path.exists() else Collection.create(path, settings)
        index = Index(collection, self.encoder, self.settings.name or self.task.name)
        known: dict[str, Any] = read_object(facts) if facts.exists() else {"seconds": 0.0}
        if "said" in known:
            return index, float(known["seconds"]), list(known["said"])
        started = time.perf_counter() - float(known["seconds"])

        def progress(doing: str) -> None:
            # What an interrupted one has taken counts, too.
            replace_file(facts, json_bytes({"seconds": time.perf_counter() - started}))
            self._say(doing)

        self._say("reading and embedding the documents")
        reading = Reading()
        files: list[Source] = [*find_sources(sources, reading=reading)] if sources else []
        files += task_files(self.task)
        report = collection.sync(files, self.encoder, self.encoder.count, on_progress=progress)
        if not collection.document_count:
            raise DataError("the documents hold no text", where=", ".join(sources))
        said = [
            f"{collection.document_count:,} documents in {collection.chunk_count:,} passages ({report})",
            tune(index, self.task),
        ]
        seconds = time.perf_counter() - started
        replace_file(facts, json_bytes({"seconds": seconds, "said": said}))
        return index, seconds, said

    def _measured(self, shop: Workshop, recipe: Recipe, items: Sequence[Item]) -> Measurement:
        label = self._label(shop, recipe.way)
        folder, run = self._way_run(label, recipe)
        rows, forgetting, memory = [], [], 0
        for seed in range(max(1, len(recipe.adapters))):
            answerer = shop.answerer(recipe, seed)
            rows.append(self._answered(label, answerer, items, folder / f"rows-seed{seed}.jsonl", seed))
            memory = held_bytes(answerer.model, shop.index if recipe.passages else None)
            if recipe.way in (ZERO_SHOT, LORA, LORA_RETRIEVAL):
                forgetting.append(self._general_bits(shop, recipe, seed))
        found = self._measurement(label, recipe, rows, items, memory, run)
        if run is not None:
            values = {name: one.value for name, one in found.figures.items()}
            with run.lock():
                run.finish("done", {"metrics": values})
        return _with_forgetting(found, forgetting)

    def _way_run(self, label: str, recipe: Recipe) -> tuple[Path, Run | None]:
        """The run of a row: its config is the recipe, its rows lie in its folder."""
        record = self.run.folder / "ways" / f"{slug(label)}-run.json"
        if record.exists():
            run = Run.open(str(read_object(record)["run"]))
            return run.folder, None if run.record.status == "done" else run
        config: dict[str, Any] = {"way": recipe.way, "model": recipe.model, "comparison": self.run.id}
        config |= {"prompt": recipe.prompt.model_dump(mode="json"), "adapters": list(recipe.adapters)}
        parents = (Parent(relation="base", name=recipe.model),)
        run = Run.create(
            WAY_KIND,
            config=config,
            provenance={},
            parents=parents,
            name=f"{self.settings.name}/{slug(label)}",
        )
        replace_file(record, json_bytes({"run": run.id}))
        return run.folder, run

    def _answered(
        self, label: str, answerer: Answerer, items: Sequence[Item], path: Path, seed: int
    ) -> tuple[Row, ...]:
        answerer(items[0])  # what is loaded, compiled or cached at the first question is no part of its time
        told = [time.monotonic()]

        def progress(done: int, total: int) -> None:
            if time.monotonic() - told[0] > 2 or done == total:
                told[0] = time.monotonic()
                of = f", seed {seed + 1}" if seed else ""
                self.watch.on_progress(f"{label}{of}: {done} of {total} test items")

        return tuple(evaluate(items, answerer, self.task.metric, rows=path, on_progress=progress))

    def _measurement(
        self,
        label: str,
        recipe: Recipe | None,
        rows: Sequence[Sequence[Row]],
        items: Sequence[Item],
        memory: int,
        run: Run | None,
        *,
        diagnostic: bool = False,
    ) -> Measurement:
        figures = figures_of(rows, self.task.metric, kind=self.task.kind, seed=self.settings.seed)
        self.watch.on_measured(label, figures[self.task.metric])
        return Measurement(
            label=label,
            recipe=recipe,
            rows=tuple(tuple(seed) for seed in rows),
            figures=figures,
            slices=slices(mean_rows(rows), items, self.task.slices),
            memory=memory,
            run=run.id if run is not None else None,
            diagnostic=diagnostic,
        )

    def _diagnostics(
        self,
        shop: Workshop,
        index: Index | None,
        recipes: Sequence[tuple[Workshop, Recipe]],
        items: Sequence[Item],
    ) -> list[Measurement]:
        """The ways that explain the others: the most frequent answer, the right context, a random one."""
        asked: list[tuple[str, Answerer]] = [(MAJORITY, majority(self.task))]
        shown = next((r for s, r in recipes if s is shop and r.way == "retrieval"), None)
        if shown is not None and index is not None:
            if all(item.gold for item in items):
                asked.append((ORACLE, shop.answerer(shown, find=oracle(index))))
            drawn = random_passages(index, shown.passages, self.settings.seed)
            asked.append((RANDOM, shop.answerer(shown, find=drawn)))
        elif shown is not None and shown.prompt.examples.count:
            examples = shown.prompt.examples.model_copy(update={"choose": "random"})
            prompt = shown.prompt.model_copy(update={"examples": examples})
            asked.append(("random examples", shop.answerer(Recipe("random", shop.model, prompt))))
        found = []
        for label, answerer in asked:
            path = self.run.folder / "ways" / f"{slug(label)}-rows.jsonl"
            rows = self._answered(label, answerer, items, path, 0)
            found.append(self._measurement(label, None, [rows], items, 0, None, diagnostic=True))
        return found

    def _general_bits(self, shop: Workshop, recipe: Recipe, seed: int) -> float:
        """Bits per byte of text that has nothing to do with the task: what an adapter has made the model forget."""
        text = general_text()
        model = shop.answerer(recipe, seed).model
        ids = model.tokenizer.encode(text)[: min(1024, model.context)]
        said = model.rolling_score(ids)
        return bits_per_byte(-said.logprob, len(model.tokenizer.decode(ids).encode()))


def figures_of(
    rows: Sequence[Sequence[Row]], metric: Metric, *, kind: Kind | None = None, seed: int = 0
) -> dict[str, Estimate]:
    """The figures of a way, of rows [seeds][items]. An item counts once: the quality is of its mean over the seeds, as
    in the verdict. The other figures take the answers of all seeds, those to one document always together."""
    if len(rows) == 1:
        return summary(rows[0], metric, kind=kind, seed=seed)
    pooled = summary([row for one in rows for row in one], metric, kind=kind, seed=seed)
    figures = {name: replace(figure, n=figure.n // len(rows)) for name, figure in pooled.items()}
    means = mean_rows(rows)
    scores, groups = [row.score for row in means], [row.group for row in means]
    return figures | {metric: estimate(scores, groups, seed=seed, score=True)}


def mean_rows(rows: Sequence[Sequence[Row]]) -> list[Row]:
    """The rows of the first seed, each with its mean score over all seeds."""
    return [replace(first, score=float(np.mean([seed[i].score for seed in rows]))) for i, first in enumerate(rows[0])]


def measured(one: Measurement) -> Measured:
    """What the verdict needs of a measurement."""
    recipe = one.recipe
    return Measured(
        name=one.label,
        scores=[[row.score for row in seed] for seed in one.rows],
        seconds=np.mean([[row.seconds for row in seed] for seed in one.rows], axis=0).tolist(),
        setup=recipe.setup if recipe else 0.0,
        update=recipe.update if recipe else 0.0,
        diagnostic=one.diagnostic,
    )


def plan(task: Task, settings: CompareSettings, why: str) -> tuple[str, ...]:
    """What is decided before the run, a sentence each."""
    n, groups = len(task.test), task.test.groups
    effect = detectable_effect(n, groups, len(settings.models) * len(settings.ways))
    shown = f"differences of {effect:.1%} or more" if np.isfinite(effect) else "no difference at all"
    leaks = task.leaks
    return (
        *task.decisions,
        f"{len(task.train):,} training, {len(task.dev):,} development and {n:,} sealed test items of {groups:,} source "
        f"documents (SHA-256 {task.test.digest[:12]})",
        f"this test can show {shown}, four times in five, if two ways err independently and all pairs are tested",
        f"each way: {settings.trials} candidates and {settings.minutes:g} minutes at most; adapters from "
        f"{settings.seeds} seeds",
        why,
        *([] if leaks is None or leaks.pairs else ["no training item repeats a test item (exact, 13 words, MinHash)"]),
    )


def one_format(models: Sequence[str]) -> tuple[DTypeChoice, str]:
    """The number format that all ways run in, and why."""
    quantized = any(Checkpoint.open(find(model).path).quantized_kinds() for model in models)
    if not quantized:
        return "auto", "every way runs on the same weights in the same number format"
    name: DTypeChoice = "bfloat16" if fast_bfloat16() else "float32"
    return name, f"every way runs in {name}: merged into 4-bit blocks, an adapter's changes would be lost"


def task_files(task: Task) -> list[Source]:
    """The documents that came with a task, as source files."""
    return [
        OneDocument(Document(name=name, title=name, text=text, kind="text")) for name, text in task.passages.items()
    ]


def general_text() -> str:
    """Documentation of the standard library: English that is on every machine."""
    return "\n\n".join(inspect.getdoc(import_module(name)) or "" for name in GENERAL_TEXT)


def held_bytes(model: Model, index: Index | None) -> int:
    """The memory that a way needs besides the program: the model's weights in the number format that all ways run in,
    and the vectors of its index (8 bits a number and 16 bytes more, see `retrieval.vectors`)."""
    # From the shapes: weights that a kernel has packed for itself are no parameters any more.
    weights = sum(math.prod(shape) for shape in model.checkpoint.source.shapes.values()) * model.plan.dtype.itemsize
    vectors = index.collection.chunk_count * ((index.collection.width or 0) + 16) if index is not None else 0
    return weights + vectors


def _with_forgetting(found: Measurement, bits: Sequence[float]) -> Measurement:
    return replace(found, forgetting=float(np.mean(bits))) if bits else found
