"""Task files: what is asked, what is right, and one split that was made before anything looked at the data.

A task is a TOML file beside its data,

    name = "banking"
    [data]
    train = "train.csv"
    test = "test.csv"
    input = "text"
    answer = "category"

or the data itself: JSON lines or CSV with keys such as `question` and `answer`, or a file in SQuAD's format, whose
paragraphs become documents. Where there is no test data, all items are split by the document that they come from.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from craton.checkpoints.disk import disk_errors
from craton.config import Settings
from craton.config.resolve import read_toml, resolve
from craton.data.json_values import parse_json
from craton.data.records import read_records
from craton.errors import DataError, FileFormatError, UsageError
from craton.evaluation.items import Item
from craton.evaluation.leakage import LeakageReport, find_leaks

Kind = Literal["choice", "answer"]
Metric = Literal["accuracy", "exact_match", "f1", "contains", "rouge_l"]

INPUT_KEYS: Final = ("input", "question", "text", "prompt", "query", "sentence")
ANSWER_KEYS: Final = ("answer", "answers", "label", "category", "output", "completion", "target", "intent")
GROUP_KEYS: Final = ("group", "source", "document", "title")
MOST_CHOICES: Final = 200
# A text of few distinct answers, each seen several times, is a choice; names and numbers are answers.
CHOICE_REPEATS: Final = 4


class DataSettings(Settings):
    """Where a task's items are and under which keys."""

    train: str | None = Field(default=None, description="training items, relative to the task file")
    dev: str | None = Field(default=None, description="development items (none: taken from the training items)")
    test: str | None = Field(default=None, description="test items")
    items: str | None = Field(default=None, description="all items in one file, to be split")
    input: str | None = Field(default=None, description="key of the input (none: input, question, text, ...)")
    answer: str | None = Field(default=None, description="key of the answer or answers (none: answer, label, ...)")
    group: str | None = Field(
        default=None, description="key of the source document, which a split never cuts (none: source, title, ...)"
    )
    gold: str | None = Field(default=None, description="key of the names of the documents that hold the answer")
    slices: tuple[str, ...] = Field(default=(), description="keys to report by, beside length and answer")


class SplitSettings(Settings):
    """How items that come in one file are split, by source document, and how many of each part are used."""

    train: float = Field(default=0.4, gt=0, lt=1, description="share of the items to train on")
    dev: float = Field(default=0.2, gt=0, lt=1, description="share to choose by")
    seed: NonNegativeInt = Field(default=0, description="of the split")
    most_train: PositiveInt = Field(default=2000, description="train on at most so many items")
    most_dev: PositiveInt = Field(default=200, description="choose by at most so many items")
    most_test: PositiveInt = Field(default=1000, description="test on at most so many items")


class TaskSettings(Settings):
    """A task file."""

    name: str | None = Field(default=None, description="the task's name (none: the file's)")
    kind: Kind | None = Field(default=None, description="a choice among classes, or a short answer (none: told)")
    metric: Metric | None = Field(default=None, description="what counts (none: accuracy of choices, F1 of answers)")
    instruction: str | None = Field(default=None, description="what a model is told to do (none: by the kind)")
    choices: tuple[str, ...] = Field(default=(), description="the classes (none: those of the training items)")
    docs: tuple[str, ...] = Field(default=(), description="documents that hold the answers, relative to the task file")
    data: DataSettings = Field(default=DataSettings(), description="The items.")
    split: SplitSettings = Field(default=SplitSettings(), description="The split.")


class Sealed:
    """Test items that nothing looks at before the end. They are opened once, and that is on record."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items: tuple[Item, ...] | None = tuple(items)
        self._count = len(self._items)
        self.digest = digest(self._items)
        groups = {item.group for item in self._items}
        self.groups = len(groups)

    def __len__(self) -> int:
        return self._count

    def open(self) -> tuple[Item, ...]:
        """The items, once. Raises UsageError the second time: what was seen is no test any more."""
        if self._items is None:
            raise UsageError("the test items were opened already", remedy="a second look at a test is not a test")
        items, self._items = self._items, None
        return items


@dataclass(frozen=True)
class Task:
    """A task, split. docs: documents that hold the answers, as the task file names them, relative to `folder`.
    passages: documents that came with the data, by name. leaks: training and development items that nearly repeat a
    test item, which were removed. decisions: what was decided for the user, a sentence each."""

    name: str
    kind: Kind
    metric: Metric
    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: Sealed
    instruction: str | None = None
    choices: tuple[str, ...] = ()
    docs: tuple[str, ...] = ()
    folder: Path = Path()
    passages: Mapping[str, str] = field(default_factory=dict)
    leaks: LeakageReport | None = None
    slices: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is measured and learnt from, the sealed items included. It does not depend on
        where the task lies; of documents that are not in it, it knows the names and not the content."""
        said = [self.name, self.kind, self.metric, self.instruction, self.choices, self.docs, self.slices]
        items = [digest(self.train), digest(self.dev), self.test.digest]
        return hashlib.sha256(json.dumps([said, list(self.passages.items()), items]).encode()).hexdigest()

    @property
    def sources(self) -> tuple[str, ...]:
        """The documents to read: paths, and packages as "package:NAME"."""
        return tuple(doc if doc.startswith("package:") else str(self.folder / doc) for doc in self.docs)


def digest(items: Iterable[Item]) -> str:
    """SHA-256, in hex, of all that items hold, in their order."""
    state = hashlib.sha256()
    for item in items:
        held = [item.id, item.input, item.answers, item.group, item.gold, sorted(item.fields.items())]
        state.update(json.dumps(held).encode())
    return state.hexdigest()


def load_task(source: str | Path) -> Task:
    """The task in a TOML file, or the one that a data file makes.

    Raises UsageError, FileFormatError and DataError for files, keys and items that make no task.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() == ".toml":
        settings, folder = resolve(TaskSettings, [(str(path), read_toml(path, "the task"))])[0], path.parent
    else:
        settings, folder = TaskSettings(data=DataSettings(items=path.name)), path.parent
    return make_task(settings, folder, settings.name or path.stem)


def read_items(path: str | Path, data: DataSettings | None = None) -> list[Item]:
    """The items in one file. Raises DataError and FileFormatError for what makes none."""
    path = Path(path).expanduser()
    return _Reader(data or DataSettings(), path.parent).read(path.name)


def make_task(settings: TaskSettings, folder: Path, name: str) -> Task:
    """The task that `settings` describe; their paths are relative to `folder`."""
    data = settings.data
    if (data.items is None) == (data.train is None and data.test is None):
        raise UsageError(
            "a task needs either its items in one file or training and test items",
            where=name,
            remedy='say [data] items = "FILE", or train = "FILE" and test = "FILE"',
        )
    reader = _Reader(data, folder)
    decisions: list[str] = []
    if data.items is not None:
        train, dev, test = split_by_group(reader.read(data.items), settings.split)
        groups = len({item.group for item in (*train, *dev, *test)})
        decisions.append(f"split by {groups:,} source documents before anything else")
    else:
        train = reader.read(data.train) if data.train else []
        test = reader.read(data.test) if data.test else []
        dev = reader.read(data.dev) if data.dev else []
        if not dev and train:
            share = settings.split.dev / (settings.split.train + settings.split.dev)
            dev, train = part_by_group(train, share, settings.split.seed)
            decisions.append("development items taken from the training items, by source document")
    if not test:
        raise DataError("there are no test items", where=name)
    train, dev, leaks = without_leaks(train, dev, test)
    if leaks.pairs:
        decisions.append(
            f"near-duplicates of test items removed from the rest: {leaks.exact} exact, {leaks.overlap_13} sharing 13 "
            f"words, {leaks.near} by MinHash"
        )
    kind = settings.kind or _kind(settings.choices, [*train, *dev] or test)
    metric = settings.metric or ("accuracy" if kind == "choice" else "f1")
    known = settings.choices or tuple(sorted({item.answers[0] for item in (train or test)}))
    choices = known if kind == "choice" else ()
    if kind == "choice" and not settings.choices:
        decisions.append(f"{len(choices)} classes, those of the {'training' if train else 'test'} items")
    split = settings.split
    return Task(
        name=name,
        kind=kind,
        metric=metric,
        train=tuple(sample(train, split.most_train, split.seed)),
        dev=tuple(sample(dev, split.most_dev, split.seed)),
        test=Sealed(sample(test, split.most_test, split.seed)),
        instruction=settings.instruction,
        choices=choices,
        docs=settings.docs,
        folder=folder,
        passages=reader.passages,
        leaks=leaks,
        slices=data.slices,
        decisions=tuple(decisions),
    )


def split_by_group(items: Sequence[Item], split: SplitSettings) -> tuple[list[Item], list[Item], list[Item]]:
    """(train, development, test), no source document in two of them, in shares as near as whole documents allow."""
    if split.train + split.dev >= 1:
        raise UsageError("the shares of train and dev leave nothing to test on", where="[split]")
    rest, test = part_by_group(items, split.train + split.dev, split.seed, least=2)
    dev, train = part_by_group(rest, split.dev / (split.train + split.dev), split.seed + 1)
    return train, dev, test


def part_by_group(items: Sequence[Item], share: float, seed: int, *, least: int = 1) -> tuple[list[Item], list[Item]]:
    """(about `share` of the items, the rest), cut between source documents, at least so many of them in the first part
    and one in the second. Raises DataError if there are fewer."""
    groups = list(dict.fromkeys(item.group for item in items))
    if len(groups) <= least:
        known = "one source document" if len(groups) == 1 else f"{len(groups)} source documents"
        raise DataError(
            f"all {len(items)} items come from {known}, too few to split them",
            remedy="name another key by [data] group, or give test items of their own",
        )
    sizes = Counter(item.group for item in items)
    chosen: set[str] = set()
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(groups)).tolist():
        size = sizes[groups[index]]
        if len(chosen) < least or taken + size / 2 <= share * len(items):
            chosen.add(groups[index])
            taken += size
    if len(chosen) == len(groups):
        chosen.discard(min(chosen, key=lambda group: (sizes[group], group)))
    return [i for i in items if i.group in chosen], [i for i in items if i.group not in chosen]


class _Reader:
    """Reads files of items, and collects the documents that come with them."""

    def __init__(self, data: DataSettings, folder: Path) -> None:
        self._data, self._folder = data, folder
        self.passages: dict[str, str] = {}

    def read(self, name: str) -> list[Item]:
        path = self._folder / name
        items = self._squad(path) if path.suffix.lower() == ".json" else None
        if items is None:
            items = [self._item(record.value, record.origin) for record in read_records(str(path))]
        if not items:
            raise DataError("there are no items", where=str(path))
        return items

    def _item(self, value: Mapping[str, Any], origin: str) -> Item:
        question = value[_key(value, self._data.input, INPUT_KEYS, "input", origin)]
        answer_key = _key(value, self._data.answer, ANSWER_KEYS, "answer", origin)
        raw = value[answer_key]
        answers = tuple(str(one) for one in (raw if isinstance(raw, list) else [raw]))
        if not str(question).strip() or not answers or not all(answer.strip() for answer in answers):
            raise DataError("an item needs an input and an answer, and one of them is empty", where=origin)
        group_key = self._data.group or next((key for key in GROUP_KEYS if value.get(key)), None)
        if group_key is not None and group_key not in value:
            raise DataError(f"there is no key {group_key!r}", where=origin)
        gold = value.get(self._data.gold or "gold") or ()
        return Item(
            id=origin.rpartition("/")[2],
            input=str(question),
            answers=answers,
            group=str(value[group_key]) if group_key else origin.removeprefix(f"{self._folder}/"),
            gold=(gold,) if isinstance(gold, str) else tuple(map(str, gold)),
            # A prompt may use any field but the answer.
            fields={k: str(v) for k, v in value.items() if isinstance(v, str | int | float) and k != answer_key},
        )

    def _squad(self, path: Path) -> list[Item] | None:
        """The items of a file in SQuAD's format (Rajpurkar et al. 2016); None for other JSON."""
        with disk_errors("read the items", path):
            raw = path.read_bytes()
        value = parse_json(raw.decode(errors="replace"), str(path))
        if not isinstance(value, dict) or not isinstance(value.get("data"), list):
            return None
        items = []
        try:
            for number, article in enumerate(value["data"], 1):
                title = str(article.get("title") or f"article {number}")
                for place, paragraph in enumerate(article["paragraphs"], 1):
                    name = f"{title}, paragraph {place}"
                    self.passages[name] = paragraph["context"]
                    for question in paragraph["qas"]:
                        answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
                        if answers:  # SQuAD 2 has questions without an answer
                            item = Item(str(question["id"]), question["question"], answers, title, (name,))
                            items.append(item)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"not SQuAD's format: {error} is missing or wrong", where=str(path)) from None
        return items


def _key(value: Mapping[str, Any], named: str | None, usual: Sequence[str], what: str, origin: str) -> str:
    found = named if named is not None else next((key for key in usual if value.get(key) not in (None, "")), None)
    if found is None or value.get(found) is None:
        raise DataError(
            f"there is no key {named!r}" if named else f"no key says what the {what} is",
            where=origin,
            remedy=f'the record has {", ".join(map(repr, value))}; name one in the task file: [data] {what} = "KEY"',
        )
    return found


def _kind(choices: Sequence[str], items: Sequence[Item]) -> Kind:
    if choices:
        return "choice"
    counts = Counter(item.answers[0] for item in items)
    single = all(len(item.answers) == 1 and not item.gold for item in items)
    return (
        "choice" if single and len(counts) <= MOST_CHOICES and len(items) >= CHOICE_REPEATS * len(counts) else "answer"
    )


def sample(items: Sequence[Item], most: int, seed: int) -> list[Item]:
    """At most so many items, drawn with a seed, in their order."""
    if len(items) <= most:
        return list(items)
    chosen = np.random.default_rng((seed, len(items))).permutation(len(items))[:most]
    return [items[index] for index in sorted(chosen.tolist())]


def without_leaks(train: list[Item], dev: list[Item], test: list[Item]) -> tuple[list[Item], list[Item], LeakageReport]:
    """The training and development items that repeat no test item, and what was found (see `find_leaks`)."""
    rest = [*train, *dev]
    leaks = find_leaks([item.input for item in rest], [item.input for item in test])
    leaked = {index for index, _, _ in leaks.pairs}
    kept_train = [item for index, item in enumerate(train) if index not in leaked]
    kept_dev = [item for index, item in enumerate(dev, len(train)) if index not in leaked]
    return kept_train, kept_dev, leaks
