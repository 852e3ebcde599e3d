"""From logits to the next token: penalties, filters and the draw. Each sequence is independent of its batch."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from craton.inference.settings import SamplingSettings

# So many candidates are sorted first, and all of them only when these do not reach p, or the number that was drawn: a
# full sort of a vocabulary costs as much as a decode step of a small model.
FIRST_CANDIDATES = 1024


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
            token = int(logits_V.numpy(force=True).argmax())  # 20 times as fast as torch's
        else:
            token = self._draw(logits_V / settings.temperature)
        self._seen.add(token)
        self._counts[token] += 1
        return token

    def _adjust(self, logits_V: Tensor) -> Tensor:
        settings = self.settings
        penalties = settings.repetition_penalty != 1, settings.presence_penalty != 0, settings.frequency_penalty != 0
        if not settings.logit_bias and not any(penalties):
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
        drawn = torch.rand((), generator=self._random, dtype=torch.float64)
        candidates = min(len(logits_V), settings.top_k or FIRST_CANDIDATES)
        total = logits_V.double().logsumexp(0)
        while True:
            # Sorted, so that one uniform number picks the same token whatever the order of the vocabulary.
            values, tokens = logits_V.topk(candidates)
            probabilities = (values.double() - total).exp()
            if settings.top_k or candidates == len(logits_V) or self._covers(probabilities, drawn):
                break
            candidates = len(logits_V)
        if not settings.top_k and settings.top_p == 1 and settings.min_p == 0:
            return int(tokens[torch.searchsorted(probabilities.cumsum(0), drawn, right=True).clamp(max=candidates - 1)])
        if settings.top_k:
            probabilities = probabilities / probabilities.sum()
        keep = torch.ones_like(probabilities, dtype=torch.bool)
        if settings.top_p < 1:
            # A token stays while those before it have not reached p; so the first one always does.
            keep &= probabilities.cumsum(0) - probabilities < settings.top_p
        if settings.min_p > 0:
            keep &= probabilities >= settings.min_p * probabilities[0]
        cumulative = torch.where(keep, probabilities, 0.0).cumsum(0)
        point = drawn * cumulative[-1]
        return int(tokens[torch.searchsorted(cumulative, point, right=True).clamp(max=int(keep.sum()) - 1)])

    def _covers(self, probabilities: Tensor, drawn: Tensor) -> bool:
        """Whether no candidate behind these can be chosen."""
        settings = self.settings
        if settings.top_p == 1 and settings.min_p == 0:
            return bool(probabilities.sum() > drawn)
        by_p = settings.top_p < 1 and float(probabilities.sum()) >= settings.top_p
        by_min = settings.min_p > 0 and bool(probabilities[-1] < settings.min_p * probabilities[0])
        return by_p or by_min


def log_probabilities(logits_V: Tensor, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """The natural log-probability of `token` under the unmodified logits, and the `top` likeliest with theirs."""
    logprobs_V = logits_V.double().log_softmax(0)
    values, tokens = logprobs_V.topk(min(top, len(logits_V)))
    return float(logprobs_V[token]), list(zip(tokens.tolist(), values.tolist(), strict=True))
