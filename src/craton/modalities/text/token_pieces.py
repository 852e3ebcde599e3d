"""What one token adds to a text: its exact bytes, and whether text can be put together token by token.

A `tokenizers` decoder works on a whole list of tokens. Streaming, constrained decoding and bits-per-byte need the share
of each token, so this module reads the decoder's description and says which of its rules apply to a token by itself.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import tokenizers

from craton.errors import UsageError

# Decoder steps that treat each token by itself (byte fallback: each run of byte tokens).
_LOCAL_STEPS = {"Replace", "ByteFallback", "Strip", "Metaspace"}


def byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE (GPT-2): printable Latin-1 stands for itself, the rest starts at U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = byte_level_alphabet()


class TokenPieces:
    """The share of each token in decoded text, for one tokenizer."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._texts: dict[int, str] = {}

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether text is the tokens' bytes one after another (GPT-2 and its heirs)."""
        return self._decoder.get("type") == "ByteLevel"

    @cached_property
    def is_piecewise(self) -> bool:
        """Whether no token's text depends on the tokens after it, except within a run of byte tokens."""
        if self._decoder.get("type") in {None, "WordPiece"}:
            return True
        fused = False
        for step in self._steps:
            if fused and not (step["type"] == "Strip" and step["stop"] == 0):
                return False
            if step["type"] == "Fuse":
                fused = True
            elif step["type"] not in _LOCAL_STEPS:
                return False
        return True

    @property
    def decoder_name(self) -> str:
        return str(self._decoder.get("type"))

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes that the token adds in the middle of a text; b"" beyond the vocabulary."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            # A token with any character outside the alphabet is literal text: the decoder's own rule for added tokens.
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return token.encode()
        if self.is_byte(token_id):
            return bytes.fromhex(token[3:5])
        return self.continuation([token_id]).encode()

    def is_byte(self, token_id: int) -> bool:
        """Whether the token is one raw byte, <0x00> to <0xFF>, that joins its neighbours into characters."""
        token = self._backend.id_to_token(token_id)
        return self._has_byte_fallback and token is not None and names_byte(token)

    def continuation(self, ids: list[int]) -> str:
        """Text that `ids` add when other text stands before them (the start of a text has its own rules)."""
        if len(ids) == 1 and ids[0] in self._texts:
            return self._texts[ids[0]]
        anchor, width = self._anchor
        text = str(self._backend.decode([anchor, *ids], skip_special_tokens=False))[width:]
        if len(ids) == 1:
            self._texts[ids[0]] = text
        return text

    @cached_property
    def _anchor(self) -> tuple[int, int]:
        """A token to stand before others in `continuation`, and the length of its own text."""
        for token_id in sorted(self._backend.get_vocab().values()):
            width = len(self._backend.decode([token_id], skip_special_tokens=False))
            if width and not self.is_byte(token_id):
                return token_id, width
        raise UsageError("this tokenizer has no token that decodes to text", remedy="check its vocabulary")

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        decoder = self._backend.decoder
        description: dict[str, Any] = json.loads(decoder.__getstate__()) if decoder else {}
        steps = description.get("decoders", [])
        return steps[0] if len(steps) == 1 else description

    @property
    def _steps(self) -> list[dict[str, Any]]:
        steps: list[dict[str, Any]] = self._decoder.get("decoders", [self._decoder])
        return steps

    @cached_property
    def _has_byte_fallback(self) -> bool:
        return any(step.get("type") == "ByteFallback" for step in self._steps)


def names_byte(token: str) -> bool:
    """Whether a token is spelt as a raw byte, <0x00> to <0xFF>."""
    hexadecimal = set("0123456789abcdefABCDEF")
    return len(token) == 6 and token[:3] == "<0x" and token[5] == ">" and hexadecimal.issuperset(token[3:5])
