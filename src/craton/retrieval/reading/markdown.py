"""Markdown: the text as it stands, and where its headings begin (CommonMark 0.31: ATX and setext, not in code)."""

from __future__ import annotations

import re
from typing import Final

from craton.retrieval.documents import Heading
from craton.retrieval.reading.content import Content, one_line

_ATX: Final = re.compile(r" {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE: Final = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE: Final = re.compile(r" {0,3}(?:>[ ]?)*[ ]{0,3}(`{3,}(?=[^`]*$)|~{3,})")
_NO_PARAGRAPH: Final = re.compile(r"(?: {4}|\t| {0,3}(?:[>|]|[-+*][ \t]|\d{1,9}[.)][ \t]|(?:[-_*][ \t]*){3,}$))")
_LINK: Final = re.compile(r"!?\[([^\]\n]*)\](?:\([^)\n]*\)|\[[^\]\n]*\])")
_MAX_TITLE: Final = 1000  # characters: these patterns take quadratic time
_EMPHASIS: Final = re.compile(r"(\*\*|__|\*|`+)(?=\S)(.+?)(?<=\S)\1")


def markdown(text: str) -> Content:
    """The content of a Markdown file; its title is the first heading of the highest level, or the front matter's."""
    lines = text.split("\n")
    first, title = _front_matter(lines)
    headings: list[Heading] = []
    fence = ""
    paragraph: int | None = None  # the line where the running paragraph begins
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    for number in range(first, len(lines)):
        line = lines[number]
        if fence:
            mark = line.strip(" \t>")
            if mark.startswith(fence) and not mark.strip(fence[0]):
                fence = ""
        elif opened := _FENCE.match(line):
            fence, paragraph = opened[1], None
        elif atx := _ATX.match(line):
            headings.append(Heading(len(atx[1]), _plain(atx[2] or ""), starts[number]))
            paragraph = None
        elif paragraph is not None and (under := _UNDERLINE.match(line)):
            words = _plain(" ".join(lines[paragraph:number]))
            headings.append(Heading(1 if under[1][0] == "=" else 2, words, starts[paragraph]))
            paragraph = None
        elif not line.strip():
            paragraph = None
        elif paragraph is None and (number == first or not _continues(lines[number - 1])):
            paragraph = None if _NO_PARAGRAPH.match(line) else number
    headings = [heading for heading in headings if heading.title]
    if not title and headings:
        title = min(headings, key=lambda heading: heading.level).title
    return Content(text, title, headings=tuple(headings))


def _continues(before: str) -> bool:
    """Whether a line goes on with what the line before began: a list's item, a quote, a table."""
    return bool(before.strip()) and bool(_NO_PARAGRAPH.match(before)) and not _UNDERLINE.match(before)


def _front_matter(lines: list[str]) -> tuple[int, str]:
    """The line behind the front matter (YAML between ---), and the title that it gives."""
    if lines[0].rstrip() != "---":
        return 0, ""
    end = next((i for i, line in enumerate(lines[1:200], 1) if line.rstrip() in ("---", "...")), 0)
    titles = (line.partition(":")[2].strip().strip("\"'") for line in lines[1:end] if line.startswith("title:"))
    return (end + 1, next(titles, "")) if end else (0, "")


def _plain(title: str) -> str:
    """A heading's words without links and emphasis."""
    return one_line(_EMPHASIS.sub(r"\2", _LINK.sub(r"\1", title[:_MAX_TITLE])))
