"""How loss falls as models grow: a law fitted on a ladder of small models, and what it says of the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, inf, log
from typing import Final

import numpy as np
import numpy.typing as npt

from craton.errors import UsageError

Array = npt.NDArray[np.float64]

# In log-loss. Hoffmann's 1e-3 makes outliers of half of the runs, which suits hundreds of them; of the few of a ladder
# none, and least the largest, is to be passed over for less than several times the noise.
HUBER_DELTA: Final = 1e-2
LEVEL: Final = 0.9
RESAMPLES: Final = 400
# Losses of runs that differ in nothing but their seed differ by about so much (relative), worth so many observations.
SEED_NOISE: Final = 0.005
SEED_NOISE_WEIGHT: Final = 4
STEPS: Final = 100
HIGHEST_EXPONENT: Final = 3.0
# Tokens are a variable of their own where the sizes explain their logarithm no better than to this deviation.
TOKENS_VARY: Final = 0.1


@dataclass(frozen=True)
class Trial:
    """A trained model: its parameters, the tokens it was trained on, and its held-out loss in nats per token."""

    parameters: int
    tokens: int
    loss: float


@dataclass(frozen=True)
class LossLaw:
    """loss = floor + a / parameters^alpha + b / tokens^beta (Hoffmann 2022, arXiv 2203.15556, equation 2).

    b and beta are 0 where the tokens of all trials followed from their parameters: the second term then holds both.
    """

    floor: float
    a: float
    alpha: float
    b: float = 0.0
    beta: float = 0.0

    def __call__(self, parameters: float, tokens: float) -> float:
        """The loss that a model is expected to have, in nats per token."""
        return float(self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta)


@dataclass(frozen=True)
class Forecast:
    """What a model's loss will be; with a chance of LEVEL, a measurement falls in [low, high]."""

    parameters: int
    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A fitted law and what the bootstrap made of it: further laws, and how far from each a measurement may lie.

    deviations: in log-loss, one for each of the laws.
    """

    law: LossLaw
    resampled: tuple[LossLaw, ...]
    deviations: Array

    def interval(self, quantity: Callable[[LossLaw], float]) -> tuple[float, float]:
        """The interval of LEVEL for something that follows from the law: `fit.interval(lambda law: law.alpha)`."""
        return _interval(np.array([quantity(law) for law in self.resampled]))

    def forecast(self, parameters: int, tokens: int) -> Forecast:
        """The loss that training such a model will measure; beyond the trials, the further the less certain."""
        loss_R = np.array([law(parameters, tokens) for law in self.resampled]) * np.exp(self.deviations)
        return Forecast(parameters, tokens, self.law(parameters, tokens), *_interval(loss_R))


def fit(trials: Sequence[Trial], *, seed: int = 0) -> Fit:
    """The law of these trials: Hoffmann's third approach, the Huber loss of log-loss minimised from many starts.

    The bootstrap is parametric: noise is added to the fitted losses and the law fitted anew. With as few trials as a
    ladder has, how large that noise is must itself be drawn, by the residuals and by SEED_NOISE.

    Raises UsageError for fewer than three sizes, and for a loss that is no positive number.
    """
    problem = _Problem(trials)
    best_P = problem.best(problem.solve(problem.log_loss_n[None], problem.starts()))
    fitted_n = problem.log_law(best_P[None])[0]
    residual_n = problem.log_loss_n - fitted_n
    freedom = SEED_NOISE_WEIGHT + max(0, len(trials) - len(best_P))
    squares = SEED_NOISE_WEIGHT * SEED_NOISE**2 + float(residual_n @ residual_n)
    random = np.random.default_rng(seed)
    noise_R = np.sqrt(squares / random.chisquare(freedom, RESAMPLES))
    resampled_Rn = fitted_n + noise_R[:, None] * random.standard_normal((RESAMPLES, len(trials)))
    laws_RP = problem.solve(resampled_Rn, np.broadcast_to(best_P, (RESAMPLES, len(best_P))))
    deviation_R = noise_R * random.standard_normal(RESAMPLES)
    return Fit(problem.law(best_P), tuple(problem.law(law_P) for law_P in laws_RP), deviation_R)


class _Problem:
    # log loss = logsumexp of the law's terms, in logarithms of the sizes, centred so that amplitudes and exponents come
    # apart. A law is P = (log floor, log a, alpha[, log b, beta]); S of them are solved at once. V: parameters and,
    # where they vary apart from these, tokens.

    def __init__(self, trials: Sequence[Trial]) -> None:
        distinct = len({trial.parameters for trial in trials})
        if distinct < 3:
            raise UsageError(f"a law cannot be fitted on {distinct} sizes", remedy="train three or more")
        for trial in trials:
            if not 0 < trial.loss < inf:
                raise UsageError(
                    f"a loss of {trial.loss} cannot be fitted",
                    where=f"the model of {trial.parameters} parameters",
                    remedy="its training diverged: lower the learning rate, or leave this size out",
                )
        sizes_nV = np.log([[trial.parameters, trial.tokens] for trial in trials])
        sizes_nV = sizes_nV[:, : 2 if _vary_apart(sizes_nV) else 1]
        self.centre_V = sizes_nV.mean(0)
        self.sizes_nV = sizes_nV - self.centre_V
        self.log_loss_n = np.log([trial.loss for trial in trials])

    def starts(self) -> Array:
        loss, variables = exp(float(self.log_loss_n.mean())), self.sizes_nV.shape[1]
        starts = []
        for floor, *exponents in product((0.2, 0.5, 0.9), *[(0.1, 0.3, 0.6, 1.0)] * variables):
            amplitude = log(loss * (1 - floor) / variables)
            starts.append([log(loss * floor), *(value for exponent in exponents for value in (amplitude, exponent))])
        return np.array(starts)

    def terms(self, laws_SP: Array) -> Array:
        # The logarithm of each term at each trial, [S, n, 1 + V].
        floor_Sn = np.broadcast_to(laws_SP[:, :1], (len(laws_SP), len(self.sizes_nV)))
        amplitudes_S1V, exponents_S1V = laws_SP[:, None, 1::2], laws_SP[:, None, 2::2]
        return np.concatenate((floor_Sn[..., None], amplitudes_S1V - exponents_S1V * self.sizes_nV), axis=-1)

    def log_law(self, laws_SP: Array) -> Array:
        return np.asarray(np.logaddexp.reduce(self.terms(laws_SP), axis=-1))

    def solve(self, log_loss_Sn: Array, starts_SP: Array) -> Array:
        # Levenberg-Marquardt on reweighted residuals, all starts (or resamples) at once.
        laws_SP, damping_S = np.array(starts_SP), np.full(len(starts_SP), 1e-2)
        cost_S = _huber(self.log_law(laws_SP) - log_loss_Sn)
        for _ in range(STEPS):
            terms_SnT = self.terms(laws_SP)
            residual_Sn = np.logaddexp.reduce(terms_SnT, axis=-1) - log_loss_Sn
            jacobian_SnP = self._jacobian(terms_SnT)
            weight_Sn = np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residual_Sn), 1e-300))
            gradient_SP = np.einsum("snp,sn,sn->sp", jacobian_SnP, weight_Sn, residual_Sn)
            hessian_SPP = np.einsum("snp,sn,snq->spq", jacobian_SnP, weight_Sn, jacobian_SnP)
            diagonal_SP = np.einsum("spp->sp", hessian_SPP)
            diagonal_SP += damping_S[:, None] * diagonal_SP + 1e-15  # a view: the matrix itself is damped
            tried_SP = laws_SP - np.linalg.solve(hessian_SPP, gradient_SP[..., None])[..., 0]
            tried_SP[:, 2::2] = tried_SP[:, 2::2].clip(0.0, HIGHEST_EXPONENT)
            tried_cost_S = _huber(self.log_law(tried_SP) - log_loss_Sn)
            better_S = tried_cost_S < cost_S
            laws_SP[better_S], cost_S[better_S] = tried_SP[better_S], tried_cost_S[better_S]
            damping_S = np.where(better_S, damping_S / 3, damping_S * 4).clip(1e-12, 1e12)
        return laws_SP

    def _jacobian(self, terms_SnT: Array) -> Array:
        # A term's share of the sum is the derivative by its logarithm.
        shares_SnT = np.exp(terms_SnT - np.logaddexp.reduce(terms_SnT, axis=-1)[..., None])
        jacobian_SnP = np.empty((*shares_SnT.shape[:2], 1 + 2 * self.sizes_nV.shape[1]))
        jacobian_SnP[..., 0] = shares_SnT[..., 0]
        jacobian_SnP[..., 1::2] = shares_SnT[..., 1:]
        jacobian_SnP[..., 2::2] = -shares_SnT[..., 1:] * self.sizes_nV
        return jacobian_SnP

    def best(self, laws_SP: Array) -> Array:
        return np.asarray(laws_SP[_huber(self.log_law(laws_SP) - self.log_loss_n).argmin()])

    def law(self, law_P: Array) -> LossLaw:
        powers = []
        for amplitude, exponent, centre in zip(law_P[1::2], law_P[2::2], self.centre_V, strict=True):
            powers += [exp(amplitude + exponent * centre), float(exponent)]
        return LossLaw(exp(law_P[0]), *powers)


def _vary_apart(sizes_nV: Array) -> bool:
    # Whether the logarithm of the tokens is more than a straight line of the logarithm of the parameters.
    line = np.polynomial.Polynomial.fit(sizes_nV[:, 0], sizes_nV[:, 1], 1)
    return len(sizes_nV) >= 5 and float(np.std(sizes_nV[:, 1] - line(sizes_nV[:, 0]))) > TOKENS_VARY


def _huber(residual_Sn: Array) -> Array:
    absolute_Sn = np.abs(residual_Sn)
    inner, outer = 0.5 * absolute_Sn**2, HUBER_DELTA * (absolute_Sn - 0.5 * HUBER_DELTA)
    return np.asarray(np.where(absolute_Sn <= HUBER_DELTA, inner, outer).sum(-1))


def _interval(values_R: Array) -> tuple[float, float]:
    low, high = np.quantile(values_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
