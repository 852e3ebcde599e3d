"""Tokens on a terminal: what is trained stands out, borders and white space are visible, and text cannot act on it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from rich.text import Text

if TYPE_CHECKING:
    from craton.data.inspection import Token

LEGEND: Final = "¦ between tokens · space ⏎ line end → tab ▫ part of a character"
TRAINED: Final = ("⟦", "⟧")  # around what is trained, where there is no colour; Persian text has «» of its own
HEAD, TAIL = 160, 80  # tokens shown of a long sequence

_SHOWN: Final = {" ": "·", "\n": "⏎\n", "\t": "→"}
_JOINERS: Final = "\u200c\u200d"  # which Persian and emoji cannot be spelt without
_HARMLESS: Final = " \n" + _JOINERS
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def visible(text: str) -> str:
    """The text with its white space shown, and otherwise `harmless`."""
    return "".join(_SHOWN.get(character) or harmless(character) for character in text)


def harmless(text: str) -> str:
    """The text with what would act on a terminal written out: control characters, those of direction among them."""
    return "".join(_escape(c) if _acts(c) else c for c in text)


def isolated(text: str) -> str:
    """The text kept to its own place if it runs from right to left, so that what stands around it stays in order."""
    if any(unicodedata.bidirectional(c) in ("R", "AL", "AN") for c in text):
        return f"{_ISOLATE}{text}{_END_ISOLATE}"
    return text


def paint(tokens: Sequence[Token], colour: bool) -> Text:
    """The tokens: trained ones bold and green, the rest dim; without colour, trained ones within ⟦ and ⟧."""
    painted = Text()
    if len(tokens) <= HEAD + TAIL:
        _paint(tokens, colour, painted)
        return painted
    hidden = tokens[HEAD:-TAIL]
    _paint(tokens[:HEAD], colour, painted)
    painted.append(f" … {len(hidden)} tokens, {sum(token.trained for token in hidden)} of them trained … ", "italic")
    _paint(tokens[-TAIL:], colour, painted)
    return painted


def _paint(tokens: Sequence[Token], colour: bool, painted: Text) -> None:
    for run in _runs(tokens):
        trained = run[0].trained
        if trained and not colour:
            painted.append(TRAINED[0])
        for i, token in enumerate(run):
            if i or (colour and painted):
                painted.append("¦", "dim")
            style = ("bold green" if trained else "dim") + (" underline" if token.special else "")
            painted.append(isolated(_shown(token.text)), style)
        if trained and not colour:
            painted.append(TRAINED[1])


def _shown(text: str) -> str:
    if text and not text.strip(_JOINERS):
        return "".join(map(_escape, text))
    return visible(text) or "▫"


def _runs(tokens: Sequence[Token]) -> Iterator[list[Token]]:
    run: list[Token] = []
    for token in tokens:
        if run and run[-1].trained != token.trained:
            yield run
            run = []
        run.append(token)
    if run:
        yield run


def _acts(character: str) -> bool:
    return character not in _HARMLESS and unicodedata.category(character)[0] in "CZ"


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()
