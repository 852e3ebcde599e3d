"""Documents to passages: cut where the text itself pauses, and filled up to a size in tokens.

A document is cut into sentences (of code: lines), each counted once; passages are runs of them. What a run counts is
estimated by adding up, then checked once, because a tokeniser is the most expensive thing here.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

from pydantic import Field, model_validator

from craton.config import Settings
from craton.retrieval.documents import Chunk, Document, Heading
from craton.retrieval.segmentation import sentences

Count = Callable[[str], int]

SECTION_LEVEL: Final = 2
"""A passage never holds text from both sides of a heading of this level or higher."""

_BY_LINES: Final = ("source", "record")
_CHARACTERS_PER_TOKEN: Final = 32  # no text has more, but blanks: what is longer is cut before it is counted
_FILLED: Final = 0.5  # of the size: from there on, a passage rather ends with its paragraph than with a sentence
_MAX_INDENT: Final = 80
_BLANK_LINE: Final = re.compile(r"\n[^\S\n]*\n")
_RULE: Final = re.compile(r"[\s=\-~^#*_`]*\Z")
_JOINERS: Final = "\u200c\u200d"

# How strongly the text pauses before a piece.
_RUNNING, _PARAGRAPH, _HEADING, _SECTION = range(4)


class ChunkSettings(Settings):
    """How documents are cut into passages."""

    size: int = Field(200, ge=1, description="the most tokens of a passage")
    overlap: int = Field(32, ge=0, description="how many tokens of a passage's last sentences the next one repeats")

    @model_validator(mode="after")
    def _check(self) -> ChunkSettings:
        if self.overlap >= self.size:
            raise ValueError(f"overlap ({self.overlap}) must be less than size ({self.size})")
        return self


@dataclass(slots=True)
class _Piece:
    """A sentence, a line, or a part of one that is too long. pause: before it. whole: not such a part."""

    start: int
    end: int
    tokens: int
    pause: int = _RUNNING
    whole: bool = True
    is_heading: bool = False


def chunk(document: Document, settings: ChunkSettings, count: Count) -> list[Chunk]:
    """The passages of a document, in order, none blank and none of more than `size` tokens by `count` (unless it is a
    single character); every character that is no blank is in one of them.

    Passages do not cross headings of level 1 and 2, and end where a paragraph does if they are half full by then.
    """
    text = document.text
    empty = max(0, count(""))
    headings = sorted((h for h in document.headings if 0 <= h.start < len(text)), key=lambda heading: heading.start)
    starts, levels, paths = [h.start for h in headings], [h.level for h in headings], _paths(headings)
    pieces = _pieces(document, headings, settings.size, count, empty)
    chunks = []
    first = 0
    for last in [*(i for i in range(1, len(pieces)) if pieces[i].pause == _SECTION), len(pieces)]:
        for begin, end in _runs(text, pieces[first:last], settings, count, empty):
            chosen = pieces[first + begin : first + end]
            start, stop = chosen[0].start, chosen[-1].end
            # Where titles lead a passage, it is about the last of them; where more follow, about what holds them all.
            body = next((piece for piece in chosen if not piece.is_heading), chosen[-1]).start
            inner = levels[bisect_right(starts, body) : bisect_right(starts, stop - 1)]
            path = [
                heading.title for heading in paths[bisect_right(starts, body)] if heading.level < min(inner, default=99)
            ]
            chunks.append(Chunk(start, stop, text[start:stop], " > ".join(path), document.page_of(start)))
        first = last
    return chunks


# --- pieces --------------------------------------------------------------------------------------------------------


def _pieces(document: Document, headings: list[Heading], size: int, count: Count, empty: int) -> list[_Piece]:
    """The document's sentences or lines, with their tokens and the pauses before them."""
    text, by_lines = document.text, document.kind in _BY_LINES
    starts = {heading.start: heading.level for heading in reversed(headings)}
    bounds = [0, *sorted(start for start in starts if start), len(text)]
    pieces: list[_Piece] = []
    pause = _RUNNING  # before the next piece
    bare = 0  # the level of a title that only another title follows: a lower one is not torn from it
    for begin, end in pairwise(bounds):
        body = begin
        if begin in starts:
            if not bare or starts[begin] <= bare:
                pause = max(pause, _SECTION if starts[begin] <= SECTION_LEVEL else _HEADING)
            line_end = text.find("\n", begin, end)
            body = end if line_end < 0 else line_end + 1
        spans = [(begin, body, begin in starts)] if body > begin else []
        spans.append((body, end, False))
        for first, last, is_heading in spans:
            for start, stop in _lines(text, first, last) if by_lines else sentences(text, first, last):
                if not by_lines:
                    start = _with_indent(text, start, pieces[-1].end if pieces else 0)
                if pieces and not pause and _BLANK_LINE.search(text, pieces[-1].end, start):
                    pause = _PARAGRAPH
                for part in _fitting(text, start, stop, size, count, empty):
                    part.pause, pause = pause, _RUNNING
                    part.is_heading = is_heading
                    pieces.append(part)
        bare = starts.get(begin, 0) if _RULE.match(text, body, end) else 0
    return pieces


def _lines(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """The lines that are not blank, with their indents."""
    found = []
    while start < end:
        line_end = text.find("\n", start, end)
        line_end = end if line_end < 0 else line_end
        stop = start + len(text[start:line_end].rstrip())
        if stop > start:
            found.append((start, stop))
        start = line_end + 1
    return found


def _with_indent(text: str, start: int, limit: int) -> int:
    """The beginning of the line, if only a short indent stands before `start`: code keeps its shape."""
    line = text.rfind("\n", max(limit, start - _MAX_INDENT), start) + 1
    if not line:
        line = 0 if start <= _MAX_INDENT and not limit else start
    return line if text[line:start].isspace() else start


def _fitting(text: str, start: int, end: int, size: int, count: Count, empty: int) -> list[_Piece]:
    """The span as one piece if it fits, else cut into parts of about equal length that do."""
    done: list[_Piece] = []
    todo = [(start, end)]
    while todo:
        start, end = todo.pop()
        if not text[start:end].strip():
            continue
        length = end - start
        if length > size * _CHARACTERS_PER_TOKEN:
            parts = -(-length // (size * 4))
        else:
            tokens = count(text[start:end])
            if tokens <= size or length == 1:
                done.append(_Piece(start, end, max(0, tokens - empty)))
                continue
            parts = min(length, max(2, -(-tokens // size)))
        todo += reversed(_parts(text, start, end, parts))
    for piece in done:
        piece.whole = len(done) == 1
    return done


def _parts(text: str, start: int, end: int, parts: int) -> list[tuple[int, int]]:
    """The span in up to so many parts, cut at line ends, else between words, else between characters."""
    reach = max(1, (end - start) // (2 * parts))
    cuts = [start]
    for i in range(1, parts):
        target = start + (end - start) * i // parts
        cut = _cut(text, max(cuts[-1] + 1, target - reach), target, min(end - 1, target + reach))
        if cuts[-1] < cut < end:
            cuts.append(cut)
    if len(cuts) == 1:
        cuts.append(start + (end - start) // 2)
    spans = []
    for first, last in zip(cuts, [*cuts[1:], end], strict=True):
        inner = text[first:last]
        spans.append((first + len(inner) - len(inner.lstrip()), first + len(inner.rstrip())))
    return [span for span in spans if span[0] < span[1]]


def _cut(text: str, low: int, target: int, high: int) -> int:
    """The best place to cut in [low, high]: before it a line end, or blanks, or at least a whole character."""
    if low > high:
        return target
    places = sorted(range(low, high + 1), key=lambda place: abs(place - target))
    for is_place in (_after_line, _between_words, _between_clusters):
        for place in places:
            if is_place(text, place):
                return place
    return min(max(target, low), high)


def _after_line(text: str, place: int) -> bool:
    return text[place - 1] == "\n"


def _between_words(text: str, place: int) -> bool:
    return (text[place - 1].isspace() and not text[place].isspace()) or text[place - 1] in "、，；：،,;"


def _between_clusters(text: str, place: int) -> bool:
    """Whether no character or word is taken apart: marks, joiners, emoji sequences, flags, pairs of surrogates."""
    before, after = text[place - 1], text[place]
    if before in _JOINERS or after in _JOINERS or unicodedata.category(after).startswith("M"):
        return False
    if "\U0001f3fb" <= after <= "\U0001f3ff" or "\U000e0020" <= after <= "\U000e007f":  # skin tones, tags
        return False
    if "\ud800" <= before <= "\udbff" and "\udc00" <= after <= "\udfff":
        return False
    if "\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff":
        first = place
        while first and "\U0001f1e6" <= text[first - 1] <= "\U0001f1ff" and place - first < 64:
            first -= 1
        return (place - first) % 2 == 0  # flags are pairs
    return not ("\u1100" <= before <= "\u11ff" and "\u1160" <= after <= "\u11ff")  # jamo of one syllable


# --- passages ------------------------------------------------------------------------------------------------------


def _runs(text: str, pieces: list[_Piece], settings: ChunkSettings, count: Count, empty: int) -> list[tuple[int, int]]:
    """Which pieces [begin, end) each passage of a section holds."""
    if not pieces:
        return []
    # What lies between two pieces counts too: a line end is a token of its own.
    gaps = [int("\n" in text[a.end : b.start]) for a, b in pairwise(pieces)]
    sums = [0, *accumulate(piece.tokens + gap for piece, gap in zip(pieces, [*gaps, 0], strict=True))]

    def filled(begin: int, tokens: float) -> int:
        """How far pieces from `begin` on reach with so many tokens, by the estimate."""
        return max(begin + 1, bisect_right(sums, sums[begin] + tokens) - 1)

    def measured(begin: int, end: int) -> int:
        return count(text[pieces[begin].start : pieces[end - 1].end])

    def fits(begin: int, end: int) -> int:
        """The estimate corrected: an end not beyond `end`'s neighbourhood whose passage fits by `count`."""
        budget = float(settings.size - empty)
        extended = False
        best = begin + 1
        while end > best:
            tokens = measured(begin, end)
            scale = budget / max(1, tokens - empty)
            if tokens <= settings.size:
                best = end
                further = min(len(pieces), filled(begin, (sums[end] - sums[begin]) * scale * 0.98))
                if extended or further <= end:
                    break
                extended, end = True, further
            else:
                end = max(best, min(end - 1, filled(begin, (sums[end] - sums[begin]) * scale * 0.98)))
        return best

    runs: list[tuple[int, int]] = []
    begin, done = 0, 0
    while done < len(pieces):
        end = fits(begin, min(len(pieces), filled(begin, settings.size - empty)))
        if end <= done:  # what is repeated leaves no room for anything new
            begin = begin + 1 if begin < done else done
            continue
        if end < len(pieces):
            paused = _pausing(pieces, sums, begin, done, end)
            if paused < end and measured(begin, paused) <= settings.size:
                end = paused
        runs.append((begin, end))
        done = begin = end
        while (
            begin > runs[-1][0] + 1
            and done < len(pieces)
            and pieces[begin - 1].whole
            and pieces[begin].pause < _HEADING
            and sums[done] - sums[begin - 1] <= settings.overlap
        ):
            begin -= 1
    return runs


def _pausing(pieces: list[_Piece], sums: list[int], begin: int, done: int, end: int) -> int:
    """The end of a passage, moved back to the strongest pause behind its half; a title never ends it.

    done: pieces before it are in earlier passages, so the end lies behind it.
    """
    enough = sums[begin] + _FILLED * (sums[end] - sums[begin])
    best = end
    for place in range(end - 1, done, -1):
        if sums[place] < enough:
            break
        if pieces[place].pause > pieces[best].pause and not pieces[place - 1].is_heading:
            best = place
    while best - 1 > done and pieces[best - 1].is_heading:
        best -= 1
    return end if pieces[best - 1].is_heading else best


def _paths(headings: list[Heading]) -> list[tuple[Heading, ...]]:
    """[n] the titles that stand above what follows the first n headings."""
    paths: list[tuple[Heading, ...]] = [()]
    for heading in headings:
        above = tuple(upper for upper in paths[-1] if upper.level < heading.level)
        paths.append((*above, heading))
    return paths
