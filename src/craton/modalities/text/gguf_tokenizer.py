"""The tokenizer that a GGUF file describes in its metadata.

GGUF keeps a vocabulary and the name of a kind (`tokenizer.ggml.model`): byte-level BPE ("gpt2"), SentencePiece BPE
("llama"), WordPiece ("bert") or unigram ("t5"). The keys are those of the GGUF specification, and of llama.cpp where
the specification is silent.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from craton.errors import FileFormatError, UnknownName
from craton.modalities.text import tokenizer_json
from craton.modalities.text.pretokenizers import pre_tokenizer
from craton.modalities.text.tokenizer import Tokenizer
from craton.modalities.text.tokenizer_json import WORD_START, Json

# Token types (tokenizer.ggml.token_type); 5 is "unused".
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

# Keys of special token ids -> the name that chat templates and configs know the token by.
ID_KEYS = {
    "tokenizer.ggml.bos_token_id": "bos_token",
    "tokenizer.ggml.eos_token_id": "eos_token",
    "tokenizer.ggml.unknown_token_id": "unk_token",
    "tokenizer.ggml.seperator_token_id": "sep_token",  # the format's own spelling
    "tokenizer.ggml.padding_token_id": "pad_token",
    "tokenizer.ggml.cls_token_id": "cls_token",
    "tokenizer.ggml.mask_token_id": "mask_token",
}
_END_ID_KEYS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")

# Control tokens that end a turn or a text, whatever ids a file states: many files name one of a model's two.
END_TOKENS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<|end_of_text|>",
    "<|endoftext|>",
)


@dataclass
class _Vocabulary:
    """Tokens, their types and scores, and the special ones by name; checked against each other."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    special_tokens: dict[str, str]
    ids: dict[str, int]

    def added(self) -> list[Json]:
        """Control and user-defined tokens: matched whole in a text, before anything else."""
        return [
            tokenizer_json.added_token(token, i, special=kind == CONTROL)
            for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]


@dataclass(frozen=True)
class _Plan:
    """The tokenizer to build, and what texts are surrounded with if the file does not say."""

    description: Json
    adds_bos: bool = False
    adds_eos: bool = False


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer from a file's metadata (plain Python values under GGUF's keys).

    Raises FileFormatError if entries are missing or contradict each other, and UnknownName for a kind of tokenizer or
    pre-tokeniser that is not known, because a guess would give wrong ids.
    """
    kind = str(metadata.get("tokenizer.ggml.model", ""))
    if not kind:
        raise FileFormatError("the file describes no tokenizer", where="tokenizer.ggml.model is missing")
    if kind not in _PLANNERS:
        raise UnknownName("tokenizer model", kind, _PLANNERS, where="tokenizer.ggml.model")
    vocabulary = _read_vocabulary(metadata)
    plan = _PLANNERS[kind](metadata, vocabulary)
    backend = tokenizer_json.build(plan.description, where="tokenizer.ggml.* metadata")
    before = _surrounding(metadata, vocabulary, "bos", plan.adds_bos)
    after = _surrounding(metadata, vocabulary, "eos", plan.adds_eos)
    if before or after:
        backend.post_processor = tokenizer_json.surround(before, after)
    # A file without token types still names its special tokens.
    tokenizer_json.mark_special(backend, vocabulary.special_tokens.values())
    return Tokenizer(
        backend,
        special_tokens=vocabulary.special_tokens,
        eos_ids=_end_ids(metadata, vocabulary),
        chat_templates=_chat_templates(metadata),
    )


def _plan_byte_level(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> _Plan:
    pre = pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default")), where="tokenizer.ggml.pre")
    # The halves of a merge are set apart by the first space after their first character.
    halves = ((merge[:1], merge[1:].partition(" ")) for merge in _strings(metadata, "tokenizer.ggml.merges"))
    merges = [[first + left, right] for first, (left, _, right) in halves]
    return _Plan(tokenizer_json.byte_level_bpe(vocabulary.ids, merges, pre, vocabulary.added()), adds_bos=pre.adds_bos)


def _plan_sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> _Plan:
    description = tokenizer_json.sentencepiece_bpe(
        vocabulary.ids,
        merges_from_scores(vocabulary.tokens, vocabulary.scores, vocabulary.types),
        space_prefix=bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
        unk=vocabulary.special_tokens.get("unk_token"),
        added=vocabulary.added(),
    )
    return _Plan(description, adds_bos=True)


def merges_from_scores(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, which stores only how good each token is.

    Every way to put a token together from two others is a merge, the best token's first and, among equals, those with
    the longer left half: the order that conversions to tokenizer.json have always used.
    """
    joinable = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    merges = [
        (-scores[i], -cut, cut - len(token), (token[:cut], token[cut:]))
        for token, i in joinable.items()
        for cut in range(1, len(token))
        if token[:cut] in joinable and token[cut:] in joinable
    ]
    merges.sort(key=lambda merge: merge[:3])
    return [halves for *_, halves in merges]


def _plan_wordpiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> _Plan:
    """GGUF marks the pieces that start a word, with ▁; WordPiece marks those that do not, with ##."""
    named = vocabulary.special_tokens
    # Files say BOS and EOS where BERT says CLS and SEP.
    for alias, name, usual in (("bos_token", "cls_token", "[CLS]"), ("eos_token", "sep_token", "[SEP]")):
        stated = named.pop(alias, usual)
        named.setdefault(name, stated)
    named.setdefault("unk_token", "[UNK]")
    for name in ("unk_token", "cls_token", "sep_token"):
        if named[name] not in vocabulary.ids:
            raise FileFormatError(f"the vocabulary has no {named[name]} token", where="tokenizer.ggml.tokens")

    whole = {token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL}
    whole |= set(named.values())
    pieces = [
        token if token in whole else token[1:] if token.startswith(WORD_START) else f"##{token}"
        for token in vocabulary.tokens
    ]
    cased = any(piece.lower() != piece for piece in pieces if piece not in whole)
    description = tokenizer_json.wordpiece(
        _number(pieces),
        lowercase=bool(metadata.get("tokenizer.ggml.normalizer.lowercase", not cased)),
        strip_accents=metadata.get("tokenizer.ggml.normalizer.strip_accents"),
        unk=named["unk_token"],
        cls=named["cls_token"],
        sep=named["sep_token"],
        added=vocabulary.added(),
    )
    return _Plan(description)


def _plan_unigram(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> _Plan:
    """T5 and XLM-R: the most probable pieces, after the model's own table of character replacements."""
    normalizers: list[Json] = []
    charsmap = metadata.get("tokenizer.ggml.precompiled_charsmap")
    if charsmap is not None:
        # The bytes may have been stored as signed numbers.
        table = bytes(int(byte) & 0xFF for byte in _array(metadata, "tokenizer.ggml.precompiled_charsmap"))
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    if metadata.get("tokenizer.ggml.remove_extra_whitespaces", False):
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    scheme = "always" if metadata.get("tokenizer.ggml.add_space_prefix", True) else "never"
    metaspace = {"type": "Metaspace", "replacement": WORD_START, "prepend_scheme": scheme, "split": True}
    if "unk_token" not in vocabulary.special_tokens:
        raise FileFormatError("a unigram vocabulary needs an unknown token", where="tokenizer.ggml.unknown_token_id")
    model = {
        "type": "Unigram",
        "unk_id": vocabulary.ids[vocabulary.special_tokens["unk_token"]],
        "vocab": list(zip(vocabulary.tokens, vocabulary.scores, strict=True)),
        "byte_fallback": BYTE in vocabulary.types,
    }
    description: Json = {
        "added_tokens": vocabulary.added(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": model,
    }
    return _Plan(description, adds_eos=True)


_PLANNERS: dict[str, Callable[[Mapping[str, Any], _Vocabulary], _Plan]] = {
    "gpt2": _plan_byte_level,
    "llama": _plan_sentencepiece,
    "bert": _plan_wordpiece,
    "t5": _plan_unigram,
}


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    special_tokens: dict[str, str] = {}
    for key, name in ID_KEYS.items():
        token_id = _optional_id(metadata, key, len(tokens))
        if token_id is not None:
            special_tokens[name] = tokens[token_id]
    return _Vocabulary(
        tokens=tokens,
        types=[int(kind) for kind in _per_token(metadata, "tokenizer.ggml.token_type", NORMAL, len(tokens))],
        scores=[float(score) for score in _per_token(metadata, "tokenizer.ggml.scores", 0.0, len(tokens))],
        special_tokens=special_tokens,
        ids=_number(tokens),
    )


def _number(tokens: Sequence[str]) -> dict[str, int]:
    """token -> id; no token may come twice, or one of its ids would be lost."""
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise FileFormatError(f"the token {twice!r} is listed twice", where="tokenizer.ggml.tokens")
    return ids


def _surrounding(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, name: str, default: bool
) -> tuple[str, int] | None:
    """The BOS or EOS token that every text is given, if the file (or its kind, where the file is silent) says so."""
    flag = f"tokenizer.ggml.add_{name}_token"
    text = vocabulary.special_tokens.get(f"{name}_token")
    if text is not None:
        return (text, vocabulary.ids[text]) if metadata.get(flag, default) else None
    if metadata.get(flag) and metadata["tokenizer.ggml.model"] != "bert":
        raise FileFormatError(f"texts are to be given a {name} token, but the file names none", where=flag)
    return None


def _end_ids(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> list[int]:
    """Ids that end a generation besides eos_token_id: end of turn, end of message, and well-known names."""
    stated = [_optional_id(metadata, key, len(vocabulary.tokens)) for key in _END_ID_KEYS]
    named = [vocabulary.ids[token] for token in END_TOKENS if token in vocabulary.ids]
    return [i for i in stated if i is not None] + [i for i in named if vocabulary.types[i] == CONTROL]


def _chat_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    names = _strings(metadata, "tokenizer.chat_templates") if "tokenizer.chat_templates" in metadata else []
    keys = {"default": "tokenizer.chat_template"} | {name: f"tokenizer.chat_template.{name}" for name in names}
    return {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str)}


def _optional_id(metadata: Mapping[str, Any], key: str, vocab_size: int) -> int | None:
    value = metadata.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < vocab_size):
        raise FileFormatError(f"{value!r} is no id in a vocabulary of {vocab_size}", where=key)
    return value


def _per_token(metadata: Mapping[str, Any], key: str, default: float, vocab_size: int) -> Sequence[Any]:
    if metadata.get(key) is None:
        return [default] * vocab_size
    values = _array(metadata, key)
    if len(values) != vocab_size:
        raise FileFormatError(f"{len(values)} entries for {vocab_size} tokens", where=key)
    if not all(isinstance(value, (int, float)) for value in values):
        raise FileFormatError("the entries are not all numbers", where=key)
    return values


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = _array(metadata, key)
    if not all(isinstance(value, str) for value in values):
        raise FileFormatError("the entries are not all text", where=key)
    return values


def _array(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = metadata.get(key)
    if value is None:
        raise FileFormatError("the file describes no whole tokenizer", where=f"{key} is missing")
    if isinstance(value, (str, bytes, Mapping)) or not hasattr(value, "__iter__"):
        raise FileFormatError(f"an array was expected, not {type(value).__name__}", where=key)
    return value.tolist() if hasattr(value, "tolist") else list(value)
