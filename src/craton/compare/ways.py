"""The ways to adapt a model to a task, each made ready on training and development items only."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from craton.checkpoints.disk import replace_file, trim_heap
from craton.compare.settings import (
    LORA,
    LORA_RETRIEVAL,
    PROMPT,
    RETRIEVAL,
    ZERO_SHOT,
    CompareSettings,
)
from craton.config.resolve import resolve
from craton.errors import UsageError
from craton.evaluation.items import Answer, Answerer, Item
from craton.evaluation.tasks import Task
from craton.evaluation.text_metrics import normalise_answer
from craton.finetuning.finetune import finetune, resume
from craton.finetuning.loading import load
from craton.finetuning.settings import FinetuneSettings, usual
from craton.inference.conversations import conversation_text
from craton.inference.model import Model
from craton.inference.plan import DTypeChoice
from craton.prompting.answering import FindPassages, Passage, PromptedModel
from craton.prompting.defaults import INSTRUCTIONS, default_prompt, instructions
from craton.prompting.examples import ExamplePool
from craton.prompting.optimize import optimize_prompt
from craton.prompting.prompt import ExampleSettings, Prompt
from craton.prompting.search import Budget, successive_halving
from craton.prompting.settings import OptimizeSettings
from craton.retrieval.index import Index
from craton.retrieval.tuning import FEWEST_QUESTIONS, tune_index
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run
from craton.training.estimate import Estimate
from craton.training.session import Hooks, Job

MAJORITY, ORACLE, RANDOM = "majority", "oracle context", "random context"
# A prompt that lists more classes than this is too long to fine-tune with: the adapter learns them.
LISTED_CHOICES: Final = 12
# Fine-tuning with retrieved texts reads long prompts; more of them than these teach little more.
TRAINED_PASSAGES: Final = 2
TRAINED_EXAMPLES: Final = 4


@dataclass(frozen=True)
class Recipe:
    """A way that is ready: what answers, and what it took. All of it is written down before the test is opened.

    passages: how many retrieved texts it shows. adapters: ids in the store, one for each seed; none: the base alone.
    setup, update: seconds. tried: candidates. dev: the development score of each candidate that saw all items.
    """

    way: str
    model: str
    prompt: Prompt
    passages: int = 0
    adapters: tuple[str, ...] = ()
    setup: float = 0.0
    update: float = 0.0
    tried: int = 1
    tokens: int = 0
    dev: float | None = None
    stopped: str = "done"
    notes: tuple[str, ...] = ()

    def save(self, path: Path) -> None:
        """Write it down."""
        replace_file(path, json_bytes(asdict(self) | {"prompt": self.prompt.model_dump(mode="json")}))

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read what `save` wrote."""
        value = read_object(path)
        lists = {key: tuple(value[key]) for key in ("adapters", "notes")}
        return cls(**value | lists | {"prompt": Prompt.model_validate(value["prompt"])})


@dataclass
class Workshop:
    """What all ways of one model share: the task, the base, the pool of examples, the index.

    index: None where there are no documents; then training examples are what is retrieved. index_seconds: what it took
    to build and tune. folder: of the run. on_progress: is told what is being done.
    """

    task: Task
    settings: CompareSettings
    model: str
    dtype: DTypeChoice
    pool: ExamplePool
    index: Index | None
    index_seconds: float
    folder: Path
    on_progress: Callable[[str], None] = lambda doing: None
    _loaded: tuple[str, Model] | None = field(default=None, repr=False)

    def loaded(self, name: str) -> Model:
        """The base, or an adapter merged into it; the last one is kept."""
        if self._loaded is None or self._loaded[0] != name:
            self._loaded = None  # before the next one takes memory
            self._loaded = (name, load(name, dtype=self.dtype, threads=self.settings.threads))
        return self._loaded[1]

    def release(self) -> None:
        """Forget the loaded model, and give back what it and a training took."""
        self._loaded = None
        trim_heap()

    def answerer(self, recipe: Recipe, seed: int = 0, find: FindPassages | None = None) -> PromptedModel:
        """What answers by a recipe: with the adapter of this seed, and with `find` in place of its own search."""
        name = recipe.adapters[seed] if recipe.adapters else self.model
        passages = find or (self.finder(recipe.passages) if recipe.passages else None)
        return PromptedModel(
            self.loaded(name),
            recipe.prompt,
            choices=self.task.choices,
            pool=self.pool,
            passages=passages,
            seed=self.settings.seed + seed,
        )

    def finder(self, count: int) -> FindPassages:
        """The search: so many passages for an item, the best first."""
        index = self.index
        assert index is not None

        def find(item: Item) -> list[Passage]:
            return [Passage(hit.document, hit.text) for hit in index.search(item.input, count)]

        return find

    def prepare(self, way: str) -> Recipe:
        """Make a way ready within its budget; what was made ready before an interruption is taken up again."""
        path = self.folder / "ways" / f"{slug(self.model)}-{slug(way)}.json"
        if path.exists():
            return Recipe.load(path)
        path.parent.mkdir(exist_ok=True)
        recipe = {
            ZERO_SHOT: self._zero_shot,
            PROMPT: self._prompt,
            RETRIEVAL: self._retrieval,
            LORA: self._lora,
            LORA_RETRIEVAL: self._lora_retrieval,
        }[way]()
        recipe.save(path)
        return recipe

    def _zero_shot(self) -> Recipe:
        return Recipe(ZERO_SHOT, self.model, default_prompt(self.task.kind, self.task.instruction))

    def _prompt(self) -> Recipe:
        search = optimize_prompt(
            self.loaded(self.model),
            self.task,
            self._zero_shot().prompt,
            OptimizeSettings(
                trials=self.settings.trials, minutes=self.settings.minutes, shots=(0, 2, 6), seed=self.settings.seed
            ),
            embed=self.pool.embed,
            on_progress=lambda doing: self.on_progress(f"prompt: {doing}"),
        )
        best = search.best
        return Recipe(
            PROMPT,
            self.model,
            best.candidate,
            setup=search.seconds,
            tried=len(search.trials),
            tokens=search.tokens,
            dev=best.score,
            stopped=search.stopped,
            notes=tuple(_trial_note(trial.candidate, trial.score, len(trial.rows)) for trial in search.trials[:5]),
        )

    def _retrieval(self) -> Recipe:
        candidates = self.retrieval_candidates()[: self.settings.trials]

        def make(candidate: tuple[Prompt, int]) -> PromptedModel:
            return self.answerer(Recipe(RETRIEVAL, self.model, candidate[0], candidate[1]))

        search = successive_halving(
            candidates,
            make,
            self.task.dev,
            self.task.metric,
            budget=Budget(seconds=60 * self.settings.minutes),
            seed=self.settings.seed,
            on_progress=lambda doing: self.on_progress(f"retrieval: {doing}"),
        )
        prompt, count = search.best.candidate
        return Recipe(
            RETRIEVAL,
            self.model,
            prompt,
            passages=count,
            setup=self.index_seconds + search.seconds,
            update=self.index_seconds,
            tried=len(search.trials),
            tokens=search.tokens,
            dev=search.best.score,
            stopped=search.stopped,
            notes=tuple(
                f"{t.candidate[1]} passages, {_trial_note(t.candidate[0], t.score, len(t.rows))}"
                for t in search.trials[:5]
            ),
        )

    def retrieval_candidates(self) -> list[tuple[Prompt, int]]:
        """Prompts that show what was retrieved: passages of the documents, or the nearest training examples."""
        task, settings = self.task, self.settings
        said = instructions(task.kind, task.instruction)
        if self.index is not None:
            base = default_prompt(task.kind, task.instruction, passages=True)
            counts = sorted(settings.passages, key=lambda n: abs(n - 2))
            # Examples with their passages show how to answer from one; as they are the same for all questions, the
            # model reads them once.
            worked = ExampleSettings(count=min(3, len(task.train)), passages=True, seed=settings.seed)
            forms = (
                base,
                base.model_copy(update={"form": "text", "examples": worked}),
                base.model_copy(update={"examples": worked}),
            )
            # Numbers of passages and forms first, then other words: the first of a budget differ most.
            return [(form.model_copy(update={"system": s}), n) for s in said for form in forms for n in counts]
        base = default_prompt(task.kind, task.instruction)
        short = _unlisted(base, task)
        shown = [ExampleSettings(count=n, choose="similar") for n in sorted(settings.examples, reverse=True)]
        prompts = [short, *(base.model_copy(update={"system": s}) for s in said)]
        return [(p.model_copy(update={"examples": e}), 0) for p in dict.fromkeys(prompts) for e in shown]

    def _lora(self) -> Recipe:
        prompt = _unlisted(default_prompt(self.task.kind, self.task.instruction), self.task)
        return self._trained(Recipe(LORA, self.model, prompt))

    def _lora_retrieval(self) -> Recipe:
        found = self.prepare(RETRIEVAL)
        prompt, count = found.prompt, min(found.passages, TRAINED_PASSAGES)
        if self.index is None:
            shown = ExampleSettings(count=min(prompt.examples.count, TRAINED_EXAMPLES), choose="similar")
            prompt = _unlisted(prompt, self.task).model_copy(update={"examples": shown})
        # It needs the search for the best retrieval first; facts that change need a new index and a new adapter.
        return self._trained(Recipe(LORA_RETRIEVAL, self.model, prompt, count, setup=found.setup, update=found.update))

    def _trained(self, recipe: Recipe) -> Recipe:
        """The recipe with adapters, one for each seed, trained on the prompts that the test will use."""
        name = slug(recipe.way)
        data = self.folder / "data" / f"{slug(self.model)}-{name}.jsonl"
        if not data.exists():
            self._write_rows(recipe, data)
        self.release()  # nothing may hold the model that answers while another one is trained
        settings, expected = self._fitted(data)
        seconds = 60 * self.settings.minutes / self.settings.seeds
        note = f"{settings.training.epochs:.2g} epochs"
        if expected > seconds:
            # Fewer passes, so that all seeds together keep to the budget.
            epochs = settings.training.epochs * seconds / expected
            note = f"{epochs:.2g} epochs instead of {settings.training.epochs:.2g}, to keep to the budget"
            training = settings.training.model_copy(update={"epochs": epochs})
            settings = settings.model_copy(update={"training": training})
        adapters, taken = [], []
        for seed in range(self.settings.seeds):
            self.on_progress(f"{recipe.way}: fine-tuning, seed {seed + 1} of {self.settings.seeds}")
            adapter, spent = self._fine_tune(data, settings, recipe.way, seed)
            self.release()
            adapters.append(adapter)
            taken.append(spent)
        return Recipe(
            **{f: getattr(recipe, f) for f in ("way", "model", "prompt", "passages")},
            adapters=tuple(adapters),
            setup=recipe.setup + float(np.mean(taken)),
            update=recipe.update + float(np.mean(taken)),
            tried=1,
            stopped="seconds" if expected > seconds else "done",
            notes=(note, f"rank {self.settings.rank}, learning rate {self.settings.learning_rate:g}"),
        )

    def _write_rows(self, recipe: Recipe, data: Path) -> None:
        data.parent.mkdir(exist_ok=True)
        self.on_progress(f"{recipe.way}: writing {len(self.task.train)} training prompts")
        answerer = self.answerer(Recipe(recipe.way, self.model, recipe.prompt, recipe.passages))
        rows = [training_row(answerer, item) for item in self.task.train]
        replace_file(data, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())

    def _fitted(self, data: Path) -> tuple[FinetuneSettings, float]:
        """The settings of the training, and the seconds that it is expected to take."""
        chosen = self.settings
        layer = {
            "holdout": 0.0,
            "lora": {"rank": chosen.rank, "alpha": 2.0 * chosen.rank},
            "training": {
                "learning_rate": chosen.learning_rate,
                "epochs": chosen.epochs,
                "batch": 16,
                "threads": chosen.threads,
            },
        }
        settings, _ = resolve(FinetuneSettings, [("usual for sft", usual("sft", "lora")), ("compare", layer)])
        told: list[float] = []

        def ready(run: Run | None, job: Job, expected: Estimate) -> None:
            told.append(sum(expected.seconds) / 2)

        finetune(self.model, [str(data)], settings, {}, Hooks(on_ready=ready), dry_run=True)
        return settings, told[0]

    def _fine_tune(self, data: Path, settings: FinetuneSettings, way: str, seed: int) -> tuple[str, float]:
        """The id of the adapter and the seconds that it took; a run that was interrupted goes on."""
        record = self.folder / "ways" / f"{slug(self.model)}-{slug(way)}-seed{seed}.json"
        hooks = Hooks(on_ready=lambda run, job, expected: self._begun(record, run))
        started = time.perf_counter()
        if record.exists():
            run = Run.open(str(read_object(record)["run"]))
            if run.status == "done":
                return str((run.record.result or {})["model"]), run.seconds
            result = resume(run, Hooks())
            return _published(result), run.seconds
        training = settings.training.model_copy(update={"seed": settings.training.seed + seed})
        named = settings.model_copy(update={"name": f"{slug(self.task.name)}-{slug(way)}", "training": training})
        made = finetune(self.model, [str(data)], named, {}, hooks)
        return _published(made), time.perf_counter() - started

    @staticmethod
    def _begun(record: Path, run: Run | None) -> None:
        if run is not None:
            replace_file(record, json_bytes({"run": run.id}))


def majority(task: Task) -> Answerer:
    """Always the most frequent answer of the training items: what any way must beat."""
    counts = Counter(item.answers[0] for item in (task.train or task.dev))
    [(text, _)] = counts.most_common(1) or [("", 0)]

    def answer(item: Item) -> Answer:
        return Answer(text, None, 0, 0, 0.0)

    return answer


def oracle(index: Index) -> FindPassages:
    """The passage of the gold document that holds the answer: what retrieval could be at its best."""

    def find(item: Item) -> list[Passage]:
        for name in item.gold:
            document = index.collection.document(name)
            chunks = index.collection.chunks(name)
            holding = [chunk for chunk in chunks if _holds(chunk.text, item)]
            text = (holding or chunks)[0].text if chunks else document.text
            return [Passage(name, text)]
        return []

    return find


def random_passages(index: Index, count: int, seed: int) -> FindPassages:
    """Passages drawn from the documents at random: what it is worth that passages are the right ones."""
    names = [document.name for document in index.collection.documents()]

    def find(item: Item) -> list[Passage]:
        rng = np.random.default_rng([seed, *item.id.encode()[:64]])
        found = []
        for place in rng.permutation(len(names))[:count].tolist():
            chunks = index.collection.chunks(names[place])
            if chunks:
                found.append(Passage(names[place], chunks[int(rng.integers(len(chunks)))].text))
        return found

    return find


def tune(index: Index, task: Task) -> str:
    """Choose the index's fusion by the development and training items; the sentence that says what was chosen."""
    known = {document.name for document in index.collection.documents()}
    items = [item for item in (*task.dev, *task.train) if set(item.gold) & known]
    if len(items) < FEWEST_QUESTIONS:
        return "vectors alone: too few questions say which document holds their answer, so no fusion was tuned"
    tuned = tune_index(index, items)
    return f"fusion tuned on {tuned.questions} questions: {tuned.reason}"


def training_row(answerer: PromptedModel, item: Item) -> dict[str, Any]:
    """A training record: exactly the conversation that the test will hold, and the right answer."""
    messages = answerer.conversation(item)
    if answerer.prompt.form == "chat" and answerer.model.tokenizer.chat_template is not None:
        return {"messages": [*messages, {"role": "assistant", "content": item.answers[0]}]}
    return {"prompt": conversation_text(messages), "completion": f" {item.answers[0]}"}


def slug(text: str) -> str:
    """A name for files and the store."""
    plain = "".join(c if c.isascii() and c.isalnum() else "-" for c in text.lower())
    return "-".join(filter(None, plain.split("-")))[-60:].lstrip("-") or "x"


def _unlisted(prompt: Prompt, task: Task) -> Prompt:
    """The prompt without a list of many classes in its instruction."""
    if len(task.choices) <= LISTED_CHOICES or prompt.system is None or "choices" not in prompt.variables:
        return prompt
    return prompt.model_copy(update={"system": INSTRUCTIONS["choice"][1]})


def _holds(text: str, item: Item) -> bool:
    plain = f" {normalise_answer(text)} "
    return any(f" {normalise_answer(answer)} " in plain for answer in item.answers)


def _published(result: Any) -> str:
    if result is None or result.model is None:
        raise UsageError("the fine-tuning published no adapter")
    return str(result.model.id)


def _trial_note(prompt: Prompt, score: float, items: int) -> str:
    shown = prompt.examples
    examples = f"{shown.count} {shown.choose} examples" if shown.count else "no examples"
    return f"{score:.1%} of {items}: {examples}, {prompt.answer.scoring}, “{prompt.system or ''}”"
