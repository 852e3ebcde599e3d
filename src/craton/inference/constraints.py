"""Answers of a given form: at each step, only the tokens that the form allows can be chosen.

The grammars are llguidance's: JSON Schema, Rust's regular expressions, and its variant of Lark
(https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import tokenizers
import torch
from torch import Tensor

from craton.errors import UsageError
from craton.inference import grammar_check
from craton.inference.grammar_worker import compile_grammar
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer

# Compiled grammars that are kept for each tokenizer: many requests ask for the same form.
KEPT_GRAMMARS = 64

# JSON is written on one line, as Python's json.dumps does: where any white space is allowed, a small model may write
# nothing else. A schema's own "x-guidance" overrules it.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

# Stands around every grammar. Where only one text can follow, llguidance would allow it only in the tokens that the
# tokenizer makes of that text by itself; but these depend on what stands before it. So the model chooses among all.
OUTER_GRAMMAR = '%llguidance {"no_forcing": true}\nstart: @answer'


class Constraint:
    """The form of one answer and how much of it has been written."""

    def __init__(self, guide: _Guide, matcher: Any) -> None:
        self._guide, self._matcher = guide, matcher
        self._first = True
        self._allowed_V: np.ndarray[Any, Any] | None = None  # worked out once for each step

    def mask(self, logits_V: Tensor) -> Tensor:
        """The logits with -inf for all tokens that the form does not allow next.

        Raises UsageError if it allows none: a grammar that this tokenizer cannot follow, or one that is too complex.
        """
        # The head may have more rows than the tokenizer has tokens, or fewer.
        allowed_V = torch.zeros(len(logits_V), dtype=torch.bool)
        known = self._allowed()[: len(logits_V)]
        allowed_V[: len(known)] = torch.from_numpy(known)
        return logits_V.masked_fill(~allowed_V, float("-inf"))

    def accept(self, token: int) -> None:
        """Go on to behind `token`, which the mask allowed. Raises UsageError if the grammar proves too complex."""
        if not self._matcher.consume_token(token + self._guide.first_offset if self._first else token):
            raise _cannot_go_on(self._matcher.get_error())
        self._first, self._allowed_V = False, None

    @property
    def finished(self) -> bool:
        """Whether the answer is complete: nothing but its end may follow."""
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return True
        allowed_V = self._allowed()
        return int(allowed_V.sum()) == int(allowed_V[self._guide.eos_ids].sum())

    @property
    def forced(self) -> str:
        """The text that must come next, whatever is chosen: often the rest of a choice, or the keys of an object."""
        # It may end within a character.
        return bytes(self._matcher.compute_ff_bytes()).decode(errors="ignore")

    def _allowed(self) -> np.ndarray[Any, Any]:
        if self._allowed_V is None:
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
            guide = self._guide
            start = guide.first_offset if self._first else 0
            allowed_V = bits[start : start + guide.vocab].astype(bool)
            allowed_V[guide.eos_ids] = bits[guide.eos_ids]
            if self._matcher.is_error() or not allowed_V.any():
                raise _cannot_go_on(self._matcher.get_error())
            self._allowed_V = allowed_V
        return self._allowed_V


def make_constraint(settings: SamplingSettings, tokenizer: Tokenizer) -> Constraint | None:
    """The form that `settings` ask for; None where they ask for none.

    Raises UsageError for a schema, expression or grammar that is malformed, is not supported, takes too long to compile
    (see `grammar_check`), or that no token of this tokenizer can begin.
    """
    if settings.json_schema is None and settings.regex is None and not settings.choices and settings.grammar is None:
        return None
    library = _library()
    kind, grammar = _grammar_of(settings, library)
    guide = _GUIDES.get(tokenizer)
    if guide is None:
        guide = _GUIDES[tokenizer] = _Guide(tokenizer, library)
    constraint = Constraint(guide, guide.matcher(kind, grammar))
    constraint._allowed()  # what cannot even begin is refused before anything runs
    return constraint


class _Guide:
    """What llguidance must know of one tokenizer, and the grammars that were compiled for it.

    The tokenizers of SentencePiece drop the space at the beginning of a text, so a token says something else there than
    in the middle. Then each token stands twice in what llguidance sees: with `first_offset` added, it is the first.
    """

    def __init__(self, tokenizer: Tokenizer, library: ModuleType) -> None:
        self._library = library
        self.vocab = tokenizer.vocab_size
        self.eos_ids = np.array([i for i in tokenizer.eos_ids if i < self.vocab], dtype=np.int64)
        special = tokenizer.special_ids.union(self.eos_ids.tolist())
        inside = [tokenizer.token_bytes(i) for i in range(self.vocab)]
        first = [b"" if i in special else _first_bytes(tokenizer, i, inside[i]) for i in range(self.vocab)]
        same = all(a == b for i, (a, b) in enumerate(zip(inside, first, strict=True)) if i not in special)
        self.first_offset = 0 if same else self.vocab
        tokens = inside if same else inside + first
        # llguidance wants an end in any case: a tokenizer without one gets a token that no model has.
        ends = self.eos_ids.tolist() or [len(tokens)]
        vocabulary = _Vocabulary(tokenizer.backend, [*tokens, b"<end>"], ends[0], sorted(special | {len(tokens)}))
        self._tokenizer = library.LLTokenizer(library.TokenizerWrapper(vocabulary), eos_token=ends)
        self._matchers: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, kind: str, grammar: str) -> Any:
        """A matcher of `grammar` at its beginning. Raises UsageError with llguidance's words."""
        # Taken out and put back as the newest: a server compiles in one thread and generates in another.
        matcher = self._matchers.pop(grammar, None)
        if matcher is None:
            grammar_check.CHECK.check(kind, grammar)
            matcher = compile_grammar(self._library, self._tokenizer, grammar)
            if matcher.is_error():
                raise UsageError(f"the {kind} cannot be followed: {matcher.get_error().strip()}")
        self._matchers[grammar] = matcher
        if len(self._matchers) > KEPT_GRAMMARS:
            self._matchers.popitem(last=False)
        return matcher.deep_copy()


_GUIDES: WeakKeyDictionary[Tokenizer, _Guide] = WeakKeyDictionary()


class _Vocabulary:
    """A tokenizer as llguidance's `TokenizerWrapper` reads it. It holds no `Tokenizer`, so that both end together."""

    bos_token_id = None

    def __init__(self, backend: tokenizers.Tokenizer, tokens: list[bytes], eos_id: int, special: Sequence[int]) -> None:
        self._backend = backend
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, eos_id

    def __call__(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)


def _first_bytes(tokenizer: Tokenizer, token: int, inside: bytes) -> bytes:
    """The bytes that a token adds at the beginning of a text."""
    try:
        inside.decode()
    except UnicodeDecodeError:
        return inside  # a part of a character
    decoder = tokenizer.stream()
    return (decoder.push(token) + decoder.finish()).encode()


def _grammar_of(settings: SamplingSettings, library: ModuleType) -> tuple[str, str]:
    """What the grammar is called, and llguidance's form of it."""
    if settings.json_schema is not None:
        try:
            schema = library.LLMatcher.grammar_from_json_schema(settings.json_schema, defaults=JSON_STYLE)
            return "JSON schema", _inside(json.loads(schema)["grammars"][0])
        except (TypeError, ValueError) as error:
            raise UsageError(f"the JSON schema cannot be followed: {error}") from None
    if settings.regex is not None:
        return "regex", _inside(_lark_of_regex(settings.regex, library))
    if settings.choices:
        # One expression and not a rule for each: then a choice may be the beginning of another.
        return "list of choices", _inside(_lark_of_regex("|".join(map(_literal, settings.choices)), library))
    assert settings.grammar is not None
    return "grammar", _inside({"lark_grammar": settings.grammar})


def _inside(answer: dict[str, Any]) -> str:
    return json.dumps({"grammars": [{"lark_grammar": OUTER_GRAMMAR}, answer | {"name": "answer"}]})


def _lark_of_regex(regex: str, library: ModuleType) -> dict[str, Any]:
    return {"lark_grammar": f"start: /{library.regex_to_lark(regex)}/"}


def _literal(text: str) -> str:
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _cannot_go_on(why: str) -> UsageError:
    stuck = not why or why.startswith("NoExtension")
    reason = "no token of this model's tokenizer may come next" if stuck else why.strip()
    return UsageError(
        f"the answer cannot follow its form any further: {reason}", remedy="simplify the schema, regex or grammar"
    )


def _library() -> ModuleType:
    try:
        import llguidance
    except ImportError:
        raise UsageError(
            "answers of a given form need the package llguidance, which is not installed",
            remedy="pip install llguidance",
        ) from None
    return llguidance
