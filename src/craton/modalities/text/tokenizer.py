"""Text to token ids and back, for every tokenizer that the `tokenizers` library can run.

A `Tokenizer` comes from a Hugging Face folder (`Tokenizer.from_folder`), from GGUF metadata
(`gguf_tokenizer.tokenizer_from_gguf`) or around a ready `tokenizers.Tokenizer`. Padding and truncation that a file may
ask for are always off: documents are packed flat, and nothing is ever cut silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import processors

from craton.errors import UsageError
from craton.modalities.text.token_pieces import TokenPieces
from craton.modalities.text.token_stream import ByteStreamDecoder, PieceStreamDecoder, StreamDecoder
from craton.modalities.text.tokenizer_files import read_tokenizer_folder


class Tokenizer:
    """Encodes and decodes with a `tokenizers.Tokenizer`, and knows its special tokens and chat templates.

    special_tokens: name -> text, such as {"bos_token": "<s>"}; chat templates see these as variables.
    eos_ids: ids that end a generation; the id of `eos_token` is put first.
    chat_templates: name -> Jinja source; "default" serves chat, "tool_use" (if any) chat with tools.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        _keep_whole_offsets(backend)
        self.backend = backend
        self.special_tokens: Mapping[str, str] = MappingProxyType(dict(special_tokens or {}))
        self.chat_templates: Mapping[str, str] = MappingProxyType(dict(chat_templates or {}))
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.bos_id = self._id_of("bos_token")
        self.pad_id = self._id_of("pad_token")
        self.unk_id = self._id_of("unk_token")
        own_eos = self._id_of("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if own_eos is None else [own_eos]), *eos_ids]))
        self._pieces = TokenPieces(backend)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Reads a folder in the Hugging Face layout: tokenizer.json (or vocabulary files), configs, chat templates.

        Raises FileFormatError if files are missing, malformed, or of a kind that cannot be read.
        """
        files = read_tokenizer_folder(Path(path))
        return cls(
            files.backend,
            special_tokens=files.special_tokens,
            eos_ids=files.eos_ids,
            chat_templates=files.chat_templates,
        )

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the default chat template; None for a model without one."""
        return self.chat_templates.get("default")

    @cached_property
    def adds_bos(self) -> bool:
        """Whether `encode` with special tokens puts the beginning-of-sequence token first."""
        return self.bos_id is not None and self.encode("")[:1] == [self.bos_id]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A special token written out in the text becomes its id, as in the reference."""
        return list(self._encode(text, add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text; the lists differ in length, as nothing is padded."""
        for text in texts:
            _check_encodable(text)
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids without added special tokens, and the half-open character range of `text` that each one covers.

        Tokens that share one character (parts of its UTF-8 bytes) carry the same range.
        """
        encoding = self._encode(text, add_special_tokens=False)
        return list(encoding.ids), list(encoding.offsets)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Invalid UTF-8 becomes U+FFFD; ids beyond the vocabulary add nothing."""
        try:
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        except OverflowError as error:
            raise UsageError("token ids must be 0 or more", remedy="check where these ids come from") from error

    def stream(self, *, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time; its pieces add up to exactly `decode` of all ids.

        Raises UsageError for the rare decoders in which a later token changes the text of earlier ones.
        """
        skipped = self.special_ids if skip_special_tokens else frozenset()
        if self._pieces.is_byte_level:
            return ByteStreamDecoder(self._pieces, skipped)
        if self._pieces.is_piecewise:
            return PieceStreamDecoder(self.backend, self._pieces, skipped)
        raise UsageError(
            f"the text of this tokenizer ({self._pieces.decoder_name} decoder) cannot be streamed",
            remedy="decode all ids at once",
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one token adds in the middle of a text; special tokens count as their literal text.

        Those of byte-level and byte-fallback tokens may be part of a character. b"" for ids beyond the vocabulary.
        """
        return self._pieces.bytes_of(token_id)

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _encode(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        _check_encodable(text)
        return self.backend.encode(text, add_special_tokens=add_special_tokens)


def _check_encodable(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            "the text holds half of a surrogate pair, which is no character",
            where=f"character {error.start}",
            remedy="decode the source with its right encoding",
        ) from error


def _keep_whole_offsets(backend: tokenizers.Tokenizer) -> None:
    """Makes offsets cover whole tokens: a trimmed one would hide that a token begins before a mask's border."""
    post = backend.post_processor
    steps: Iterable[Any] = post if isinstance(post, processors.Sequence) else [post]  # type: ignore[assignment]
    for processor in steps:
        if isinstance(processor, (processors.ByteLevel, processors.RobertaProcessing)):
            processor.trim_offsets = False
