"""Whether answers keep to what the model was shown: the share of an answer's sentences that its passages prove.

What is true but stands in none of the passages counts as not proven, so this tells reading from knowing and inventing
(faithfulness as in Es et al. 2023, arXiv 2309.15217, by quotes instead of a model that judges). What proves a sentence
is for retrieval to say, a floor above this one: it comes as a function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from craton.evaluation.intervals import Estimate, estimate
from craton.evaluation.runner import Row


def faithfulness(rows: Sequence[Row], proven: Callable[[Row], Sequence[bool]], *, seed: int = 0) -> Estimate | None:
    """The mean, over answers, of the share of their sentences that are proven, with an interval over source documents.

    proven: of each sentence of a row's answer, whether the passages shown with it say so. Answers that were given
    without passages, or say nothing, are not counted; None where no other is left.
    """
    shares, groups = [], []
    for row in rows:
        sentences = proven(row) if row.passages else ()
        if sentences:
            shares.append(sum(sentences) / len(sentences))
            groups.append(row.group)
    return estimate(shares, groups, seed=seed) if shares else None
