"""Descriptions of whole tokenizers in the tokenizer.json format, for sources that keep only a vocabulary.

Old folders and GGUF files name a kind of tokenizer and list its tokens; the rest follows from the kind. Every source
ends as one such description, which the `tokenizers` library turns into a tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import processors

from craton.errors import FileFormatError
from craton.modalities.text.pretokenizers import PreTokenizer

Json = dict[str, Any]

WORD_START = "▁"  # U+2581, SentencePiece's visible space
_BYTE_LEVEL: Json = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}


def byte_level_bpe(
    vocab: Mapping[str, int], merges: Sequence[Sequence[str]], pre: PreTokenizer, added: Sequence[Json] = ()
) -> Json:
    """Byte-level BPE (GPT-2 and heirs): words cut as `pre` says, then merged in the order of `merges`."""
    model = {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": pre.ignore_merges}
    return {
        "added_tokens": added,
        "normalizer": pre.normalizer,
        "pre_tokenizer": pre.pre_tokenizer,
        "decoder": _BYTE_LEVEL,
        "model": model,
    }


def sentencepiece_bpe(
    vocab: Mapping[str, int],
    merges: Sequence[Sequence[str]],
    *,
    space_prefix: bool,
    unk: str | None,
    added: Sequence[Json] = (),
) -> Json:
    """SentencePiece's BPE (Llama 2, Mistral): spaces become ▁, unknown characters their bytes <0x00> to <0xFF>."""
    to_visible = {"type": "Replace", "pattern": {"String": " "}, "content": WORD_START}
    prepend = {"type": "Prepend", "prepend": WORD_START}
    steps = [
        {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if space_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = {
        "type": "BPE",
        "vocab": vocab,
        "merges": merges,
        "unk_token": unk,
        "fuse_unk": True,
        "byte_fallback": True,
    }
    return {
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*([prepend] if space_prefix else []), to_visible]},
        "decoder": {"type": "Sequence", "decoders": steps},
        "model": model,
    }


def wordpiece(
    vocab: Mapping[str, int],
    *,
    lowercase: bool,
    strip_accents: bool | None = None,
    chinese_characters: bool = True,
    unk: str = "[UNK]",
    cls: str = "[CLS]",
    sep: str = "[SEP]",
    added: Sequence[Json] = (),
) -> Json:
    """BERT's WordPiece: continuing pieces start with ##, and a text becomes [CLS] text [SEP]."""
    normalizer = {
        "type": "BertNormalizer",
        "clean_text": True,
        "handle_chinese_chars": chinese_characters,
        "strip_accents": strip_accents,
        "lowercase": lowercase,
    }
    model = {
        "type": "WordPiece",
        "vocab": vocab,
        "unk_token": unk,
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 100,
    }
    return {
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "cls": [cls, vocab[cls]], "sep": [sep, vocab[sep]]},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": model,
    }


def added_token(text: str, token_id: int, *, special: bool) -> Json:
    """An entry of `added_tokens`: matched whole, before any cutting."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token_id, "content": text, "special": special, **flags}


def mark_special(backend: tokenizers.Tokenizer, texts: Iterable[str]) -> None:
    """Makes vocabulary entries special tokens: matched whole in a text and left out of decoded text."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    plain = [text for text in texts if text not in known and backend.token_to_id(text) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in plain])


def surround(before: tuple[str, int] | None, after: tuple[str, int] | None) -> processors.TemplateProcessing:
    """A post-processor that puts the token `before` (text, id) in front of a text and `after` behind it."""
    first, last = ["BOS"] if before else [], ["EOS"] if after else []
    tokens = [
        {"id": name, "ids": [token[1]], "tokens": [token[0]]}
        for name, token in (("BOS", before), ("EOS", after))
        if token
    ]
    pair = [*first, "$A", *last, *(f"{name}:1" for name in (*first, "$B", *last))]
    return processors.TemplateProcessing(single=[*first, "$A", *last], pair=pair, special_tokens=tokens)


def build(description: Json, *, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a description made here; FileFormatError if its vocabulary and merges do not fit together."""
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], **description}
    for part in ("normalizer", "pre_tokenizer", "post_processor"):
        whole.setdefault(part, None)
    return parse(json.dumps(whole), where=where)


def parse(source: str, *, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json's text; FileFormatError if it is not one."""
    try:
        return tokenizers.Tokenizer.from_str(source)
    except Exception as error:  # the library raises nothing narrower
        raise FileFormatError(
            f"the tokenizer cannot be built: {error}", where=where, remedy="fetch the file again"
        ) from error
