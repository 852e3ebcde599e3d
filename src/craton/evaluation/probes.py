"""How good are a model's vectors? Classes by a linear layer on them, or by their nearest neighbours: the model itself
is not trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from craton.errors import DataError
from craton.evaluation.intervals import Estimate, estimate

Method = Literal["linear", "knn"]

PENALTIES: Final = (1e-5, 1e-4, 1e-3, 1e-2)  # of the linear layer's weights, chosen on a part of the training data
APART: Final = 0.1  # of the training data, for that choice
MOST_APART: Final = 5000
STEPS: Final = 100  # of L-BFGS
BLOCK: Final = 1024  # rows whose neighbours are looked for at once


@dataclass(frozen=True)
class Probe:
    """What came of it. accuracy: on the test data, with its interval. classes: how many there are. chance: the share
    of the test data that is of the most frequent class of the training data."""

    method: Method
    accuracy: Estimate
    train: int
    classes: int
    chance: float


def probe(
    train_ND: Tensor,
    labels_N: NDArray[np.int64],
    test_MD: Tensor,
    expected_M: NDArray[np.int64],
    method: Method,
    *,
    neighbours: int = 20,
    seed: int = 0,
) -> Probe:
    """Learn classes from training vectors and guess those of test vectors.

    linear: multinomial logistic regression on standardised vectors, its penalty chosen on a part of the training data
    that it is then trained on as well. knn: each of the nearest `neighbours` by cosine votes with exp(cosine / 0.07),
    as in DINO (Caron 2021, arXiv 2104.14294).

    Raises DataError where there is nothing to learn or to guess.
    """
    if len(train_ND) < 2 or not len(test_MD):
        raise DataError(f"{len(train_ND)} examples to learn from and {len(test_MD)} to guess are too few")
    classes = int(max(labels_N.max(), expected_M.max())) + 1
    labels = torch.from_numpy(labels_N)
    if method == "knn":
        guesses_M = nearest(train_ND, labels, test_MD, classes, neighbours)
    else:
        guesses_M = linear(train_ND, labels, test_MD, classes, seed)
    right = (guesses_M.numpy() == expected_M).astype(np.float64)
    most = int(np.bincount(labels_N, minlength=classes).argmax())
    return Probe(method, estimate(right, seed=seed), len(train_ND), classes, float((expected_M == most).mean()))


def nearest(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, classes: int, neighbours: int, temperature: float = 0.07
) -> Tensor:
    """The class [M] of each test vector by its nearest training vectors."""
    train_ND, test_MD = (F.normalize(vectors.float(), dim=-1) for vectors in (train_ND, test_MD))
    neighbours = min(neighbours, len(train_ND))
    guesses = []
    for part_BD in test_MD.split(BLOCK):
        scores_BK, rows_BK = (part_BD @ train_ND.T).topk(neighbours)
        votes_BC = torch.zeros(len(part_BD), classes)
        votes_BC.scatter_add_(1, labels_N[rows_BK], ((scores_BK - 1) / temperature).exp())
        guesses.append(votes_BC.argmax(-1))
    return torch.cat(guesses)


def linear(train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, classes: int, seed: int) -> Tensor:
    """The class [M] of each test vector by a linear layer on the training vectors."""
    train_ND, test_MD = train_ND.float(), test_MD.float()
    mean, std = train_ND.mean(0), train_ND.std(0) + 1e-6
    train_ND, test_MD = (train_ND - mean) / std, (test_MD - mean) / std
    order = torch.from_numpy(np.random.default_rng((seed, 2)).permutation(len(train_ND)))
    count = min(max(1, round(APART * len(order))), MOST_APART)
    apart, rest = order[:count], order[count:]

    def rate(penalty: float) -> float:
        weight, bias = _fit(train_ND[rest], labels_N[rest], classes, penalty)
        return float(((train_ND[apart] @ weight.T + bias).argmax(-1) == labels_N[apart]).float().mean())

    best = max(PENALTIES, key=rate)
    weight, bias = _fit(train_ND, labels_N, classes, best)
    return (test_MD @ weight.T + bias).argmax(-1)


def _fit(x_ND: Tensor, labels_N: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(classes, x_ND.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x_ND @ weight.T + bias, labels_N) + penalty * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach(), bias.detach()
