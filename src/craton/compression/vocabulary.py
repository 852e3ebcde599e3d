"""A smaller vocabulary for a BPE tokeniser: what some texts use, and all single bytes, so that every text still encodes
to tokens that decode to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from craton.errors import UsageError
from craton.modalities.text import Tokenizer, tokenizer_json
from craton.modalities.text.tokenizer_json import Json

_BATCH: Final = 64
# Byte-level BPE writes each of the 256 bytes as one printable character; SentencePiece's BPE as <0x00> to <0xFF>.
_BYTE_NAMES: Final = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class CutVocabulary:
    """tokenizer: the smaller one. kept: for each of its ids the old one, in order. used: tokens that the texts use."""

    tokenizer: Tokenizer
    kept: tuple[int, ...]
    used: int


def cut_vocabulary(tokenizer: Tokenizer, texts: Iterable[str]) -> CutVocabulary:
    """Keep the tokens that `texts` use, those they are merged from, special tokens, and all single bytes.

    What holds: the texts' tokens are the same pieces as before, since every merge on the way to them stays and ranks as
    it did; any other text still encodes without loss, in more and shorter pieces. Old ids keep their order.

    Raises UsageError for a tokeniser without single bytes to fall back on, or one that is not BPE.
    """
    description: Json = json.loads(tokenizer.backend.to_str())
    model = description["model"]
    vocab: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = {str(token["content"]) for token in description["added_tokens"]}
    kept = added | _single_bytes(description, vocab)
    used = _used(tokenizer, texts)
    kept |= {token for token, number in vocab.items() if number in used}
    _close(kept, model["merges"])
    if model.get("unk_token") is not None:
        kept.add(model["unk_token"])
    order = sorted((number, token) for token, number in vocab.items() if token in kept)
    numbers = {token: new for new, (_, token) in enumerate(order)}
    model["vocab"] = numbers
    model["merges"] = [pair for pair in map(_pair, model["merges"]) if {*pair, pair[0] + pair[1]} <= numbers.keys()]
    description["added_tokens"] = [
        {**token, "id": numbers[token["content"]]}
        for token in sorted(description["added_tokens"], key=lambda token: numbers[token["content"]])
    ]
    old_to_new = {old: new for new, (old, _) in enumerate(order)}
    _renumber(description.get("post_processor"), old_to_new)
    smaller = Tokenizer(
        tokenizer_json.build(description, where="the smaller tokeniser"),
        special_tokens=tokenizer.special_tokens,
        eos_ids=[old_to_new[number] for number in tokenizer.eos_ids if number in old_to_new],
        chat_templates=tokenizer.chat_templates,
    )
    return CutVocabulary(smaller, tuple(number for number, _ in order), len(used))


def _single_bytes(description: Json, vocab: dict[str, int]) -> set[str]:
    model, decoder = description["model"], description.get("decoder") or {}
    steps = [step["type"] for step in decoder.get("decoders", [decoder]) if step]
    if model["type"] == "BPE" and not model.get("end_of_word_suffix") and not model.get("continuing_subword_prefix"):
        if "ByteLevel" in steps:
            return {token for token in vocab if len(token) == 1}
        if model.get("byte_fallback") and all(name in vocab for name in _BYTE_NAMES):
            return set(_BYTE_NAMES) & vocab.keys() | ({tokenizer_json.WORD_START} & vocab.keys())
    raise UsageError(
        f"this tokeniser ({model['type']}) has no single bytes to fall back on: without a token, a text would be lost",
        where="--vocab",
        remedy="cut the vocabulary of a byte-level or byte-fallback BPE (Llama, Qwen, Mistral, SmolLM, GPT-2 ...)",
    )


def _used(tokenizer: Tokenizer, texts: Iterable[str]) -> set[int]:
    used: set[int] = set()
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            used.update(*tokenizer.encode_batch(batch))
            batch = []
    used.update(*tokenizer.encode_batch(batch))
    if not used:
        raise UsageError("the texts hold no token", where="--vocab", remedy="name files that hold text")
    return used


def _close(kept: set[str], merges: list[object]) -> None:
    """Add all that kept tokens are merged from. Parts are shorter than their whole, so longer tokens come first."""
    sources: dict[str, list[tuple[str, str]]] = {}
    for left, right in map(_pair, merges):
        sources.setdefault(left + right, []).append((left, right))
    open_ = [token for token in kept if token in sources]
    while open_:
        for part in {part for pair in sources[open_.pop()] for part in pair} - kept:
            kept.add(part)
            if part in sources:
                open_.append(part)


def _pair(merge: object) -> tuple[str, str]:
    left, right = map(str, merge.split(" ") if isinstance(merge, str) else merge)  # type: ignore[call-overload]
    return left, right


def _renumber(processor: Json | None, numbers: dict[int, int]) -> None:
    """Give a post-processor the new ids of the special tokens that it adds."""
    for step in (processor or {}).get("processors", [processor]):
        if step is None:
            continue
        for token in step.get("special_tokens", {}).values() if step["type"] == "TemplateProcessing" else ():
            token["ids"] = [numbers[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if name in step:
                step[name] = [step[name][0], numbers[step[name][1]]]
