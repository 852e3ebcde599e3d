"""An index's fusion of words and vectors, tuned on questions whose documents are known, and judged by others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from craton.data.records import read_records
from craton.errors import DataError
from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.items import Item
from craton.evaluation.paired import Difference, paired_difference
from craton.evaluation.ranking_metrics import recall_at
from craton.evaluation.tasks import DataSettings, Task, TaskSettings, load_task, make_task
from craton.retrieval.fusion import DENSE, Fusion, TunedFusion, tune_fusion
from craton.retrieval.index import Index

GOLD_KEYS: Final = ("gold", "document")
RECALL_AT: Final = 5
FEWEST_QUESTIONS: Final = 8
"""Of fewer questions, chance alone says which fusion is better."""
MOST_QUESTIONS: Final = 200


@dataclass(frozen=True)
class Tuning:
    """What was chosen, and how it does on questions that it was not chosen by.

    replaced: the fusion until now. before, after: the share of a held-out question's documents among the first
    RECALL_AT passages, with the old and the new fusion; gain: after less before, in pairs. left_out: questions that
    name no document of the index.
    """

    chosen: TunedFusion
    replaced: Fusion
    before: Estimate
    after: Estimate
    gain: Difference
    left_out: int

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "fusion": str(self.chosen.fusion),
            "replaced": str(self.replaced),
            "reason": self.chosen.reason,
            "questions": self.chosen.questions,
            "left_out": self.left_out,
            f"recall_at_{RECALL_AT}": {
                "before": self.before.as_dict(),
                "after": self.after.as_dict(),
                "gain": self.gain.as_dict(),
            },
        }


def read_questions(source: str | Path) -> Task:
    """The questions of a file, split so that no document is asked about on both sides.

    JSON lines or CSV with a question and, under `gold` or `document`, the name of the document (or a list of them) that
    holds the answer, as the index has it; or a task file or a file in SQuAD's format (see `load_task`).

    Raises DataError for records without these, or of too few documents to split; UsageError and FileFormatError for a
    file that cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in (".toml", ".json"):
        return load_task(path)
    first = next(iter(read_records(str(path))))
    key = next((key for key in GOLD_KEYS if first.value.get(key)), None)
    if key is None:
        raise DataError(
            "no key says which document holds the answer",
            where=first.origin,
            remedy=f"the record has {', '.join(map(repr, first.value))}; call the document's name {GOLD_KEYS[0]!r}",
        )
    # The document is what is to be found, so it is the answer, and what a split never cuts.
    return make_task(
        TaskSettings(data=DataSettings(items=path.name, answer=key, gold=key, group=key)), path.parent, path.stem
    )


def tune_index(index: Index, items: Sequence[Item]) -> TunedFusion:
    """Choose the index's fusion by these questions, at most MOST_QUESTIONS of them, and keep it in the index.

    Each names at least one document of the index as gold. They must not be what the choice is reported on.
    """
    items = items[:MOST_QUESTIONS]
    vectors = index.encoder([item.input for item in items])
    runs = [index.collection.run(item.input, vector) for item, vector in zip(items, vectors, strict=True)]
    tuned = tune_fusion(runs, [set(item.gold) for item in items])
    index.collection.set_fusion(tuned.fusion)
    return tuned


def tune(index: Index, questions: Task, on_progress: Callable[[str], None] = lambda doing: None) -> Tuning:
    """Tune an index's fusion on the training and development questions, keep it, and measure it on the test ones.

    Raises DataError, before anything changes, where too few of them name a document of the index.
    """
    known = {document.name for document in index.collection.documents()}
    given = (*questions.dev, *questions.train)
    held_out = questions.test.open()
    chosen_by = [item for item in given if known.issuperset(item.gold) and item.gold]
    judged_by = [item for item in held_out if known.issuperset(item.gold) and item.gold]
    if len(chosen_by) < FEWEST_QUESTIONS or not judged_by:
        unknown = next((name for item in (*given, *held_out) for name in item.gold if name not in known), None)
        raise DataError(
            f"{len(chosen_by)} questions to tune on and {len(judged_by)} to judge by name a document of the index "
            f"{index.name!r}, of {FEWEST_QUESTIONS} and 1 that are needed",
            where=questions.name if unknown is None else f"{questions.name}: {unknown!r} is not in the index",
            remedy="give more questions, with their documents named as in the sources that `craton ask --json` shows",
        )
    replaced = index.collection.fusion or DENSE
    on_progress(f"tuning on {len(chosen_by[:MOST_QUESTIONS])} questions")
    chosen = tune_index(index, chosen_by)
    on_progress(f"judging by {len(judged_by)} other questions")
    vectors = index.encoder([item.input for item in judged_by])

    def recalls(fusion: Fusion) -> list[float]:
        found = []
        for item, vector in zip(judged_by, vectors, strict=True):
            hits = index.collection.search(item.input, vector, k=RECALL_AT, fusion=fusion)
            found.append(recall_at(list(dict.fromkeys(hit.document for hit in hits)), item.gold, RECALL_AT))
        return found

    before, after = recalls(replaced), recalls(chosen.fusion)
    groups = [item.group for item in judged_by]
    return Tuning(
        chosen,
        replaced,
        estimate(before, groups, score=True),
        estimate(after, groups, score=True),
        paired_difference(before, after, groups, score=True),
        len(given) + len(held_out) - len(chosen_by) - len(judged_by),
    )
