"""Text from token ids one at a time, for streaming: the pieces add up to exactly what decoding all ids gives.

A character may be spread over several tokens, so a piece comes only once nothing that follows can change it. The cost
of a token does not grow with the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection
from typing import Protocol

import tokenizers

from craton.modalities.text.token_pieces import TokenPieces


class StreamDecoder(Protocol):
    """Turns ids into text as they arrive."""

    def push(self, token_id: int) -> str:
        """Text that is final now that this token has come; often "", in the middle of a character."""

    def finish(self) -> str:
        """What was still held back; half a character becomes U+FFFD. Call once, after the last token."""


class ByteStreamDecoder:
    """For byte-level tokenizers: an incremental UTF-8 decoder over the tokens' bytes."""

    def __init__(self, pieces: TokenPieces, skipped: Collection[int]) -> None:
        self._pieces, self._skipped = pieces, skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._utf8.decode(self._pieces.bytes_of(token_id))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class PieceStreamDecoder:
    """For tokenizers whose tokens are text of their own (SentencePiece, WordPiece), with or without byte fallback.

    A run of byte tokens is held until it ends, because one bad byte turns the whole run into U+FFFD.
    """

    def __init__(self, backend: tokenizers.Tokenizer, pieces: TokenPieces, skipped: Collection[int]) -> None:
        self._backend, self._pieces, self._skipped = backend, pieces, skipped
        self._byte_run: list[int] = []
        # The first text follows its own rules (a leading space is dropped), so it is decoded from the very start.
        self._head: list[int] | None = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or self._backend.id_to_token(token_id) is None:
            return ""
        if self._pieces.is_byte(token_id):
            self._byte_run.append(token_id)
            return ""
        return self.finish() + self._text([token_id])

    def finish(self) -> str:
        run, self._byte_run = self._byte_run, []
        return self._text(run) if run else ""

    def _text(self, ids: list[int]) -> str:
        if self._head is None:
            return self._pieces.continuation(ids)
        self._head += ids
        text = str(self._backend.decode(self._head, skip_special_tokens=False))
        if text:
            self._head = None
        return text
