"""Passages put in order by a cross-encoder, which reads each of them together with the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.errors import ContextOverflow, UsageError
from craton.models import Classifier, ClassifierConfig
from craton.store import find
from craton.trunk.trunk import sequence_layout

PAIRS_AT_ONCE: Final = 8


class CrossEncoder:
    """A BERT, RoBERTa or XLM-RoBERTa with one output, such as `cross-encoder/ms-marco-MiniLM-L6-v2` (Nogueira and Cho
    2019, arXiv 1901.04085), in float32. Usable as a `Rerank`."""

    def __init__(self, name: str) -> None:
        """Load it by its name or path. Raises UsageError for a model of another kind."""
        checkpoint = Checkpoint.open(find(name).path)
        config = checkpoint.text_config
        if not isinstance(config, ClassifierConfig) or config.pooling != "cls" or len(config.labels) != 1:
            raise UsageError(
                f"{name} is no reranker",
                where=str(checkpoint.path),
                remedy="name a cross-encoder: an encoder for sequence classification with one output",
            )
        module = checkpoint.load(torch.float32)
        assert isinstance(module, Classifier)
        self.name, self.module, self.context = name, module.eval(), config.context
        self.tokenizer = checkpoint.tokenizer()

    @torch.inference_mode()
    def __call__(self, question: str, texts: Sequence[str]) -> list[float]:
        """How well each text answers the question: the model's output, higher is better. Of a text that is too long,
        the beginning is read. Raises ContextOverflow for a question that leaves no room for a text."""
        pairs = [self._pair(question, text) for text in texts]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]))  # equal lengths share an attention call
        scores = [0.0] * len(pairs)
        for first in range(0, len(order), PAIRS_AT_ONCE):
            batch = order[first : first + PAIRS_AT_ONCE]
            lengths = [len(pairs[i][0]) for i in batch]
            ids_T = torch.tensor([token for i in batch for token in pairs[i][0]])
            types_T = torch.tensor([kind for i in batch for kind in pairs[i][1]])
            logits_B1 = self.module(ids_T, *sequence_layout(lengths), lengths, types_T)
            for i, score in zip(batch, logits_B1[:, 0].tolist(), strict=True):
                scores[i] = score
        return scores

    def _pair(self, question: str, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a pair, and which part of it each belongs to."""
        while True:
            pair = self.tokenizer.backend.encode(question, text)
            excess = len(pair.ids) - self.context
            if excess <= 0:
                return list(pair.ids), list(pair.type_ids)
            spans = self.tokenizer.encode_with_offsets(text)[1]
            if excess >= len(spans):
                raise ContextOverflow(
                    f"the question leaves no room for a passage in the {self.context} tokens that {self.name} reads",
                    remedy="ask in fewer words, or without a reranker",
                )
            # Half of a word may be more tokens than it was of the whole, so what is left is counted again.
            text = text[: max(end for _, end in spans[: len(spans) - excess])]
