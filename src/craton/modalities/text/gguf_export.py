"""A tokenizer as GGUF metadata, the inverse of `gguf_tokenizer`.

GGUF names the ways to cut a text instead of describing them. So what is written is read back at once and compared, and
a tokenizer that would come back different is refused: a file never changes ids silently.
"""

from __future__ import annotations

import json
from typing import Any

from craton.errors import CheckpointError
from craton.modalities.text.gguf_tokenizer import (
    BYTE,
    CONTROL,
    END_TOKENS,
    ID_KEYS,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    tokenizer_from_gguf,
)
from craton.modalities.text.pretokenizers import PRE_TOKENIZERS
from craton.modalities.text.token_pieces import names_byte
from craton.modalities.text.tokenizer import Tokenizer
from craton.modalities.text.tokenizer_json import WORD_START, Json

# The type that GGUF stores each entry as; the values given here are plain Python.
# `tokenizer.chat_template.NAME` (a template besides the default one) is a string too.
GGUF_TYPES = {
    "tokenizer.ggml.model": "string",
    "tokenizer.ggml.pre": "string",
    "tokenizer.ggml.tokens": "array of string",
    "tokenizer.ggml.token_type": "array of int32",
    "tokenizer.ggml.scores": "array of float32",
    "tokenizer.ggml.merges": "array of string",
    **dict.fromkeys(ID_KEYS, "uint32"),
    "tokenizer.ggml.eot_token_id": "uint32",
    "tokenizer.ggml.eom_token_id": "uint32",
    "tokenizer.ggml.add_bos_token": "bool",
    "tokenizer.ggml.add_eos_token": "bool",
    "tokenizer.ggml.add_space_prefix": "bool",
    "tokenizer.ggml.normalizer.lowercase": "bool",
    "tokenizer.ggml.normalizer.strip_accents": "bool",
    "tokenizer.chat_template": "string",
    "tokenizer.chat_templates": "array of string",
}


def gguf_metadata_from_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """The `tokenizer.*` entries that describe this tokenizer, as plain values (stored types: GGUF_TYPES).

    Covers byte-level BPE, SentencePiece BPE and WordPiece. Raises CheckpointError for a tokenizer that GGUF cannot
    express.
    """
    description = _description(tokenizer)
    model = description["model"]
    if model["type"] == "WordPiece":
        entries = _wordpiece_entries(tokenizer, description)
    elif model["type"] == "BPE" and model["byte_fallback"]:
        entries = _sentencepiece_entries(tokenizer, description)
    elif model["type"] == "BPE":
        entries = _byte_level_entries(tokenizer, description)
    else:
        raise _refusal(f"a {model['type']} vocabulary")
    entries |= _special_entries(tokenizer, entries["tokenizer.ggml.model"]) | _template_entries(tokenizer)
    _check_same(tokenizer, tokenizer_from_gguf(entries))
    return entries


def _byte_level_entries(tokenizer: Tokenizer, description: Json) -> dict[str, Any]:
    model = description["model"]
    cut = _steps(description["pre_tokenizer"]), _steps(description["normalizer"]), model["ignore_merges"]
    names = (
        name
        for name, family in PRE_TOKENIZERS.items()
        if cut == (_steps(family.pre_tokenizer), _steps(family.normalizer), family.ignore_merges)
    )
    name = next(names, None)
    if name is None:
        raise _refusal("this way of cutting text into words (pre_tokenizer and normalizer in tokenizer.json)")
    tokens, types = _tokens(tokenizer, description)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


def _sentencepiece_entries(tokenizer: Tokenizer, description: Json) -> dict[str, Any]:
    tokens, types = _tokens(tokenizer, description)
    merges = description["model"]["merges"]
    # A token is as good as the first merge that makes it.
    rank = {left + right: position for position, (left, right) in reversed(list(enumerate(merges)))}
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [-float(rank.get(token, len(merges))) for token in tokens],
        "tokenizer.ggml.add_space_prefix": any(s["type"] == "Prepend" for s in _steps(description["normalizer"])),
    }


def _wordpiece_entries(tokenizer: Tokenizer, description: Json) -> dict[str, Any]:
    tokens, types = _tokens(tokenizer, description)
    normalizer = description["normalizer"] or {}
    entries = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": [
            token if kind == CONTROL else token[2:] if token.startswith("##") else WORD_START + token
            for token, kind in zip(tokens, types, strict=True)
        ],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.normalizer.lowercase": bool(normalizer.get("lowercase")),
    }
    if normalizer.get("strip_accents") is not None:
        entries["tokenizer.ggml.normalizer.strip_accents"] = normalizer["strip_accents"]
    return entries


def _tokens(tokenizer: Tokenizer, description: Json) -> tuple[list[str], list[int]]:
    """All tokens in the order of their ids, and their types."""
    added = {entry["id"]: entry for entry in description["added_tokens"]}
    byte_fallback = description["model"].get("byte_fallback", False)
    tokens, types = [], []
    for token_id in range(tokenizer.vocab_size):
        token = tokenizer.backend.id_to_token(token_id)
        if token is None:
            raise _refusal(f"a vocabulary without a token {token_id}")
        tokens.append(token)
        if token_id in added:
            kind = CONTROL if added[token_id]["special"] else USER_DEFINED
            types.append(UNKNOWN if byte_fallback and token_id == tokenizer.unk_id else kind)
        else:
            types.append(BYTE if byte_fallback and names_byte(token) else NORMAL)
    return tokens, types


def _special_entries(tokenizer: Tokenizer, model: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, name in ID_KEYS.items():
        token_id = tokenizer.backend.token_to_id(tokenizer.special_tokens.get(name, ""))
        if token_id is not None:
            entries[key] = token_id
    if model == "bert":
        # The format says BOS where BERT says CLS, and knows what BERT puts around a text.
        cls_id = entries.pop("tokenizer.ggml.cls_token_id", None)
        return entries if cls_id is None else entries | {"tokenizer.ggml.bos_token_id": cls_id}
    found_anyway = {entries.get("tokenizer.ggml.eos_token_id"), *map(tokenizer.backend.token_to_id, END_TOKENS)}
    other_ends = [i for i in tokenizer.eos_ids if i not in found_anyway]
    end_keys = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    entries |= dict(zip(end_keys, other_ends, strict=False))
    entries["tokenizer.ggml.add_bos_token"] = tokenizer.adds_bos
    entries["tokenizer.ggml.add_eos_token"] = tokenizer.encode("")[-1:] == list(tokenizer.eos_ids[:1]) != []
    return entries


def _template_entries(tokenizer: Tokenizer) -> dict[str, Any]:
    others = {name: source for name, source in tokenizer.chat_templates.items() if name != "default"}
    entries: dict[str, Any] = {f"tokenizer.chat_template.{name}": source for name, source in others.items()}
    if tokenizer.chat_template is not None:
        entries["tokenizer.chat_template"] = tokenizer.chat_template
    if others:
        entries["tokenizer.chat_templates"] = sorted(others)
    return entries


def _check_same(tokenizer: Tokenizer, read_back: Tokenizer) -> None:
    """Refuses a tokenizer that would come back different."""
    was, now = _description(tokenizer), _description(read_back)
    normalized_matters = was["normalizer"] is not None

    def matching(entry: Json) -> tuple[Any, ...]:
        flags = [entry[k] for k in ("id", "content", "special", "single_word", "lstrip", "rstrip")]
        return (*flags, normalized_matters and entry["normalized"])

    def model_rules(model: Json) -> Json:
        return {key: value or None for key, value in model.items() if key not in ("vocab", "merges", "unk_token")}

    def decoder_steps(decoder: Json | None) -> list[Json]:
        # The options of a byte-level decoder have no effect.
        return [{"type": "ByteLevel"} if step["type"] == "ByteLevel" else step for step in _steps(decoder)]

    same = {
        "its normalizer": _steps(was["normalizer"]) == _steps(now["normalizer"]),
        "its pre_tokenizer": _steps(was["pre_tokenizer"]) == _steps(now["pre_tokenizer"]),
        "its decoder": decoder_steps(was["decoder"]) == decoder_steps(now["decoder"]),
        "the rules of its model": model_rules(was["model"]) == model_rules(now["model"]),
        "its merges, which do not follow from one score for each token": (
            was["model"].get("merges") == now["model"].get("merges")
        ),
        "its added tokens' matching rules": (
            sorted(map(matching, was["added_tokens"])) == sorted(map(matching, now["added_tokens"]))
        ),
        "the tokens that it puts around a text (post_processor)": tokenizer.encode("") == read_back.encode(""),
        "so many tokens that end a generation": set(tokenizer.eos_ids) <= set(read_back.eos_ids),
    }
    for what, is_same in same.items():
        if not is_same:
            raise _refusal(what)


def _description(tokenizer: Tokenizer) -> Json:
    description: Json = json.loads(tokenizer.backend.to_str())
    return description


def _steps(part: Json | None) -> list[Json]:
    """The steps of a normalizer, pre_tokenizer or decoder, without nesting and without what changes no ids or text."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner = part.get("pretokenizers") or part.get("normalizers") or part.get("decoders") or []
        return [step for item in inner for step in _steps(item)]
    if part["type"] == "ByteLevel":
        return [{key: value for key, value in part.items() if key != "trim_offsets"}]
    return [part]


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(
        f"GGUF cannot express {what}",
        where="tokenizer",
        remedy="export in the Hugging Face layout, which keeps the tokenizer as it is",
    )
