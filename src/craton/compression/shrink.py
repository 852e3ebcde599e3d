"""`craton shrink`: a planned ladder of smaller models, each measured on the task, on text and on this machine, and the
one to take.

All is chosen on the task's development items; the sealed test is opened once, for the chosen model and the base. What
was made and answered is kept in the run, so an interrupted one goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from craton.checkpoints.disk import replace_file
from craton.compression.footprint import Footprint, footprints
from craton.compression.job import known_as
from craton.compression.pareto import BASE, Choice, Rung, choose, front
from craton.compression.rungs import make_rung, plan_ladder
from craton.compression.shrink_settings import ShrinkSettings
from craton.config import parse
from craton.errors import DataError, UsageError
from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.items import Item
from craton.evaluation.paired import Difference, paired_difference, simultaneous
from craton.evaluation.perplexity import text_figures
from craton.evaluation.runner import Row, evaluate
from craton.evaluation.tasks import Task, load_task
from craton.inference.model import load
from craton.prompting.answering import PromptedModel
from craton.prompting.defaults import default_prompt
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.manifest import MANIFEST_NAME, Parent
from craton.store.models import StoredModel, files_below
from craton.store.publishing import remove
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run

KIND: Final = "shrink"
RESULT_NAME: Final = "shrink.json"
TEXT_WINDOWS: Final = 24


@dataclass
class Watch:
    """How a caller follows. on_plan: before anything costs: what will be done. on_progress: what is being done."""

    on_plan: Callable[[Run, Sequence[str]], None] = lambda run, lines: None
    on_progress: Callable[[str], None] = lambda doing: None


@dataclass(frozen=True)
class Shrunk:
    """All that was found. confirmed: on the sealed test, the base's quality, the chosen one's, and their paired
    difference (none: the base was kept). model: what was published. plan: the sentences from before the run."""

    run: Run
    task: Task
    settings: ShrinkSettings
    rungs: tuple[Rung, ...]
    choice: Choice
    confirmed: tuple[Estimate, Estimate, Difference] | None
    model: StoredModel | None
    plan: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        best = {rung.label for rung in front(self.rungs)}
        return {
            "run": self.run.id,
            "task": self.task.name,
            "metric": self.task.metric,
            "settings": self.settings.model_dump(mode="json"),
            "rungs": [
                {
                    "label": rung.label,
                    "quality": rung.quality.as_dict(),
                    "difference": rung.difference.as_dict() if rung.difference else None,
                    "bits_per_byte": rung.bits_per_byte.as_dict(),
                    **asdict(rung.footprint),
                    "front": rung.label in best,
                }
                for rung in self.rungs
            ],
            "chosen": self.choice.chosen.label,
            "sentence": self.choice.sentence,
            "test": None
            if self.confirmed is None
            else dict(zip(("base", "chosen", "difference"), (one.as_dict() for one in self.confirmed), strict=True)),
            "model": self.model.id if self.model else None,
        }


def shrink(
    model: str, source: str, settings: ShrinkSettings, provenance: dict[str, str], watch: Watch | None = None
) -> Shrunk:
    """Try the ladder on `model` for the task in `source` and publish the model to take.

    Raises UsageError and DataError for a model, a task or settings that cannot be used, before anything is made.
    """
    base = find(model)
    task = _task(source)
    plan_ladder(base, settings)  # refuses what cannot be compressed
    settings = settings.model_copy(update={"name": settings.name or f"{base.name}-small"})
    assert settings.name is not None
    check_model_name(settings.name)
    parents = (Parent(relation="base", name=known_as(base)), Parent(relation="evaluated_on", name=source))
    config = {
        "model": model,
        "task": str(Path(source).expanduser().absolute()),
        "digest": task.digest,
        "settings": settings.model_dump(mode="json"),
    }
    origins = {f"settings.{key}": origin for key, origin in provenance.items()}
    run = Run.create(KIND, config=config, provenance=origins, parents=parents, name=settings.name)
    return _at_work(run, model, task, settings, watch or Watch())


def resume(run: Run, watch: Watch | None = None) -> Shrunk:
    """Go on with an interrupted run. Raises DataError if the task is not what it was."""
    config = run.config()
    settings = parse(ShrinkSettings, config["settings"], where=str(run.folder))
    task = _task(config["task"])
    if task.digest != config["digest"]:
        raise DataError(
            "the task is not what it was when this run began",
            where=config["task"],
            remedy="put its files back as they were, or start anew",
        )
    return _at_work(run, config["model"], task, settings, watch or Watch())


def _task(source: str) -> Task:
    task = load_task(source)
    if not task.dev:
        raise UsageError("the task has no development items to choose on", where=source, remedy="give it more items")
    return task


def _at_work(run: Run, model: str, task: Task, settings: ShrinkSettings, watch: Watch) -> Shrunk:
    with run.lock():
        found = _Study(run, model, task, settings, watch).carry_out()
        replace_file(run.folder / RESULT_NAME, json_bytes(found.as_dict()))
        published = {"model": found.model.id} if found.model else {}
        metrics = {task.metric: found.choice.chosen.quality.value}
        run.finish("done", {"recommended": found.choice.chosen.label, "metrics": metrics, **published})
        return found


class _Study:
    def __init__(self, run: Run, model: str, task: Task, settings: ShrinkSettings, watch: Watch) -> None:
        self.run, self.model, self.task, self.settings, self.watch = run, model, task, settings, watch
        self.items = list(task.dev)[: settings.limit]
        self.base = find(model)
        self.ladder = plan_ladder(self.base, settings)

    def carry_out(self) -> Shrunk:
        sentences = self._sentences()
        self.watch.on_plan(self.run, sentences)
        text, held_out = self.run.folder / "text.txt", self.run.folder / "held-out.txt"
        replace_file(text, self.ladder.text.encode())
        replace_file(held_out, self.ladder.held_out.encode())
        made = self._ladder(text)
        paths = {label: str(model.path) for label, model in made.items()}
        rows = {label: self._rows(label, path, "dev", self.items) for label, path in paths.items()}
        bits = {label: self._bits(label, path, held_out) for label, path in paths.items()}
        sizes = self._footprints(paths)
        differences = self._differences(rows)
        rungs = tuple(
            Rung(
                label,
                paths[label],
                estimate([row.score for row in rows[label]], [row.group for row in rows[label]]),
                bits[label],
                sizes[label],
                differences.get(label),
            )
            for label in paths
        )
        choice = choose(rungs, self.settings.target, self.settings.margin)
        confirmed = self._confirm(choice, paths)
        model = self._publish(made[choice.chosen.label])
        for label in [label for label in made if label != BASE]:
            remove(made[label].id)
        return Shrunk(self.run, self.task, self.settings, rungs, choice, confirmed, model, tuple(sentences))

    def _sentences(self) -> list[str]:
        return [
            f"{self.base.id} on {self.task.name}: {len(self.items)} development items choose, "
            f"{len(self.task.test)} sealed test items confirm",
            f"the ladder: {'; '.join(plan.label for plan in self.ladder.rungs)}",
        ]

    def _ladder(self, text: Path) -> dict[str, StoredModel]:
        """Every rung, by its label; those that were made before an interruption are taken up again."""
        made = {BASE: self.base}
        for number, plan in enumerate(self.ladder.rungs, 1):
            kept = self.run.folder / "rungs" / f"{_slug(plan.label)}.json"
            kept.parent.mkdir(exist_ok=True)
            if not kept.exists():
                doing = f"{number} of {len(self.ladder.rungs)}, {plan.label}"

                def say(what: str, doing: str = doing) -> None:
                    self.watch.on_progress(f"{doing}: {what}")

                model = make_rung(plan, self.ladder, made, self.settings, text, say)
                replace_file(kept, json_bytes({"model": model.id}))
            made[plan.label] = find(read_object(kept)["model"])
        return made

    def _rows(self, label: str, path: str, part: str, items: Sequence[Item]) -> list[Row]:
        kept = self.run.folder / "rows" / f"{_slug(label)}-{part}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        prompt = default_prompt(self.task.kind, self.task.instruction)
        answerer = PromptedModel(load(path, threads=self.settings.threads), prompt, choices=self.task.choices)

        def say(done: int, total: int) -> None:
            self.watch.on_progress(f"{label}: {done} of {total} {part} items")

        return evaluate(items, answerer, self.task.metric, rows=kept, on_progress=say)

    def _bits(self, label: str, path: str, text: Path) -> Estimate:
        kept = self.run.folder / "rows" / f"{_slug(label)}-text.json"
        if not kept.exists():
            loaded = load(path, threads=self.settings.threads)
            say = self.watch.on_progress
            found = text_figures(loaded, text, limit=TEXT_WINDOWS, on_progress=lambda doing: say(f"{label}: {doing}"))
            replace_file(kept, json_bytes(asdict(found["bits_per_byte"])))
        return Estimate(**read_object(kept))

    def _footprints(self, paths: dict[str, str]) -> dict[str, Footprint]:
        kept = self.run.folder / "footprints.json"
        if not kept.exists():

            def say(done: int, total: int) -> None:
                self.watch.on_progress(f"measuring speed and memory: {done} of {total} turns")

            found = footprints(
                list(paths.values()), rounds=self.settings.rounds, threads=self.settings.threads, on_progress=say
            )
            replace_file(kept, json_bytes({label: asdict(one) for label, one in zip(paths, found, strict=True)}))
        return {label: Footprint(**one) for label, one in read_object(kept).items()}

    def _differences(self, rows: dict[str, list[Row]]) -> dict[str, Difference]:
        others = [label for label in rows if label != BASE]
        return dict(zip(others, simultaneous([_paired(rows[BASE], rows[label]) for label in others]), strict=True))

    def _confirm(self, choice: Choice, paths: dict[str, str]) -> tuple[Estimate, Estimate, Difference] | None:
        label = choice.chosen.label
        if label == BASE:
            return None
        # From here on nothing is chosen any more.
        self.run.event("opened", digest=self.task.test.digest, items=len(self.task.test))
        items = self.task.test.open()
        base, chosen = (self._rows(one, paths[one], "test", items) for one in (BASE, label))
        qualities = [estimate([row.score for row in some], [row.group for row in some]) for some in (base, chosen)]
        return (qualities[0], qualities[1], _paired(base, chosen))

    def _publish(self, chosen: StoredModel) -> StoredModel | None:
        if chosen.id == self.base.id:
            return None
        assert self.settings.name is not None
        folder = chosen.folder
        assert folder is not None

        def copy(target: Path) -> None:
            for name in files_below(folder):
                if name != MANIFEST_NAME:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    replace_file(target / name, (folder / name).read_bytes())

        # A rung is removed in the end, so the lineage names what stays.
        parents = [Parent(relation=one.relation, name=self._lasting(one.name)) for one in chosen.parents]
        return publish_model(
            self.settings.name,
            copy,
            source=f"run:{self.run.id}",
            parents=tuple(dict.fromkeys(parents)),
            licence=self.base.licence,
        )

    def _lasting(self, name: str) -> str:
        return known_as(self.base) if name.startswith(f"{self.settings.name}-") else name


def _paired(base: Sequence[Row], other: Sequence[Row]) -> Difference:
    groups = [row.group for row in base]
    return paired_difference([row.score for row in base], [row.score for row in other], groups, score=True)


def _slug(label: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in label)
