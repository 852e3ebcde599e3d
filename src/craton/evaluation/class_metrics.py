"""How well labels are given: accuracy, macro F1, the confusion matrix, and Matthews' correlation.

A missing answer (None) is wrong, but is no class: it costs the true class its recall and no other class anything.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from craton.errors import DataError, UsageError

Codes = npt.NDArray[np.int64]
Label = Hashable


@dataclass(frozen=True, eq=False)
class Confusion:
    """How often each class was called what. counts_KM[true, given]: [K, K + 1], the last column for no answer."""

    classes: tuple[Label, ...]
    counts_KM: npt.NDArray[np.int64]

    def accuracy(self) -> float:
        """The share of answers that are right."""
        return float(np.trace(self.counts_KM) / self.counts_KM.sum())

    def macro_f1(self) -> float:
        """The mean of 2 TP / (2 TP + FP + FN) over the classes that were true or given at least once."""
        right, true = np.diagonal(self.counts_KM), self.counts_KM.sum(1)
        both = self.counts_KM.sum(0)[:-1] + true
        occur = both > 0
        return float(np.mean(2 * right[occur] / both[occur])) if occur.any() else 0.0

    def matthews(self) -> float:
        """The correlation of given and true classes, -1 to 1 (Gorodkin 2004); 0 where either is always the same."""
        counts = self.counts_KM.astype(np.float64)
        total, right = counts.sum(), np.trace(counts)
        true, given = counts.sum(1), counts.sum(0)
        together = right * total - true @ given[:-1]
        spread = (total**2 - given @ given) * (total**2 - true @ true)
        return float(together / np.sqrt(spread)) if spread > 0 else 0.0


def accuracy(given: Sequence[Label | None], labels: Sequence[Label]) -> float:
    """The share of given labels that are right. Raises DataError where there is nothing to score."""
    return confusion(given, labels).accuracy()


def macro_f1(given: Sequence[Label | None], labels: Sequence[Label]) -> float:
    """The mean of the classes' F1: rare classes count like others. As scikit-learn's, with 0 for what is undefined."""
    return confusion(given, labels).macro_f1()


def matthews(given: Sequence[Label | None], labels: Sequence[Label]) -> float:
    """Matthews' correlation coefficient for any number of classes; 0 where either side is always the same."""
    return confusion(given, labels).matthews()


def confusion(given: Sequence[Label | None], labels: Sequence[Label]) -> Confusion:
    """Which class was called what, over the classes that occur on either side.

    Raises DataError where there is nothing to score or a true label is missing, UsageError for unequal lengths.
    """
    return confusion_of(*encoded(given, labels))


def encoded(given: Sequence[Label | None], labels: Sequence[Label]) -> tuple[tuple[Label, ...], Codes]:
    """The classes, and [N, 2] the number of the given and of the true class of each item; len(classes) for no answer.

    The rows are what to resample: `estimate_statistic(codes, lambda rows: confusion_of(classes, rows).macro_f1())`.
    """
    if len(given) != len(labels):
        raise UsageError(f"{len(given)} answers for {len(labels)} labels")
    if not len(labels):
        raise DataError("there is nothing to score")
    missing = next((place for place, label in enumerate(labels) if label is None), None)
    if missing is not None:
        raise DataError("an item has no true label", where=f"item {missing}", remedy="label it, or leave it out")
    found = {label for label in (*given, *labels) if label is not None}
    try:
        classes = tuple(sorted(found))  # type: ignore[type-var]  # labels of one kind, as a rule
    except TypeError:
        classes = tuple(sorted(found, key=repr))
    number: dict[Label | None, int] = {label: place for place, label in enumerate(classes)}
    number[None] = len(classes)
    return classes, np.array([[number[label] for label in side] for side in (given, labels)], np.int64).T


def confusion_of(classes: tuple[Label, ...], codes_N2: Codes) -> Confusion:
    """The confusion of items as `encoded` gives them."""
    K = len(classes)
    counts = np.bincount(codes_N2[:, 1] * (K + 1) + codes_N2[:, 0], minlength=K * (K + 1))
    return Confusion(classes, counts.reshape(K, K + 1))
