"""Where sentences end, and the terms by which a text is searched, in any script that people mix in one document."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import Final

from craton.data.words import words

Span = tuple[int, int]

# --- sentences -----------------------------------------------------------------------------------------------------

# A stop, what closes behind it (quotes, brackets, emphasis, bidi marks, a reference like [3]), in one match. The first
# group needs a blank behind it, for it also stands in numbers and names; the stops of the second are nothing else.
_CLOSERS: Final = r"""(?:[\"'”’»›)\]}」』）】》*_`\u200e\u200f\u202a-\u202e\u2066-\u2069]|\[\d{1,3}\])*"""
_STOP: Final = re.compile(rf"(?:([.!?…]+)|([؟۔؛。！？｡।॥։።။។]+[.!?؟！？]*)){_CLOSERS}")
_BEFORE: Final = re.compile(r"[^\s(\[{\"'“‘«]*\Z")
_LIST_NUMBER: Final = re.compile(r"[ \t]*(?:\d{1,3}|[a-zA-Z]|[ivxIVX]{1,5}|#)\Z")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Words whose dot ends no sentence, and those whose dot ends none before a number; words that end one before a capital,
# and names that do so only before a word that begins sentences.
_TITLES: Final = _set(
    "dr mr mrs ms mx prof st gen sen rep gov lt col capt cpt cmdr sgt maj rev hon pres messrs mme mlle e.g eg i.e ie "
    "vs cf viz ca approx resp incl excl dept univ est fig figs eq eqs sect chap vol vols eds para z.b bzw d.h govt temp"
)
_NUMBERED: Final = _set(
    "no nos nr p pp s art arts bd ch sec ed abb tab vol jan feb mar apr jun jul aug sep sept oct nov dec ver v"
)
_ENDING: Final = _set("etc a.m p.m")
_NAMES: Final = _set("jr sr inc ltd co corp bros al ph.d b.c a.d")
_SHORT: Final = 3  # letters of a word that, before a small letter, is taken for an abbreviation
# After names and initials ("J. Smith", "U.S. Army") a capital says nothing; these words begin sentences (Kiss and
# Strunk 2006, who learn them).
_STARTERS: Final = _set(
    "the a an it he she they we you i this that these those there here his her its their our my but and or so if in on "
    "at as for from with when while where what who why how however although after before since because then thus now "
    "no not to by all both each some many most one two"
)

# Where a line ends a sentence: it is a heading, a table's row or code; or the next line begins something of its own.
_ENDS_ITSELF: Final = re.compile(
    r"[ \t]{0,3}#{1,6}[ \t]|[ \t]*\||[ \t]*(?:```|~~~)|.*(?:[{}|]|[=(].*;)[ \t]*\Z"
    r"|(?: {4}|\t).*(?:[{}=<>;\[\]]|\w\(|:\Z)"
)
_BEGINS: Final = re.compile(
    r"[ \t]*(?:[-+*•◦▪‣·][ \t]|\(?(?:\d{1,3}|[a-zA-Z]|[۰-۹٠-٩]{1,3})[.)][ \t]|#{1,6}[ \t]|\||```|~~~|\$[ \t])"
    r"|(?: {4}|\t).*(?:[{}=<>;\[\]]|\w\(|:\Z)|[=\-~^*_]{3,}[ \t]*\Z"
)
_FIELD: Final = re.compile(r"[^\W\d][\w .\-]{0,30}:[ \t]")  # "key: value", as records are written
_WRAPPED: Final = 200  # characters: longer lines are not wrapped, so each ends where its writer wanted
_BLANKS: Final = re.compile(r"\s*")
_BLANK_LINES: Final = re.compile(r"\n[^\S\n]*+(?=\n)")
_NEXT: Final = re.compile(r"[\s\"'“‘«(\[{*_`\u200e\u200f\u202a-\u202e\u2066-\u2069]*(\S{0,20})")
_ACRONYM: Final = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")  # U.S, Ph.D, ق.م


def sentences(text: str, start: int = 0, end: int | None = None) -> list[Span]:
    """The sentences of text[start:end] as spans without blanks around them; every other character is in one of them.

    Blank lines, list items, headings and lines of code and tables end a sentence too.
    """
    end = len(text) if end is None else end
    found: list[Span] = []
    for first, last in _blocks(text, start, end):
        begin = first
        for stop in _stops(text, first, last):
            found += _stripped(text, begin, stop)
            begin = stop
        found += _stripped(text, begin, last)
    return found


def _stripped(text: str, start: int, end: int) -> list[Span]:
    """The span without blanks around it; none if it is nothing else."""
    match = _BLANKS.match(text, start, end)
    start = match.end() if match else start
    while end > start and text[end - 1].isspace():
        end -= 1
    return [(start, end)] if start < end else []


def _blocks(text: str, start: int, end: int) -> Iterator[Span]:
    """Runs of lines that go on from one to the next: a paragraph, an item, a line of code."""
    for first, last in _paragraphs(text, start, end):
        lines = []
        position = first
        while position < last:
            line_end = text.find("\n", position, last)
            line_end = last if line_end < 0 else line_end
            lines.append((position, line_end))
            position = line_end + 1
        widest = max(line_end - position for position, line_end in lines)
        begin = first
        for (position, line_end), (after, after_end) in itertools.pairwise(lines):
            before, line = text[position : min(line_end, position + 400)], text[after : min(after_end, after + 400)]
            if _is_break(before, line, widest):
                yield begin, after
                begin = after
        yield begin, last


def _paragraphs(text: str, start: int, end: int) -> Iterator[Span]:
    """What stands between blank lines."""
    for gap in _BLANK_LINES.finditer(text, start, end):
        if start < gap.start():
            yield start, gap.start()
        start = gap.end()
    if start < end:
        yield start, end


def _is_break(before: str, line: str, widest: int) -> bool:
    if not line.strip():
        return False
    if _ENDS_ITSELF.match(before) or _BEGINS.match(line) or before.startswith(">") != line.startswith(">"):
        return True
    if _FIELD.match(line) and (_FIELD.match(before) or line[0].isupper()):
        return True
    # Wrapped text fills its lines: one of less than half the width was ended by its writer. In scripts with capitals,
    # the next one must begin with one, for some writers break lines after clauses.
    is_short = widest > _WRAPPED or len(before) * 2 < widest
    return is_short and not line.lstrip()[0].islower()


def _stops(text: str, start: int, end: int) -> Iterator[int]:
    """Where sentences end within a block, behind the stop and what closes behind it."""
    for match in _STOP.finditer(text, start, end):
        stop = match.end()
        if match[2]:
            yield stop
            continue
        if stop >= end:
            return
        if not text[stop].isspace():
            # Behind CJK text a stop of ASCII needs no blank; elsewhere it is part of a name or number.
            if match[1][0] in "!?…" and text[stop] >= "\u2e80" and text[match.start() - 1] >= "\u2e80":
                yield stop
            continue
        following = _following(text, stop, end)
        if match[1] == ".":
            if _dot_ends(text, match, start, following):
                yield stop
        elif not following[:1].islower() or (match[1][0] in "!?" and stop == match.end(1)):
            yield stop


def _following(text: str, position: int, end: int) -> str:
    """The next word, without quotes, brackets and marks before it."""
    match = _NEXT.match(text, position, end)
    return match[1] if match else ""


def _dot_ends(text: str, match: re.Match[str], start: int, following: str) -> bool:
    """Whether a single dot before a blank ends its sentence. start: of the block."""
    if _LIST_NUMBER.match(text, start, match.start()):
        return False  # "1. First"
    before = _BEFORE.search(text, max(start, match.start() - 40), match.start())
    word = before[0] if before else ""
    bare = word.lower()
    goes_on = following[:1].islower()
    if match.end() > match.end(1):  # something closes behind it, as in "etc.)"
        return not goes_on
    if bare in _TITLES or (bare in _NUMBERED and following[:1].isnumeric()):
        return False
    if bare in _ENDING:
        return not goes_on
    is_initial = len(word) == 1 and word.isalpha()  # in Persian too: "ه. ش."
    if bare in _NAMES or is_initial or _ACRONYM.fullmatch(word):
        return not following or (following.partition("'")[0].lower().rstrip(",") in _STARTERS and not goes_on)
    return not goes_on or not (len(word) <= _SHORT and word.isalpha())


# --- search terms --------------------------------------------------------------------------------------------------

_ZWNJ: Final = "\u200c"
# Letters that Arabic and Persian keyboards write differently, and what is written or left out at will: one form each.
_ARABIC: Final = {
    **dict.fromkeys(map(ord, "يىې"), "ی"),
    ord("ك"): "ک",
    **dict.fromkeys(map(ord, "أإٱ"), "ا"),
    **dict.fromkeys(map(ord, "ۀة"), "ه"),
    ord("ؤ"): "و",
    **dict.fromkeys([0x0640, 0x0670, *range(0x0610, 0x061B), *range(0x064B, 0x0660)], None),  # tatweel, harakat
    **{ord(digit): str(value) for digits in ("۰۱۲۳۴۵۶۷۸۹", "٠١٢٣٤٥٦٧٨٩") for value, digit in enumerate(digits)},
    **dict.fromkeys([0x200D, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], None),  # bidi marks
}
# What PDFs hold in place of letters: shapes of Arabic, ligatures of Latin, full-width forms.
_SHAPES: Final = re.compile("[\ufb00-\ufb06\ufb50-\ufdff\ufe70-\ufefc\uff01-\uff9f]+")
_DOTTED: Final = re.compile(r"\b\w++(?:\.\w++)+")
_CAMEL: Final = re.compile(r"\b_*[A-Za-z][A-Za-z0-9]*(?:[a-z][A-Z]|[A-Z]{2}[a-z])\w*")
_CAMEL_PART: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def search_terms(text: str) -> list[str]:
    """The terms of a text for search by words, case-folded and in one form: the same for a passage and a question.

    Words; of names in code, the whole and the parts (parse_args, parseArgs, os.path); of Persian words with a
    half-space, the word written without it and its parts; of scripts without spaces, pairs of characters. Arabic
    letters are those of Persian, without vowel signs; digits are ASCII. Stems are left to the index.
    """
    text = _SHAPES.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    text = unicodedata.normalize("NFC", text).translate(_ARABIC)
    terms: list[str] = []
    for whole in _DOTTED.finditer(text):
        terms.append(whole[0].casefold())
    for name in _CAMEL.finditer(text):
        terms += map(str.lower, _CAMEL_PART.findall(name[0]))
    folded = unicodedata.normalize("NFC", text.casefold())
    position = 0
    run: list[str] = []  # characters of a script without spaces, side by side
    for word in words(folded):
        at = folded.find(word, position)
        if run and (at != position or not _is_unspaced(word)):
            terms += _pairs(run)
            run = []
        position = at + len(word) if at >= 0 else position
        if _is_unspaced(word):
            run.append(word)
        else:
            terms += _of_word(word)
    terms += _pairs(run)
    return terms


def _is_unspaced(word: str) -> bool:
    """Whether `words` gave a character of a script without spaces, where each counts as a word.

    A word of one letter in another script passes too, but has no neighbour to make a pair with.
    """
    return len(word) == 1 and word >= "\u0e01"


def _pairs(run: list[str]) -> list[str]:
    return run if len(run) < 2 else [first + second for first, second in itertools.pairwise(run)]


def _of_word(word: str) -> list[str]:
    terms = [word.replace(_ZWNJ, "")]
    for mark in (_ZWNJ, "_"):
        if mark in word:
            terms += [part for part in word.split(mark) if part]
    return [term for term in terms if term.strip("_")]
