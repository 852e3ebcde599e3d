"""A larger vocabulary for a model that is trained already: new rows of its embedding and head, from old ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from craton.errors import UsageError
from craton.models.causal_lm import CausalLM
from craton.models.encoder import Encoder


def resize_embeddings(
    model: CausalLM | Encoder, vocab: int, sources: Mapping[int, Sequence[int]] | None = None
) -> None:
    """Give `model` a vocabulary of `vocab` tokens, in place: embedding, head (and its bias) and config.

    The row of each id in `sources` becomes the mean of the old rows named there: for a piece that stands for several
    old tokens, of theirs. Such an id may lie among the old rows, where a checkpoint keeps spare ones. Any other new row
    becomes the mean of all old rows, which a model takes for nothing in particular (Hewitt 2021). Means are taken in
    fp32. A tied head stays tied, and every other row stays as it is, bit for bit.

    Raises UsageError for a smaller vocabulary, for ids beyond it, and for weights that are packed.
    """
    old, sources = model.config.vocab, sources or {}
    if vocab < old:
        raise UsageError(f"a vocabulary of {old:,} tokens cannot shrink to {vocab:,}", where="vocab")
    for token, parts in sources.items():
        if not 0 <= token < vocab or not parts or not all(0 <= part < old for part in parts):
            raise UsageError(
                f"token {token} cannot be made of the tokens {list(parts)}",
                where=f"sources of {old:,} old and {vocab:,} new tokens",
            )
    head = model.head if isinstance(model, CausalLM) else None
    if not isinstance(model.embedding, nn.Embedding) or not (head is None or isinstance(head, nn.Linear)):
        raise UsageError(
            "packed weights cannot be extended", where="embedding", remedy="load the model with dtype float32"
        )
    tied = head is not None and head.weight is model.embedding.weight
    model.embedding.weight = _extended(model.embedding.weight, vocab, sources)
    model.embedding.num_embeddings = vocab
    if head is not None:
        head.weight = model.embedding.weight if tied else _extended(head.weight, vocab, sources)
        head.out_features = vocab
        if head.bias is not None:
            head.bias = _extended(head.bias, vocab, sources)
    model.config = model.config.model_copy(update={"vocab": vocab})


def _extended(old: Tensor, vocab: int, sources: Mapping[int, Sequence[int]]) -> nn.Parameter:
    # [old vocab, ...] to [vocab, ...]
    rows = old.detach()
    new: Tensor = rows.new_empty((vocab, *rows.shape[1:]))
    new[: len(rows)] = rows
    new[len(rows) :] = rows.mean(0, dtype=torch.float32)
    for token, parts in sources.items():
        new[token] = rows[list(parts)].mean(0, dtype=torch.float32)
    return nn.Parameter(new, requires_grad=old.requires_grad)
