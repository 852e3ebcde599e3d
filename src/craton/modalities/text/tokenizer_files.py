"""Reading a tokenizer from a folder in the Hugging Face layout, with its special tokens and chat templates.

tokenizer.json is used as it stands. Folders from before that format are read where the rules are known: vocab.json +
merges.txt (byte-level BPE) and vocab.txt (BERT's WordPiece).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from craton.errors import FileFormatError
from craton.modalities.text import tokenizer_json
from craton.modalities.text.pretokenizers import PRE_TOKENIZERS

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Tokenizer classes whose vocab.json + merges.txt are plain byte-level BPE -> the pre-tokeniser they cut words with.
_BYTE_LEVEL_CLASSES = {"": "gpt-2", "GPT2Tokenizer": "gpt-2", "Qwen2Tokenizer": "qwen2"}
_BERT_TOKENS = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
_WORDPIECE_CLASSES = {"", "BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer"}


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder says about its tokenizer."""

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    chat_templates: dict[str, str]


def read_tokenizer_folder(folder: Path) -> TokenizerFiles:
    """Reads the folder; FileFormatError if a file is missing, malformed, or of a kind that cannot be read."""
    config = _read_json(folder / "tokenizer_config.json")
    named = _named_tokens(_read_json(folder / "special_tokens_map.json") | config)
    model_config = _read_json(folder / "config.json") | _read_json(folder / "generation_config.json")
    backend, usual = _read_backend(folder, config)
    named = usual | named
    _add_listed_tokens(backend, folder, config)

    special_tokens = {name: text for name, text in named.items() if text is not None}
    for name in [name for name in ("bos_token", "eos_token") if name not in named]:
        # GPT-2 and its like name these only by number, in the model's config. A null in the tokenizer's config stands.
        ids = _id_list(model_config.get(f"{name}_id"))
        text = backend.id_to_token(ids[0]) if ids else None
        if text is not None:
            special_tokens[name] = text
    # Old vocabularies hold their special tokens as ordinary entries.
    tokenizer_json.mark_special(backend, special_tokens.values())
    if not (folder / "tokenizer.json").is_file() and (config.get("add_bos_token") or config.get("add_eos_token")):
        before = _token(backend, special_tokens.get("bos_token")) if config.get("add_bos_token") else None
        after = _token(backend, special_tokens.get("eos_token")) if config.get("add_eos_token") else None
        backend.post_processor = tokenizer_json.surround(before, after)
    return TokenizerFiles(
        backend, special_tokens, _id_list(model_config.get("eos_token_id")), _read_chat_templates(folder, config)
    )


def _read_backend(folder: Path, config: Mapping[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, str | None]]:
    """The tokenizer, and the special tokens that its kind has unless a config says otherwise."""
    source = folder / "tokenizer.json"
    if source.is_file():
        return tokenizer_json.parse(_read_text(source), where=str(source)), {}
    kind = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file() and kind in _BYTE_LEVEL_CLASSES:
        return _byte_level_from_vocab(folder, _BYTE_LEVEL_CLASSES[kind]), {}
    if (folder / "vocab.txt").is_file() and kind in _WORDPIECE_CLASSES:
        return _wordpiece_from_vocab(folder / "vocab.txt", config), dict(_BERT_TOKENS)
    what = "this folder has no tokenizer.json"
    if (folder / "tokenizer.model").is_file():
        what = "only a SentencePiece tokenizer.model is here, which has to be converted first"
    elif kind:
        what += f", and {kind} cannot be rebuilt from the vocabulary files that are here"
    raise FileFormatError(
        what,
        where=str(folder),
        remedy="get the repository's tokenizer.json, or have transformers write it: "
        "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
    )


def _byte_level_from_vocab(folder: Path, pre: str) -> tokenizers.Tokenizer:
    lines = _read_text(folder / "merges.txt").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    description = tokenizer_json.byte_level_bpe(_read_json(folder / "vocab.json"), merges, PRE_TOKENIZERS[pre])
    return tokenizer_json.build(description, where=f"{folder} (vocab.json, merges.txt)")


def _wordpiece_from_vocab(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    vocab = {line: i for i, line in enumerate(_read_text(path).rstrip("\n").split("\n"))}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in vocab]
    if missing:
        raise FileFormatError(f"the vocabulary has no {', '.join(missing)}", where=str(path))
    description = tokenizer_json.wordpiece(
        vocab,
        lowercase=bool(config.get("do_lower_case", True)),
        strip_accents=config.get("strip_accents"),
        chinese_characters=bool(config.get("tokenize_chinese_chars", True)),
    )
    return tokenizer_json.build(description, where=str(path))


def _add_listed_tokens(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> None:
    """Adds the tokens that only tokenizer_config.json or added_tokens.json list, at the ids that they state."""
    known = backend.get_added_tokens_decoder()
    for token_id, token in sorted(_listed_tokens(folder, config).items()):
        if token_id not in known:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise FileFormatError(
                    f"added token {token.content!r} is listed with id {token_id}, which is not free for it",
                    where=str(folder),
                    remedy="get the repository's tokenizer.json and configs from one revision",
                )


def _listed_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, tokenizers.AddedToken]:
    listed: dict[int, tokenizers.AddedToken] = {}
    try:
        for text, token_id in _read_json(folder / "added_tokens.json").items():
            listed[int(token_id)] = tokenizers.AddedToken(text, normalized=False)
        for token_id, entry in config.get("added_tokens_decoder", {}).items():
            flags = {k: bool(entry.get(k)) for k in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            listed[int(token_id)] = tokenizers.AddedToken(entry["content"], **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"the list of added tokens is malformed ({type(error).__name__}: {error})",
            where=str(folder),
            remedy="fetch tokenizer_config.json and added_tokens.json again",
        ) from error
    return listed


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """name -> source. A chat_template.jinja file wins over the template in a config."""
    templates: dict[str, str] = {}
    for source in (_read_json(folder / "chat_template.json").get("chat_template"), config.get("chat_template")):
        if isinstance(source, str):
            templates["default"] = source
        elif isinstance(source, list):
            named = [t for t in source if isinstance(t, dict) and {"name", "template"} <= t.keys()]
            templates |= {str(t["name"]): str(t["template"]) for t in named}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (folder / "chat_template.jinja").is_file():
        templates["default"] = _read_text(folder / "chat_template.jinja")
    return templates


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str | None]:
    """The *_token entries: each is text, an object with `content`, or null."""
    named: dict[str, str | None] = {}
    for name in _NAMED_TOKENS:
        if name in config:
            value = config[name]
            text = value.get("content") if isinstance(value, dict) else value
            named[name] = text if isinstance(text, str) else None
    return named


def _id_list(value: Any) -> tuple[int, ...]:
    """Token ids of a config's entry, which is a number, a list of numbers or null."""
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**32)


def _token(backend: tokenizers.Tokenizer, text: str | None) -> tuple[str, int] | None:
    token_id = None if text is None else backend.token_to_id(text)
    return None if text is None or token_id is None else (text, token_id)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileFormatError(f"not valid JSON: {error}", where=str(path), remedy="fetch the file again") from error
    if not isinstance(value, dict):
        raise FileFormatError(f"a JSON object was expected, not {type(value).__name__}", where=str(path))
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FileFormatError("not UTF-8 text", where=str(path), remedy="fetch the file again") from error
