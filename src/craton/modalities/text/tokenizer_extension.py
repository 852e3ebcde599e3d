"""New pieces for a byte-level BPE that a model already has: a new language without new ids for the old one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from craton.errors import UsageError
from craton.modalities.text import tokenizer_json
from craton.modalities.text.tokenizer import Tokenizer
from craton.modalities.text.tokenizer_json import Json
from craton.modalities.text.tokenizer_training import training_texts

_BATCH: Final = 64  # stretches of text that are tokenised at a time
_SPARE: Final = 1.1  # how many more merges are learnt, for those that make a token which is there already


@dataclass(frozen=True)
class Extension:
    """tokenizer: the old one and the new pieces. sources: for each new id the old ids that it stands for, in order."""

    tokenizer: Tokenizer
    sources: Mapping[int, tuple[int, ...]]


def extend_tokenizer(tokenizer: Tokenizer, texts: Iterable[str], add: int) -> Extension:
    """Learn up to `add` pieces on `texts` (each one document, read once) and append them to a byte-level BPE.

    BPE is trained on where the old tokeniser stopped: on its own tokens, within the words that it cuts (Purason 2025,
    arXiv 2512.03989). So each new merge ranks behind all old ones and can be reached, and what holds is:

    - Old ids never move; special tokens, chat template and the cut into words stay as they are.
    - A text's new ids are its old ids in which some runs of two or more gave way to a new piece with the same text. A
      text that holds no such run keeps its ids one and all; that is all other languages, but for what they share with
      the corpus. (Where `ignore_merges` is set, as in Llama 3, a word that is a piece is taken whole.)
    - New texts decode to themselves, as old ones do.

    A piece has been seen twice, so a small corpus may give fewer than asked for. Raises UsageError for another kind of
    tokeniser and for an empty corpus.
    """
    description: Json = json.loads(tokenizer.backend.to_str())
    model = description["model"]
    _check_kind(model, description["decoder"])
    symbols = _Symbols(tokenizer)
    merges = _learn_merges(symbols, tokenizer, training_texts(texts), round(add * _SPARE) + 1)

    # Added tokens become entries of the vocabulary, too: it is by its size that a file's reader numbers the others.
    vocab: dict[str, int] = tokenizer.backend.get_vocab(with_added_tokens=True)
    taken = dict(vocab)
    reached = set(symbols.all)
    ranked = {tuple(merge): None for merge in model["merges"]}
    sources: dict[int, tuple[int, ...]] = {}
    for left, right in merges:
        if len(sources) == add:
            break
        piece = symbols.text(left + right)
        # A merge into an old token would bring old merges back to work on what they had left as it was.
        if piece in taken or not {left, right} <= reached:
            continue
        reached.add(left + right)
        ranked.setdefault((symbols.text(left), symbols.text(right)))
        if piece not in vocab:
            vocab[piece] = tokenizer.vocab_size + len(sources)
            sources[vocab[piece]] = symbols.ids(left + right)
    model["vocab"], model["merges"] = vocab, [list(merge) for merge in ranked]
    extended = Tokenizer(
        tokenizer_json.build(description, where="the extended tokeniser"),
        special_tokens=tokenizer.special_tokens,
        eos_ids=tokenizer.eos_ids,
        chat_templates=tokenizer.chat_templates,
    )
    return Extension(extended, sources)


class _Symbols:
    """Old tokens as single characters, so that a trainer of BPE takes them for its alphabet."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._backend = tokenizer.backend
        codes = (code for code in range(0x100, 0x110000) if not 0xD800 <= code < 0xE000)
        self._of_id = [chr(code) for code, _ in zip(codes, range(tokenizer.vocab_size), strict=False)]
        self._id_of = {symbol: i for i, symbol in enumerate(self._of_id)}
        self.all: list[str] = self._of_id

    def words(self, encoding: tokenizers.Encoding) -> str:
        """A tokenised text: the symbols of its tokens, a space between words."""
        symbols: list[str] = []
        before: int | None = None
        for token, word in zip(encoding.ids, encoding.word_ids, strict=True):
            if word != before:
                symbols.append(" ")
                before = word
            symbols.append(self._of_id[token])
        return "".join(symbols)

    def ids(self, symbols: str) -> tuple[int, ...]:
        """The tokens behind symbols."""
        return tuple(self._id_of[symbol] for symbol in symbols)

    def text(self, symbols: str) -> str:
        """How the vocabulary spells these tokens in one."""
        return "".join(str(self._backend.id_to_token(token)) for token in self.ids(symbols))


def _learn_merges(symbols: _Symbols, tokenizer: Tokenizer, texts: Iterator[str], count: int) -> list[tuple[str, str]]:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    trainer = trainers.BpeTrainer(
        vocab_size=len(symbols.all) + count, min_frequency=2, initial_alphabet=symbols.all, show_progress=False
    )
    backend.train_from_iterator(_tokenised(symbols, tokenizer, texts), trainer)
    return [(left, right) for left, right in json.loads(backend.to_str())["model"]["merges"]]


def _tokenised(symbols: _Symbols, tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[str]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            yield from map(symbols.words, tokenizer.backend.encode_batch(batch, add_special_tokens=False))
            batch = []
    yield from map(symbols.words, tokenizer.backend.encode_batch(batch, add_special_tokens=False))


def _check_kind(model: Json, decoder: Json | None) -> None:
    extra = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
    if model["type"] != "BPE" or (decoder or {}).get("type") != "ByteLevel" or extra:
        raise UsageError(
            "only a byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM ...) can be extended, and this tokeniser is none",
            where=f"tokenizer: {model['type']} model, {(decoder or {}).get('type')} decoder",
            remedy="train a tokeniser for the language: craton tokenizer train",
        )
