"""One ranking from two: scores of words and scores of vectors, fused as a development split says.

Fusing is not always better. On the BoolQ passages (12,271 of them, MiniLM) reciprocal ranks of equal weight were worse
than the vectors alone (nDCG@10 0.838 against 0.855), so nothing is fused until `tune_fusion` has seen it help.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from craton.config import Settings
from craton.errors import DataError, UsageError

DEPTH: Final = 10  # the cut of nDCG

K = TypeVar("K", bound=Hashable)


class Fusion(Settings):
    """How the scores of words (BM25) and of vectors (cosine) become one score."""

    kind: Literal["dense", "lexical", "linear", "rrf"] = Field(
        "dense", description="vectors alone, words alone, a weighted sum of scores, or of reciprocal ranks"
    )
    weight: float = Field(0.5, ge=0, le=1, description="the share of the vectors; the rest is that of the words")
    normal: Literal["minmax", "z"] = Field(
        "minmax", description="how a weighted sum makes scores alike: laid between 0 and 1, or in standard deviations"
    )
    constant: float = Field(60.0, ge=0, description="added to every rank before its reciprocal is taken")

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear ({self.normal}), {self.weight:g} dense"
        if self.kind == "rrf":
            return f"rrf (constant {self.constant:g}), {self.weight:g} dense"
        return self.kind

    def fuse(self, lexical_N: NDArray[np.float64], dense_N: NDArray[np.float64]) -> NDArray[np.float64]:
        """One score for each of N candidates; NaN is a candidate that one side did not find, -inf comes back for one
        that this fusion does not look at."""
        if self.kind in ("dense", "lexical"):
            score_N = dense_N if self.kind == "dense" else lexical_N
            return np.where(np.isnan(score_N), -np.inf, score_N)
        side = _reciprocal if self.kind == "rrf" else _minmax if self.normal == "minmax" else _standard
        return self.weight * side(dense_N, self.constant) + (1 - self.weight) * side(lexical_N, self.constant)


DENSE: Final = Fusion(kind="dense")
LEXICAL: Final = Fusion(kind="lexical")


@dataclass(frozen=True)
class Run:
    """What both searches found for one question. documents: whose chunk each is; its best chunk places a document."""

    documents: Sequence[Hashable]
    lexical_N: NDArray[np.float64]
    dense_N: NDArray[np.float64]

    @staticmethod
    def of(
        lexical: Mapping[K, float], dense: Mapping[K, float], document_of: Mapping[K, Hashable] | None = None
    ) -> Run:
        """A run from two mappings of candidates to scores."""
        keys = list(dict.fromkeys([*dense, *lexical]))
        return Run(
            [document_of[key] if document_of else key for key in keys],
            np.array([lexical.get(key, math.nan) for key in keys], dtype=np.float64),
            np.array([dense.get(key, math.nan) for key in keys], dtype=np.float64),
        )


@dataclass(frozen=True)
class Trial:
    """One row of the report. gain: its mean nDCG@10 less that of the better single search; error: of that gain."""

    fusion: Fusion
    ndcg: float
    gain: float
    error: float


@dataclass(frozen=True)
class TunedFusion:
    """The choice, why, and every fusion that was tried, the best first."""

    fusion: Fusion
    reason: str
    questions: int
    trials: tuple[Trial, ...]

    def table(self, rows: int = 12) -> str:
        """The best trials and both single searches, as text."""
        shown = [t for i, t in enumerate(self.trials) if i < rows or t.fusion in (DENSE, LEXICAL, self.fusion)]
        lines = [f"{'fusion':<34} {'nDCG@10':>8} {'gain':>8} {'error':>8}"]
        for trial in shown:
            mark = "*" if trial.fusion == self.fusion else " "
            lines.append(f"{mark} {trial.fusion!s:<32} {trial.ndcg:>8.4f} {trial.gain:>+8.4f} {trial.error:>8.4f}")
        return "\n".join([*lines, self.reason])


def candidates() -> list[Fusion]:
    """What is tried, the simplest first."""
    weights = [i / 10 for i in range(1, 10)]
    linear = [Fusion(kind="linear", normal=normal, weight=w) for normal in ("minmax", "z") for w in weights]
    rrf = [Fusion(kind="rrf", constant=constant, weight=w) for constant in (10.0, 60.0) for w in weights]
    return [DENSE, LEXICAL, *linear, *rrf]


def tune_fusion(
    runs: Sequence[Run],
    relevant: Sequence[Collection[Hashable]],
    fusions: Sequence[Fusion] | None = None,
    *,
    noise: float = 2.0,
) -> TunedFusion:
    """The fusion for questions like these: the better of the two single searches, unless fusing gains more than noise.

    relevant: for each run, the documents that answer its question. Fusing is chosen when its mean nDCG@10 over the
    questions exceeds that of the better single search by more than `noise` standard errors of the paired difference.
    The questions must not be the ones that the choice is then reported on.

    Raises:
        DataError: no question, or questions without an answer.
        UsageError: `runs` and `relevant` differ in length.
    """
    if len(runs) != len(relevant):
        raise UsageError(f"{len(runs)} runs and {len(relevant)} sets of relevant documents")
    if not runs or not all(relevant):
        empty = sum(not answers for answers in relevant)
        what = f"{empty} of {len(runs)} questions have no relevant document" if runs else "no questions to tune on"
        raise DataError(what, remedy="give questions and, for each, the documents that answer it")
    tried = list(dict.fromkeys([DENSE, LEXICAL, *(candidates() if fusions is None else fusions)]))
    scores_FQ = np.array([[ndcg(f, r, a) for r, a in zip(runs, relevant, strict=True)] for f in tried])
    means_F = scores_FQ.mean(axis=1)
    single = 0 if means_F[0] >= means_F[1] else 1
    gains_FQ = scores_FQ - scores_FQ[single]
    spread_F = gains_FQ.std(axis=1, ddof=1) if len(runs) > 1 else np.zeros(len(tried))
    trials = [
        Trial(fusion, float(means_F[i]), float(gains_FQ[i].mean()), float(spread_F[i]) / math.sqrt(len(runs)))
        for i, fusion in enumerate(tried)
    ]
    base = trials[single]
    top = max(trials[2:], key=lambda trial: trial.ndcg, default=base)  # the first of equals is the simplest
    chosen = top if len(runs) > 1 and top.gain > noise * top.error else base
    if chosen is base:
        reason = f"{base.fusion} alone: fusing gains {top.gain:+.4f} at best, no more than noise ({top.error:.4f})"
    else:
        reason = (
            f"{top.fusion}: {top.gain:+.4f} over {base.fusion} alone, more than {noise:g} errors of {top.error:.4f}"
        )
    trials.sort(key=lambda trial: -trial.ndcg)
    return TunedFusion(chosen.fusion, reason, len(runs), tuple(trials))


def ndcg(fusion: Fusion, run: Run, relevant: Collection[Hashable], depth: int = DEPTH) -> float:
    """nDCG at `depth` of one fused run: relevant documents count 1, others 0 (Jarvelin and Kekalainen, 2002)."""
    score_N = fusion.fuse(run.lexical_N, run.dense_N)
    found: dict[Hashable, None] = {}
    for i in np.argsort(-score_N, kind="stable"):
        if len(found) == depth or score_N[i] == -np.inf:
            break
        found.setdefault(run.documents[i])
    gain = sum(1 / math.log2(place + 2) for place, document in enumerate(found) if document in relevant)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(depth, len(relevant))))


def _minmax(score_N: NDArray[np.float64], constant: float) -> NDArray[np.float64]:
    there_N = ~np.isnan(score_N)
    if not there_N.any():
        return np.zeros_like(score_N)
    low, high = score_N[there_N].min(), score_N[there_N].max()
    scaled_N = (score_N - low) / (high - low) if high > low else np.ones_like(score_N)
    return np.where(there_N, scaled_N, 0.0)


def _standard(score_N: NDArray[np.float64], constant: float) -> NDArray[np.float64]:
    there_N = ~np.isnan(score_N)
    if not there_N.any():
        return np.zeros_like(score_N)
    spread = score_N[there_N].std()
    scaled_N = (score_N - score_N[there_N].mean()) / spread if spread > 0 else np.zeros_like(score_N)
    return np.where(there_N, scaled_N, scaled_N[there_N].min())


def _reciprocal(score_N: NDArray[np.float64], constant: float) -> NDArray[np.float64]:
    there_N = ~np.isnan(score_N)
    order_N = np.argsort(np.where(there_N, -score_N, np.inf), kind="stable")
    rank_N = np.empty(len(score_N))
    rank_N[order_N] = np.arange(1, len(score_N) + 1)
    return np.where(there_N, 1 / (constant + rank_N), 0.0)
