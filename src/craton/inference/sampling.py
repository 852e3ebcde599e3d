"""From logits to the next token: settings, penalties, filters and the draw. Each row is independent of its batch."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import torch
from pydantic import Field, field_validator
from torch import Tensor

from craton.config import Settings

# top-p sorts this many candidates first and all of them only when they do not reach p: a full sort of a vocabulary
# costs more than a decode step of a small model.
NUCLEUS_CANDIDATES = 1024


class SamplingSettings(Settings):
    """How tokens are chosen and when to stop. The defaults are greedy and so give the same text each time."""

    temperature: float = Field(0.0, ge=0, le=100, description="0 takes the likeliest token; higher is more random")
    top_k: int = Field(0, ge=0, description="keep the k likeliest tokens (0: all)")
    top_p: float = Field(1.0, gt=0, le=1, description="keep the likeliest tokens that together reach p")
    min_p: float = Field(0.0, ge=0, le=1, description="keep tokens at least min_p times as likely as the likeliest")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="divides the logits of tokens already in the text")
    presence_penalty: float = Field(0.0, ge=-100, le=100, description="subtracted once a token was generated")
    frequency_penalty: float = Field(0.0, ge=-100, le=100, description="subtracted for each time it was generated")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="added to the logits of these token ids")
    seed: int | None = Field(None, ge=0, lt=2**63, description="the same seed gives the same text; none: a new one")
    max_tokens: int | None = Field(None, ge=1, description="the longest answer in tokens (none: what the context holds)")
    stop: Annotated[tuple[str, ...], Field(max_length=16)] = Field((), description="strings that end the answer")
    n: int = Field(1, ge=1, le=128, description="how many answers")
    logprobs: int | None = Field(
        None, ge=0, le=100, description="log-probabilities of the chosen token and of this many others"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop:
            raise ValueError("an empty stop string would stop at once")
        return stop

    def __hash__(self) -> int:
        return id(self)  # logit_bias is a dict; settings are never used as values of a set


class Sampler:
    """Chooses the tokens of one sequence; holds its random state and the counts that penalties need."""

    def __init__(self, settings: SamplingSettings, prompt: list[int], seed: int) -> None:
        self.settings = settings
        self._random = torch.Generator().manual_seed(seed)
        self._seen = set(prompt)
        self._counts: Counter[int] = Counter()

    def __call__(self, logits_V: Tensor) -> int:
        """The next token for these fp32 logits [V]; remembers it for the penalties."""
        settings = self.settings
        logits_V = self._adjust(logits_V)
        if settings.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = self._draw(logits_V / settings.temperature)
        self._seen.add(token)
        self._counts[token] += 1
        return token

    def _adjust(self, logits_V: Tensor) -> Tensor:
        settings = self.settings
        changed = settings.logit_bias or settings.repetition_penalty != 1
        changed = changed or settings.presence_penalty or settings.frequency_penalty
        if not changed:
            return logits_V
        logits_V = logits_V.clone()
        if settings.repetition_penalty != 1:
            # Keskar 2019 (CTRL): towards zero from above, away from it below.
            seen = torch.tensor(sorted(self._seen))
            values = logits_V[seen]
            penalty = settings.repetition_penalty
            logits_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
        for token, count in self._counts.items():
            logits_V[token] -= settings.presence_penalty + settings.frequency_penalty * count
        for token, bias in settings.logit_bias.items():
            logits_V[token] += bias
        return logits_V

    def _draw(self, logits_V: Tensor) -> int:
        settings = self.settings
        candidates = len(logits_V)
        if settings.top_k:
            candidates = min(candidates, settings.top_k)
        elif settings.top_p < 1 or settings.min_p > 0:
            candidates = min(candidates, NUCLEUS_CANDIDATES)
        total = logits_V.double().logsumexp(0)
        while True:
            # Sorted, so that one uniform number picks the same token whatever the order of the vocabulary.
            values, tokens = logits_V.topk(candidates)
            probabilities = (values.double() - total).exp()
            if settings.top_k or candidates == len(logits_V) or self._covers(probabilities):
                break
            candidates = len(logits_V)
        if settings.top_k:
            probabilities = probabilities / probabilities.sum()
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if settings.top_p < 1:
            # A token stays while those before it have not reached p; so the first one always does.
            keep &= probabilities.cumsum(0) - probabilities < settings.top_p
        if settings.min_p > 0:
            keep &= probabilities >= settings.min_p * probabilities[0]
        cumulative = torch.where(keep, probabilities, 0.0).cumsum(0)
        point = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[-1]
        return int(tokens[torch.searchsorted(cumulative, point, right=True).clamp(max=int(keep.sum()) - 1)])

    def _covers(self, probabilities: Tensor) -> bool:
        settings = self.settings
        by_p = settings.top_p < 1 and float(probabilities.sum()) >= settings.top_p
        by_min = settings.min_p > 0 and bool(probabilities[-1] < settings.min_p * probabilities[0])
        return by_p or by_min


def log_probabilities(logits_V: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The natural log-probability of `token` under the unmodified logits, and the `top` likeliest with theirs."""
    logprobs_V = logits_V.double().log_softmax(0)
    values, tokens = logprobs_V.topk(min(top, len(logits_V)))
    return float(logprobs_V[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
