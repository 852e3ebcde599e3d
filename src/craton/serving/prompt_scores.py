"""Log-probabilities of a prompt's own tokens, with the likeliest beside them: what `echo` with `logprobs` answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from craton.inference.linears import EXACT_ROWS
from craton.inference.model import Model
from craton.inference.scoring import check_fits
from craton.models import CausalLM
from craton.trunk import KVCache


@dataclass(frozen=True)
class PromptToken:
    """A token of a prompt. logprob: natural log, given all before it; none for the first one."""

    id: int
    logprob: float | None
    top: list[tuple[int, float]]


def prompt_scores(model: Model, ids: Sequence[int], top: int) -> Iterator[list[PromptToken]]:
    """The tokens of a prompt with their log-probabilities under the model, a piece of the prompt at a time.

    It is read in pieces small enough for the native kernels' exact arithmetic, as `Model.score` reads. Raises
    ContextOverflow.
    """
    check_fits(ids, (), model.context, "the prompt")
    module, plan = model.module, model.plan
    assert isinstance(module, CausalLM)
    cache = KVCache(module.config.trunk, 1, dtype=plan.dtype)
    cache.expected[0] = len(ids)
    yield [PromptToken(ids[0], None, [])]
    for first in range(0, len(ids) - 1, EXACT_ROWS):
        piece = list(ids[first : first + EXACT_ROWS])
        following = list(ids[first + 1 : first + 1 + len(piece)])
        with torch.inference_mode():
            positions_T = torch.arange(first, first + len(piece))
            segments_T = torch.zeros(len(piece), dtype=torch.long)
            hidden_TD = module.hidden(torch.tensor(piece), positions_T, segments_T, cache)
            logits_TV = module.logits(hidden_TD[: len(following)]).float()
            logprobs_TV = logits_TV - logits_TV.logsumexp(-1, keepdim=True)
            values, tokens = logprobs_TV.topk(min(top, logprobs_TV.shape[-1]))
            chosen = logprobs_TV[torch.arange(len(following)), torch.tensor(following)].tolist()
        rows = zip(following, chosen, tokens.tolist(), values.tolist(), strict=True)
        yield [PromptToken(i, logprob, list(zip(t, v, strict=True))) for i, logprob, t, v in rows]
