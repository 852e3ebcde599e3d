"""Masked language modelling: hide some tokens, predict them from both sides."""

from __future__ import annotations

from collections.abc import Collection
from math import log

import numpy as np
import torch.nn.functional as F
from torch import nn

from craton.data.batch import Batch
from craton.data.example import UNTRAINED, Example, TokenSequence
from craton.data.loader import ExampleSource, OrderedSource
from craton.data.plan import Indices, permutation
from craton.errors import UsageError
from craton.modalities.text import Tokenizer
from craton.models import MaskedLM
from craton.training.objective import LossParts


def masking_generator(seed: int, epoch: int, example: int) -> np.random.Generator:
    """The randomness of one example's masks: another in each epoch, and the same again after a resume."""
    return np.random.default_rng((seed, epoch, example))


def mask_tokens(
    example: Example,
    rng: np.random.Generator,
    mask_id: int,
    vocab: int,
    special_ids: Collection[int],
    probability: float = 0.15,
) -> Example:
    """Choose tokens to predict, and hide most of them (BERT, Devlin 2018, arXiv 1810.04805, section 3.1).

    Of each sequence's tokens that are not special, `probability` are chosen, at least one. 80 % of those become
    `mask_id`, 10 % any token of the vocabulary, 10 % stay, so that no token is surely right. The target of a chosen
    position is its own token: nothing is shifted.
    """
    masked = tuple(_mask(s, rng, mask_id, vocab, special_ids, probability) for s in example.sequences)
    return Example(masked, example.label, example.origin)


def _mask(
    sequence: TokenSequence,
    rng: np.random.Generator,
    mask_id: int,
    vocab: int,
    special_ids: Collection[int],
    probability: float,
) -> TokenSequence:
    ids = sequence.ids.copy()
    targets = np.full_like(ids, UNTRAINED)
    ordinary = np.flatnonzero(~np.isin(ids, list(special_ids)))
    if len(ordinary):
        chosen = rng.permutation(ordinary)[: max(1, round(probability * len(ordinary)))]
        targets[chosen] = ids[chosen]
        fate = rng.random(len(chosen))
        random_ids = rng.integers(vocab, size=len(chosen), dtype=ids.dtype)
        ids[chosen] = np.where(fate < 0.8, mask_id, np.where(fate < 0.9, random_ids, ids[chosen]))
    return TokenSequence(ids, targets)


class MaskedWindows:
    """Windows of text with masks that are drawn anew in each epoch. Raises UsageError without a mask token."""

    def __init__(self, windows: ExampleSource, tokenizer: Tokenizer, seed: int, epoch: int = 0) -> None:
        text = tokenizer.special_tokens.get("mask_token")
        mask_id = tokenizer.backend.token_to_id(text) if text is not None else None
        if mask_id is None:
            raise UsageError(
                "this tokeniser has no mask token", remedy="take one of an encoder, or let one be trained on the data"
            )
        self._windows, self._tokenizer, self._mask_id = windows, tokenizer, mask_id
        self._seed, self._epoch = seed, epoch
        self.lengths, self.row = windows.lengths, windows.row

    def at_epoch(self, epoch: int) -> MaskedWindows:
        """The same windows with the masks of `epoch`."""
        return MaskedWindows(self._windows, self._tokenizer, self._seed, epoch)

    def order(self, seed: int, epoch: int, shuffle: bool) -> Indices:
        """That of the windows, where they say it themselves (a mixture)."""
        if isinstance(self._windows, OrderedSource):
            return self._windows.order(seed, epoch, shuffle)
        return permutation(len(self), seed, epoch) if shuffle else np.arange(len(self))

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Example:
        rng = masking_generator(self._seed, self._epoch, index)
        tokenizer = self._tokenizer
        return mask_tokens(self._windows[index], rng, self._mask_id, tokenizer.vocab_size, tokenizer.special_ids)


class MaskedToken:
    """Cross-entropy of every chosen token under a `MaskedLM`, in nats. Counts tokens."""

    def __call__(self, model: nn.Module, batch: Batch) -> LossParts:
        assert isinstance(model, MaskedLM)
        hidden_TD = model.hidden(batch.ids_T, batch.positions_T, batch.segments_T, batch.row)
        rows_N = (batch.targets_T != UNTRAINED).nonzero()[:, 0]
        logits_NV, targets_N = model.logits(hidden_TD[rows_N]).float(), batch.targets_T[rows_N]
        loss_sum = F.cross_entropy(logits_NV, targets_N, reduction="sum")
        metrics = {
            "correct": (logits_NV.detach().argmax(-1) == targets_N).sum().float(),
            "bits": loss_sum.detach() / log(2),
        }
        return LossParts(loss_sum, len(rows_N), metrics)
