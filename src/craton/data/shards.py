"""Shards as one long stream of tokens, and the windows that pretraining cuts from it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from craton.data.documents import fingerprint
from craton.data.example import UNTRAINED, Example, Ids, TokenSequence
from craton.data.shard_files import (
    FIRST,
    TEXT_BYTES,
    TOKEN_BYTES,
    PartEntry,
    Shard,
    ShardsManifest,
    TokenizerEntry,
    check_digests,
    damaged,
    map_array,
    map_shard,
    read_manifest,
)
from craton.errors import UsageError
from craton.modalities.text.tokenizer import Tokenizer


class Shards:
    """Tokens of documents one after another, over all shards; positions count from 0 over the whole stream.

    tokenizer: whose ids these are. token_bytes[vocabulary]: bytes of text that each token stands for. parts: what the
    stream is made of, with weights, where it is a mixture (else one part: itself). heldout: documents kept apart.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        tokenizer: TokenizerEntry,
        token_bytes: npt.NDArray[np.uint16],
        *,
        name: str = "",
        parts: Sequence[Part] = (),
        heldout: Shards | None = None,
    ) -> None:
        self._shards, self.tokenizer, self.token_bytes, self.name = tuple(shards), tokenizer, token_bytes, name
        self.parts: tuple[Part, ...] = tuple(parts) or (Part(self, 1.0),)
        self.heldout = heldout
        self._ends = np.cumsum([len(shard.tokens) for shard in self._shards], dtype=np.int64)
        self.tokens = int(self._ends[-1]) if len(self._shards) else 0
        self.documents = sum(len(shard.documents) for shard in self._shards)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the documents' text."""
        return sum(int(shard.documents[:, TEXT_BYTES].sum()) for shard in self._shards)

    def ids(self, first: int, last: int) -> Ids:
        """The tokens at positions first to last - 1."""
        return _joined([shard.tokens[a:b] for shard, a, b, _ in self._spans(first, last)], np.int32)

    def trained(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Whether each of these tokens is to be learnt: not where a document begins, nor what was only to be read."""
        pieces = []
        for shard, a, b, _ in self._spans(first, last):
            mask = np.ones(b - a, np.bool_) if shard.trained is None else shard.trained[a:b].astype(np.bool_)
            starts = shard.documents[:, FIRST]
            here = starts[np.searchsorted(starts, a) : np.searchsorted(starts, b)]
            mask[here - a] = False
            pieces.append(mask)
        return _joined(pieces, np.bool_)

    def starts(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """The positions within first to last - 1 where a document begins."""
        pieces = []
        for shard, a, b, offset in self._spans(first, last):
            starts = shard.documents[:, FIRST]
            pieces.append(starts[np.searchsorted(starts, a) : np.searchsorted(starts, b)] + offset)
        return _joined(pieces, np.int64)

    def text_bytes(self, first: int, last: int) -> npt.NDArray[np.float64]:
        """How many bytes of its document's text each of these tokens stands for.

        Whole numbers for tokenisers that keep every byte. Others drop spaces or change characters; there the bytes of
        a document are spread over its tokens in proportion to theirs, so that its sum is right all the same.
        """
        pieces = []
        for shard, a, b, _ in self._spans(first, last):
            starts = shard.documents[:, FIRST]
            here = slice(np.searchsorted(starts, a, side="right") - 1, np.searchsorted(starts, b))
            documents = shard.documents[here]
            lengths = np.diff(np.clip([*documents[:, FIRST], b], a, b))
            ratios = documents[:, TEXT_BYTES] / np.maximum(documents[:, TOKEN_BYTES], 1)
            pieces.append(self.token_bytes[shard.tokens[a:b]] * np.repeat(ratios, lengths))
        return _joined(pieces, np.float64)

    def _spans(self, first: int, last: int) -> list[tuple[Shard, int, int, int]]:
        """The shards that hold positions first to last - 1: (shard, its tokens from, to, position of its first)."""
        spans = []
        at = int(np.searchsorted(self._ends, first, side="right"))
        while first < last and at < len(self._shards):
            offset = int(self._ends[at]) - len(self._shards[at].tokens)
            until = min(last, int(self._ends[at]))
            spans.append((self._shards[at], first - offset, until - offset, offset))
            first, at = until, at + 1
        return spans


@dataclass(frozen=True)
class Part:
    """A source of a mixture with its weight."""

    shards: Shards
    weight: float


class WindowSource:
    """The stream cut into windows of `context` tokens for next-token training. Window i predicts tokens
    i * context + 1 to (i + 1) * context from those before them, within each document.

    A window's sequences are its pieces of documents: tokens see no other document, and the first token of a document is
    nobody's target. Tokens behind the last whole window are left out. Raises UsageError where there is no whole window.
    """

    def __init__(self, shards: Shards, context: int) -> None:
        if context < 1:
            raise UsageError(f"a context of {context} tokens is no window")
        self.shards, self.row = shards, context
        windows = (shards.tokens - 1) // context
        if windows < 1:
            what = f"{shards.name or 'the data'} holds {shards.tokens} tokens, no window of {context} + 1"
            raise UsageError(what, remedy="take a smaller context, or more data")
        self.lengths = np.full(windows, context, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        first, last = self._bounds(index)
        ids = self.shards.ids(first, last + 1)
        targets = np.where(self.shards.trained(first + 1, last + 1), ids[1:], UNTRAINED).astype(np.int32)
        borders = [0, *(self.shards.starts(first + 1, last) - first).tolist(), self.row]
        pieces = [TokenSequence(ids[a:b], targets[a:b]) for a, b in itertools.pairwise(borders)]
        return Example(tuple(pieces), origin=f"{self.shards.name}#{index}")

    def trained_bytes(self, index: int) -> float:
        """Bytes of text that the targets of a window stand for.

        Bits per byte over any windows = their summed loss in nats / ln 2 / the sum of this.
        """
        first, last = self._bounds(index)
        trained = self.shards.trained(first + 1, last + 1)
        return float(self.shards.text_bytes(first + 1, last + 1)[trained].sum())

    def _bounds(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        return index * self.row, (index + 1) * self.row


def open_shards(folder: str | Path, tokenizer: Tokenizer | None = None, *, verify: bool = False) -> Shards:
    """Map what `craton data prepare` wrote, after checking the manifest and the sizes of all files.

    tokenizer: that of the model to train; other ids than its own are refused. verify: read everything and compare
    checksums, too.

    Raises FileFormatError for a folder that is damaged or none of shards, UsageError for another tokeniser's.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if tokenizer is not None:
        check_tokenizer(manifest.tokenizer, tokenizer, folder)
    shards = map_shards(folder, manifest)
    if verify:
        check_digests(folder, manifest)
    return shards


def map_shards(folder: Path, manifest: ShardsManifest) -> Shards:
    """The shards of a folder whose manifest was read."""
    table = map_array(folder, manifest.token_bytes, "uint16", (manifest.tokenizer.vocab_size,))

    def part(entry: PartEntry) -> tuple[list[Shard], Shards]:
        shards = [map_shard(folder, shard, manifest.dtype) for shard in entry.shards]
        stream = Shards(shards, manifest.tokenizer, table, name=entry.name)
        if (stream.tokens, stream.documents) != (entry.tokens, entry.documents):
            raise damaged(folder, f"the counts of {entry.name!r} are not those of its shards")
        return shards, stream

    parts = [part(entry) for entry in manifest.parts]
    return Shards(
        [shard for shards, _ in parts for shard in shards],
        manifest.tokenizer,
        table,
        name=str(folder),
        parts=[Part(stream, entry.weight) for (_, stream), entry in zip(parts, manifest.parts, strict=True)],
        heldout=part(manifest.heldout)[1] if manifest.heldout else None,
    )


def check_tokenizer(made_with: TokenizerEntry, tokenizer: Tokenizer, folder: Path) -> None:
    """Raises UsageError unless the shards' ids are those of `tokenizer`."""
    sha256 = fingerprint(tokenizer)
    if sha256 != made_with.sha256:
        raise UsageError(
            f"the shards were made with the tokeniser of {made_with.name} ({made_with.vocab_size} tokens, "
            f"{made_with.sha256[:12]}), the model's has {tokenizer.vocab_size} tokens ({sha256[:12]})",
            where=str(folder),
            remedy="prepare the data with the model's tokeniser: craton data prepare ... --tokenizer MODEL",
        )


def _joined(pieces: list[npt.NDArray[Any]], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    return np.concatenate(pieces).astype(dtype, copy=False) if pieces else np.zeros(0, dtype)
