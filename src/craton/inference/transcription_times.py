"""When each word is spoken: dynamic time warping over the cross-attention of the heads that follow the words, as
OpenAI's implementation does it (Radford 2022; Giorgino 2009, doi 10.18637/jss.v031.i07, for the warping)."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craton.modalities.audio import SpeechTokens
from craton.modalities.text import Tokenizer
from craton.models import Seq2Seq
from craton.trunk import Context

SECONDS_PER_VECTOR = 0.02  # of the encoder
SMOOTHED = 7  # vectors of a median filter over time
UNSPACED = ("zh", "ja", "th", "lo", "my", "yue")  # languages that are written without spaces
OPENING, CLOSING = "\"'“¿([{-", "\"'.。,，!！?？:：”)]}、"
SENTENCE_ENDS = ".。!！?？"
LONGEST_MEDIAN = 0.7  # seconds


@dataclass(frozen=True)
class Word:
    """A word with the punctuation that hangs on it, and when it is spoken, in seconds. probability: of its tokens."""

    text: str
    start: float
    end: float
    probability: float


class WordAligner:
    """Finds word times with one model. heads: its (layer, head) pairs that follow the words; none: the upper half."""

    def __init__(
        self, module: Seq2Seq, tokenizer: Tokenizer, tokens: SpeechTokens, heads: Sequence[tuple[int, int]]
    ) -> None:
        self.module, self.tokenizer, self.tokens = module, tokenizer, tokens
        layers = module.config.decoder.layers
        whole = [
            (number, head)
            for number in range(len(layers) // 2, len(layers))
            for head in range(layers[number].attention.heads)
        ]
        known = [(n, h) for n, h in heads if n < len(layers) and h < layers[n].attention.heads]
        self.heads = known or whole

    @torch.inference_mode()
    def words(
        self, context: Context, number: int, start: Sequence[int], text: Sequence[int], frames: int, language: str
    ) -> list[Word]:
        """The words of `text` (ids without times), heard in the first `frames` vectors of context `number`.

        start: the ids that begin the transcript.
        """
        text = list(text)
        if not text:
            return []
        ids = [*start, self.tokens.no_times, *text, self.tokens.end]
        if len(ids) > self.module.config.context:
            return []
        ids_T = torch.tensor(ids)
        view = context.view([number] * len(ids), record=True)
        hidden_TD = self.module.hidden(ids_T, torch.arange(len(ids)), None, view)
        assert view.scores is not None
        logits_TV = self.module.logits(hidden_TD[len(start) : -2]).float()[:, : self.tokens.end]
        chosen = logits_TV.log_softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0].exp().tolist()
        cost_TS = -self._attention(view.scores, len(start), frames)
        rows, columns = warp(cost_TS)
        begins = columns[np.flatnonzero(np.diff(rows, prepend=-1))] * SECONDS_PER_VECTOR
        words, at = [], 0
        for piece, count in self._split(text, language):
            # Row j of the matrix is where token j was foretold; the last row foretells the end.
            word = Word(piece, float(begins[at]), float(begins[at + count]), float(np.mean(chosen[at : at + count])))
            words.append(word)
            at += count
        return _join_punctuation(_shorten(words))

    def _attention(self, scores: Sequence[Tensor], first: int, frames: int) -> NDArray[np.float64]:
        # [tokens + 1, vectors]: one row for each text token and one for the end.
        chosen_XTS = torch.stack([scores[layer][0, head] for layer, head in self.heads])[:, :, : max(1, frames)]
        weights_XTS = chosen_XTS.softmax(-1)
        mean_XS, std_XS = weights_XTS.mean(1, keepdim=True), weights_XTS.std(1, keepdim=True, unbiased=False)
        smooth_XTS = _median((weights_XTS - mean_XS) / (std_XS + 1e-9))
        matrix: NDArray[np.float64] = smooth_XTS.mean(0)[first:-1].double().numpy()
        return matrix

    def _split(self, ids: list[int], language: str) -> list[tuple[str, int]]:
        """(text, number of tokens) of each word."""
        pieces: list[tuple[str, int]] = []
        held: list[int] = []
        for token in ids:
            held.append(token)
            text = self.tokenizer.decode(held)
            if "\ufffd" not in text or len(held) >= 8:  # whole characters
                pieces.append((text, len(held)))
                held = []
        if held:
            pieces.append((self.tokenizer.decode(held), len(held)))
        if language in UNSPACED:
            return pieces
        words: list[tuple[str, int]] = []
        for text, count in pieces:
            bare = text.strip()
            if words and not text.startswith(" ") and not _is_punctuation(bare):
                words[-1] = (words[-1][0] + text, words[-1][1] + count)
            else:
                words.append((text, count))
        return words


def warp(cost_NM: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The cheapest path through a matrix from its first to its last cell, going right, down or both: (rows, columns).

    Cells are worked out diagonal by diagonal, since those of one diagonal depend on the two before it alone.
    """
    rows, columns = cost_NM.shape
    total = np.full((rows + 1, columns + 1), np.inf)
    total[0, 0] = 0.0
    step = np.zeros((rows + 1, columns + 1), np.int8)
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.stack((total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]))
        best = before.argmin(0)
        # On a tie the path goes right, as in the reference.
        best = np.where((before[2] <= before[0]) & (before[2] <= before[1]), 2, best)
        step[i, j] = best
        total[i, j] = cost_NM[i - 1, j - 1] + np.take_along_axis(before, best[None], 0)[0]
    path = []
    i_, j_ = rows, columns
    while i_ > 0 and j_ > 0:
        path.append((i_ - 1, j_ - 1))
        back = step[i_, j_]
        i_ -= back in (0, 1)
        j_ -= back in (0, 2)
    found = np.array(path[::-1], np.int64)
    return found[:, 0], found[:, 1]


def _median(x_XTS: Tensor) -> Tensor:
    pad = SMOOTHED // 2
    if x_XTS.shape[-1] <= pad:
        return x_XTS
    padded = torch.nn.functional.pad(x_XTS, (pad, pad), mode="reflect")
    return padded.unfold(-1, SMOOTHED, 1).median(-1).values


def _is_punctuation(text: str) -> bool:
    return bool(text) and all(unicodedata.category(char)[0] in "PS" for char in text)


def _shorten(words: list[Word]) -> list[Word]:
    """A word beside the end of a sentence takes the pause there for its own: at most twice the median is left to it."""
    lengths = [word.end - word.start for word in words if word.end > word.start]
    longest = 2 * min(LONGEST_MEDIAN, float(np.median(lengths))) if lengths else 0.0
    if not longest:
        return words
    out = list(words)
    for i, word in enumerate(words):
        if i == 0 or word.end - word.start <= longest:
            continue
        if word.text.strip() in SENTENCE_ENDS:
            out[i] = replace(word, end=word.start + longest)
        elif words[i - 1].text.strip() in SENTENCE_ENDS:
            out[i] = replace(word, start=word.end - longest)
    first = out[0]
    if first.end - first.start > longest:  # the silence before the text
        out[0] = replace(first, start=first.end - longest)
    return out


def _join_punctuation(words: list[Word]) -> list[Word]:
    """Opening marks join the word behind them, closing ones the word before."""
    joined: list[Word] = []
    for word in words:
        last = joined[-1] if joined else None
        if last is not None and word.text.strip() in CLOSING and not last.text.endswith(" "):
            joined[-1] = replace(last, text=last.text + word.text)
        elif last is not None and last.text.startswith(" ") and last.text.strip() and last.text.strip() in OPENING:
            joined[-1] = replace(word, text=last.text + word.text)
        else:
            joined.append(word)
    return joined
