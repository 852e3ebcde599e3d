"""Whether confidence means what it says: of answers given with 80 % confidence, 80 % should be right.

confidence[N]: probabilities; correct[N]: whether each answer was right. All raise DataError for none, for what is not
finite or not a probability, and UsageError for unequal lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from craton.errors import DataError, UsageError

Array = npt.NDArray[np.float64]
Numbers = Sequence[float] | npt.NDArray[np.generic]


@dataclass(frozen=True)
class ReliabilityBin:
    """A point of a reliability diagram: n answers with confidence in (low, high], the means of both."""

    low: float
    high: float
    confidence: float
    accuracy: float
    n: int

    def as_dict(self) -> dict[str, float]:
        """The JSON form."""
        return asdict(self)


def expected_calibration_error(
    confidence: Numbers, correct: Numbers, bins: int = 10, *, adaptive: bool = False
) -> float:
    """The mean, over answers, of the gap between mean confidence and accuracy of the answer's bin (Guo et al. 2017).

    Bins are equally wide, or hold equally many answers (adaptive; Nguyen and O'Connor 2015). It is biased upwards
    where bins hold few answers: compare models on the same items, and give its interval.
    """
    table = reliability_table(confidence, correct, bins, adaptive=adaptive)
    return sum(row.n * abs(row.confidence - row.accuracy) for row in table) / sum(row.n for row in table)


def reliability_table(
    confidence: Numbers, correct: Numbers, bins: int = 10, *, adaptive: bool = False
) -> list[ReliabilityBin]:
    """The bins that hold any answer, by rising confidence. Answers of equal confidence always share one, so that
    adaptive bins may be fewer and larger."""
    confidence_N, correct_N = _checked(confidence, correct)
    if bins < 1:
        raise UsageError(f"{bins} bins: there must be at least one")
    if adaptive:
        last_B = np.arange(1, bins + 1) * len(confidence_N) // bins - 1
        upper_B = np.unique(np.sort(confidence_N)[np.maximum(last_B, 0)])
    else:
        upper_B = np.arange(1, bins + 1) / bins
    bin_N = np.searchsorted(upper_B, confidence_N)  # the first bin whose upper edge is not below
    size_B = np.bincount(bin_N, minlength=len(upper_B))
    sum_B = np.bincount(bin_N, confidence_N, len(upper_B))
    right_B = np.bincount(bin_N, correct_N, len(upper_B))
    table = []
    for b in np.flatnonzero(size_B):
        low = float(upper_B[b - 1]) if b else 0.0
        n = int(size_B[b])
        table.append(ReliabilityBin(low, float(upper_B[b]), float(sum_B[b] / n), float(right_B[b] / n), n))
    return table


def brier(confidence: Numbers, correct: Numbers) -> float:
    """The mean squared gap between confidence and outcome, 0 to 1, lower is better (Brier 1950). 0.25: always 0.5."""
    confidence_N, correct_N = _checked(confidence, correct)
    return float(np.mean((confidence_N - correct_N) ** 2))


def brier_multiclass(probabilities_NK: npt.ArrayLike, labels_N: Sequence[int] | npt.NDArray[np.integer]) -> float:
    """Brier's score as he defined it, 0 to 2: squared gaps summed over K classes. labels: the number of the true class.

    Raises DataError for rows that are no distribution, UsageError for labels that are no class.
    """
    given_NK, label_N = np.asarray(probabilities_NK, np.float64), np.asarray(labels_N)
    if given_NK.ndim != 2 or len(given_NK) != len(label_N):
        raise UsageError(f"probabilities of shape {given_NK.shape} for {len(label_N)} labels")
    if not len(label_N):
        raise DataError("there is nothing to score")
    wrong = ~((given_NK >= 0).all(1) & (np.abs(given_NK.sum(1) - 1) < 1e-3))
    if wrong.any():
        raise DataError("probabilities that do not add up to 1", where=f"item {int(wrong.argmax())}")
    if not ((label_N >= 0) & (label_N < given_NK.shape[1])).all():
        raise UsageError(f"a label is not one of the {given_NK.shape[1]} classes")
    true_NK = np.eye(given_NK.shape[1])[label_N]
    return float(np.mean(np.sum((given_NK - true_NK) ** 2, axis=1)))


def _checked(confidence: Numbers, correct: Numbers) -> tuple[Array, Array]:
    confidence_N, correct_N = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if confidence_N.shape != correct_N.shape or confidence_N.ndim != 1:
        raise UsageError(f"{confidence_N.shape} confidences for {correct_N.shape} outcomes")
    if not len(confidence_N):
        raise DataError("there is nothing to score")
    for name, values in (("confidence", confidence_N), ("outcome", correct_N)):
        wrong = ~((values >= 0) & (values <= 1))
        if wrong.any():
            place = int(wrong.argmax())
            raise DataError(f"{name} {values[place]} is not between 0 and 1", where=f"item {place}")
    return confidence_N, correct_N
