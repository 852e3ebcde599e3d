"""What models are judged by while they are trained, on whole evaluation sets."""

from __future__ import annotations

from math import log

import numpy as np
import numpy.typing as npt

from craton.errors import UsageError

Labels = npt.NDArray[np.int64]
Scores = npt.NDArray[np.floating]
Relevance = npt.NDArray[np.bool_]


def accuracy(predicted_N: Labels, labels_N: Labels) -> float:
    """The share of predictions that are right."""
    _check_length(predicted_N, labels_N)
    return float(np.mean(predicted_N == labels_N))


def macro_f1(predicted_N: Labels, labels_N: Labels) -> float:
    """The mean, over the classes that occur in either, of 2 TP / (2 TP + FP + FN): rare classes count like others."""
    _check_length(predicted_N, labels_N)
    scores = []
    for label in np.union1d(predicted_N, labels_N):
        given, true = predicted_N == label, labels_N == label
        scores.append(2 * np.sum(given & true) / (np.sum(given) + np.sum(true)))
    return float(np.mean(scores))


def mean_reciprocal_rank(scores_QC: Scores, relevant_QC: Relevance) -> float:
    """The mean over queries of 1 / rank of the first relevant candidate. Of equal scores the relevant ones rank last,
    so that a model which cannot tell them apart gains nothing."""
    first_Q = _ranked(scores_QC, relevant_QC).argmax(1)
    return float(np.mean(1 / (first_Q + 1)))


def recall_at_k(scores_QC: Scores, relevant_QC: Relevance, k: int) -> float:
    """The mean over queries of the share of the relevant candidates that are among the k best; ties as above."""
    found_Q = _ranked(scores_QC, relevant_QC)[:, :k].sum(1)
    return float(np.mean(found_Q / relevant_QC.sum(1)))


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Summed cross-entropy in bits over the bytes of the text itself (its UTF-8, not what its tokens decode to).

    Models of different tokenisers, and compressors, compare by it. Raises UsageError where there is no text.
    """
    if text_bytes < 1:
        raise UsageError("there is no text to measure")
    return nats / log(2) / text_bytes


def _ranked(scores_QC: Scores, relevant_QC: Relevance) -> Relevance:
    # The relevance of each query's candidates, best score first.
    if not relevant_QC.any(1).all() or not len(relevant_QC):
        raise UsageError("a query has no relevant candidate", remedy="leave it out")
    order_QC = np.lexsort((relevant_QC, -scores_QC))
    return np.take_along_axis(relevant_QC, order_QC, 1)


def _check_length(predicted_N: Labels, labels_N: Labels) -> None:
    if len(predicted_N) != len(labels_N) or not len(labels_N):
        raise UsageError(f"{len(predicted_N)} predictions for {len(labels_N)} labels")
