"""From text to the tokens of a document: cleaned, encoded as nothing but text, and ended by the end token."""

from __future__ import annotations

import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import tokenizers

from craton.data.example import UNTRAINED, Example, Ids
from craton.errors import UsageError
from craton.modalities.text.tokenizer import Tokenizer

PIECE_CHARACTERS: Final = 1 << 20
"""Longer texts are encoded in pieces: what the library keeps of a text while it works is a hundred times its size."""

# Line ends of other systems; controls that no text means (tab, line feed, form feed stay); halves of surrogate pairs.
_LINE_END = re.compile(r"\r\n?")
_NOISE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of one document. text_bytes: of its text in UTF-8. trained[n]: which tokens to learn, None for all."""

    ids: Ids
    text_bytes: int
    trained: npt.NDArray[np.bool_] | None = None


def clean(text: str) -> str:
    """The text without what no text means: carriage returns, control characters, byte order marks, half surrogates,
    blank lines around it."""
    return _NOISE.sub("", _LINE_END.sub("\n", text)).strip("\n")


def digest(text: str) -> bytes:
    """16 bytes that two texts share if they are the same but for white space and composition of characters (NFC)."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def fingerprint(tokenizer: Tokenizer) -> str:
    """The SHA-256 of the tokeniser's tokenizer.json, in hex."""
    return hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.uint16]:
    """[vocabulary] how many bytes of text each token stands for, 0 for special tokens."""
    lengths = (0 if i in tokenizer.special_ids else len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
    return np.fromiter(lengths, np.uint16, tokenizer.vocab_size)


class DocumentEncoder:
    """Encodes documents for pretraining: what the tokeniser puts first, the text, the end token.

    Special tokens that are written out in a text are text, and not the tokens: only the program places those. end_id:
    the token that ends a document. Raises UsageError for a tokeniser without one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._prefix, self._suffix = (np.array(ids, np.int32) for ids in _frame(tokenizer))
        self.end_id = int(self._suffix[-1])
        self._backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
        self._backend.encode_special_tokens = True

    def encode(self, texts: Sequence[str]) -> list[Document]:
        """The document of each text; texts go through the tokeniser in parallel."""
        pieces = [list(_pieces(text)) for text in texts]
        encoded = self._encode(itertools.chain.from_iterable(pieces))
        documents = []
        for text, parts in zip(texts, pieces, strict=True):
            ids = [self._prefix, *itertools.islice(encoded, len(parts)), self._suffix]
            documents.append(Document(np.concatenate(ids), len(text.encode())))
        return documents

    def _encode(self, pieces: Iterable[str]) -> Iterator[Ids]:
        for some in chunked(pieces, 2 * PIECE_CHARACTERS):
            for encoding in self._backend.encode_batch_fast(some, add_special_tokens=False):
                yield np.array(encoding.ids, np.int32)


def chunked(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Texts in lists of about so many characters."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= characters:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def rendered_document(example: Example, token_bytes: npt.NDArray[np.uint16]) -> Document:
    """The document of a rendered chat or prompt, which learns what the example learns."""
    [sequence] = example.sequences
    trained = np.zeros(len(sequence), np.bool_)
    trained[1:] = sequence.targets[:-1] != UNTRAINED
    return Document(sequence.ids, int(token_bytes[sequence.ids].sum()), trained)


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What goes before and behind the tokens of a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    prefix, suffix = full[:start], full[start + len(bare) :]
    if tokenizer.eos_ids and not set(suffix) & set(tokenizer.eos_ids):
        suffix = [*suffix, tokenizer.eos_ids[0]]
    if not suffix:
        raise UsageError(
            "the tokeniser has no token that ends a document",
            remedy='name one as "eos_token" in its tokenizer_config.json',
        )
    return prefix, suffix


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, else before the space of a word, else where they must."""
    first = 0
    while len(text) - first > PIECE_CHARACTERS:
        limit = first + PIECE_CHARACTERS
        end = text.rfind("\n", first, limit) + 1
        if not end:
            space = text.rfind(" ", first + 1, limit)
            end = space if space > 0 else limit
        yield text[first:end]
        first = end
    yield text[first:]
