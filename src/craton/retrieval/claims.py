"""What a sentence says, without understanding it: its words, its numbers, its names, and what it denies.

A denial belongs to what stands behind it in its clause ("not open on Sunday"), or before it where nothing does ("öffnet
sonntags nicht", and Persian verbs). Known are the negations of English, German, French and Persian; in other languages
nothing is taken for one.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

from craton.retrieval.segmentation import search_terms

# Words that carry no claim of their own; what is left of a sentence without them is what it says.
_WORDS: Final = """
    a an the and or but if then of in on at to from by for with without as is are was were be been being am do does did
    has have had it its this that these those there here he she they we you i his her their our your my me him them us
    not no so such than too very can cannot could may might must shall should will would which who whom whose what when
    where why how also into over under about between after before during through each all any some more most other only
    own same both few just because while again further once according based passage text document answer
    از به در با و که این آن است بود برای را تا هم یا اما اگر هر یک می ها های شد شده کرد کند باشد
"""
EMPTY_WORDS: Final = frozenset(_WORDS.split())
# Of these, what changes a denial: "not all" is not "not".
_DEGREES: Final = frozenset(
    ("all", "both", "each", "every", "few", "more", "most", "once", "same", "so", "such", "too", "very")
)

_CONTRACTED: Final = re.compile(r"\b\w+n['’]t\b", re.IGNORECASE)
_NEGATION: Final = re.compile(
    # What only looks like one: "not only ... but", "No. 5".
    r"\b(?:not|nicht|non|pas)\s+(?:only|just|merely|nur|bloß|seulement)\b|\bno\.?\s*(?=\d)"
    # Each of these denies.
    r"|(?P<once>\b(?:not|no(?:\s+one)?|never|none|nobody|nothing|nowhere|neither|nor|without|cannot|\w+n['’]t"
    r"|nicht|nichts|kein(?:e[mnrs]?)?|nie|niemals|niemand(?:em|en)?|nirgend(?:s|wo)|nein|weder|ohne)\b)"
    # Of these several deny once: "ne ... pas", "هیچ ... نیست".
    r"|(?P<together>\b(?:(?-i:[Nn]e)|pas|jamais|aucune?|rien|sans|ni|non(?!-))\b|\bn['’](?=[^\W\d])"
    r"|\b(?:ن[یي]ست\w*|نبود\w*|نباش\w*|نشد\w*|نشو\w*|نم[یي](?:\u200c?\w+)?|ندار\w*|نداشت\w*|نکرد\w*|نکن\w*|نخواه\w*|هیچ"
    r"|هرگز|بدون|نه)\b)",
    re.IGNORECASE,
)
_APART: Final = re.compile(
    r"(?:[,;:!?،؛؟…]|(?<!\bno)\.)(?=\s|\Z)|[()\[\]\n–—]"
    r"|\b(?:but|although|though|while|whereas|however|except|because|if|when|where|who|whose|which|that|aber|sondern"
    r"|obwohl|mais|اما|ولی|که)\b|(?=\bnor\b)"
    # "and" between words goes on with what is denied; before a verb, a pronoun or a denial it begins something new.
    r"|\band\b(?=\s+(?:it|he|she|they|we|you|i|there|this|that|is|are|was|were|has|have|had|can|may|must|will|not|no"
    r"|never|none|nobody|nothing|without)\b)|\b(?:und|et)\b(?=\s+(?:nicht|kein|nie|ohne|ne|n['’]|pas|non)\b)|\bو\b",
    re.IGNORECASE,
)
_WORD: Final = re.compile(r"(?<!\w)[^\W\d_]\w*")
_NUMBER: Final = re.compile(r"\d+(?:[.,٫]\d+)*")
_BEFORE: Final = -1  # a word before a denial in its clause is neither denied nor affirmed


@dataclass(frozen=True)
class _Polarity:
    """levels: word -> how often it is denied, at each of its places. denials: for each, the first word that it denies,
    and the words of its clause."""

    levels: dict[str, set[int]]
    denials: list[tuple[str, frozenset[str]]]


def content_terms(text: str) -> list[str]:
    """The terms of a text that say something, each once."""
    return [term for term in dict.fromkeys(search_terms(_CONTRACTED.sub(" ", text))) if term not in EMPTY_WORDS]


def numbers(text: str) -> set[str]:
    """The numbers of a text, in ASCII whatever the script of their digits: ۱۳۵۷ and 1357 are one."""
    found = _NUMBER.findall(text)
    return {"".join(str(int(c)) if c.isdecimal() else "." for c in number) for number in found}


def names(sentence: str) -> set[str]:
    """The terms of its names: of words with a capital that do not begin it. Scripts without capitals show none."""
    words = [match[0] for match in _WORD.finditer(sentence)][1:]
    return {term for word in words if word[0].isupper() for term in content_terms(word)}


def denies_alike(sentence: str, quote: str, question: str = "") -> bool:
    """Whether a quote denies what a sentence denies, and affirms what it affirms, as far as the quote speaks of it.

    question: what the sentence answers; an answer like "on Sunday" to "when is it not open?" is a denial.
    """
    said, quoted, asked = _polarity(sentence), _polarity(quote), _polarity(question)
    if not said.denials and asked.denials and not any(word in said.levels for word, _ in asked.denials):
        said = _polarity(f"{question.rstrip(' ?؟')} {sentence}")
    if not all(word in quoted.levels for word, _ in said.denials):
        return False
    # A clause of the quote that has no word of the sentence speaks of something else ("which is not cheap").
    if not all(word in said.levels or not clause & said.levels.keys() for word, clause in quoted.denials):
        return False
    return all(
        _BEFORE in said.levels[word] | quoted.levels[word] or said.levels[word] <= quoted.levels[word]
        for word in said.levels.keys() & quoted.levels.keys()
    )


def _polarity(text: str) -> _Polarity:
    levels: dict[str, set[int]] = defaultdict(set)
    denials = []
    alone = False  # a denial with nothing in its clause, as in "No, it is ...", goes on in the next
    for clause in _APART.split(text):
        marks = [match for match in _NEGATION.finditer(clause) if match.lastgroup]
        first = next((match for match in marks if match["together"]), None)
        marks = [match for match in marks if match["once"] or match is first]
        starts, ends = [0, *(match.end() for match in marks)], [*(match.start() for match in marks), len(clause)]
        parts = [_denied_terms(clause[start:end]) for start, end in zip(starts, ends, strict=True)]
        if not any(parts):
            alone = alone or bool(marks)
            continue
        if marks and not any(parts[1:]):
            parts = [[], parts[0][::-1]]
        elif alone and not marks:
            parts = [[], *parts]
        alone = False
        words = frozenset(word for part in parts for word in part)
        for level, part in enumerate(parts):
            for word in part:
                levels[word].add(_BEFORE if level == 0 and len(parts) > 1 else level)
            denied = next((later[0] for later in parts[level:] if later), None)
            if level and denied is not None:
                denials.append((denied, words))
    return _Polarity(dict(levels), denials)


def _denied_terms(text: str) -> list[str]:
    terms = search_terms(_NEGATION.sub(" ", text))
    return [term for term in terms if term not in EMPTY_WORDS or term in _DEGREES]
