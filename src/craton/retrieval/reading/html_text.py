"""HTML: the text that a reader sees, in blocks, with its headings; no scripts, no navigation, nothing hidden."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Final

from craton.retrieval.documents import Heading
from craton.retrieval.reading.content import Content, clean, decode, decode_as, one_line

_META_CHARSET: Final = re.compile(rb"""<(?:meta|\?xml)\b[^>]*?\b(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.I)
_SNIFFED: Final = 4096


def _tags(names: str) -> frozenset[str]:
    return frozenset(names.split())


_VOID: Final = _tags("area base br col embed hr img input link meta param source track wbr")
_UNSEEN: Final = _tags(
    "script style noscript template svg math iframe object canvas audio video select button textarea datalist nav head "
    "rt rp dialog"
)
_BLOCKS: Final = _tags(
    "address article aside blockquote body center details div dl fieldset figcaption figure footer form header hgroup "
    "html main p pre search section summary table caption thead tbody tfoot ul ol menu h1 h2 h3 h4 h5 h6"
)
_HEADINGS: Final = {f"h{level}": level for level in range(1, 7)}
_LISTS: Final = frozenset(("ul", "ol", "menu"))
_NOISE_ROLES: Final = frozenset(("navigation", "search", "contentinfo", "banner"))
_ANCHORS: Final = _tags("headerlink doc-anchor permalink")  # the pilcrow that tools put beside headings
_ROOMS: Final = _tags("article section main blockquote")  # a footer within one belongs to the text
# What a start tag closes where its end tag was left out, and the elements beyond which it never looks.
_CLOSES: dict[str, frozenset[str]] = {
    "li": frozenset(("li",)),
    "dt": frozenset(("dt", "dd")),
    "dd": frozenset(("dt", "dd")),
    "tr": frozenset(("tr", "td", "th")),
    "td": frozenset(("td", "th")),
    "th": frozenset(("td", "th")),
    "thead": frozenset(("caption", "tr", "td", "th")),
    "tbody": frozenset(("caption", "thead", "tr", "td", "th")),
    "tfoot": frozenset(("tbody", "tr", "td", "th")),
    "body": frozenset(("head",)),
} | {tag: frozenset(("p",)) for tag in _BLOCKS - {"thead", "tbody", "tfoot", "body", "caption"}}
_IN_HEAD: Final = _tags("base link meta noscript script style template title")
_CLOSES |= {tag: frozenset(("p", *_HEADINGS)) for tag in _HEADINGS}
_BARRIERS: Final = _tags("table ul ol menu dl div section article main body html blockquote")
_BLANKS: Final = re.compile("[ \t\n\f\r\xa0]+")
_HIDING: Final = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)

_NONE, _SPACE, _LINE, _BLANK_LINE = range(4)


def html(data: bytes, name: str) -> Content:
    """The content of an HTML file. Raises FileFormatError for bytes that are not in the encoding that it names."""
    return html_content(_decode(data, name))


def html_content(text: str) -> Content:
    """The content of HTML that is decoded."""
    page = _Page()
    page.feed(text)
    # What is left is a tag or comment without an end. Browsers drop it, and html.parser would search it again and
    # again: close() takes quadratic time over a million "<!--".
    if not page.rawdata.startswith("<") or len(page.rawdata) == 1:
        page.close()
    page.finish()
    title = one_line("".join(page.titles)) or next((heading.title for heading in page.headings), "")
    return Content("".join(page.parts), title, headings=tuple(page.headings))


def _decode(data: bytes, name: str) -> str:
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    named = _META_CHARSET.search(data[:_SNIFFED])
    if data.startswith(marks) or not named:
        return decode(data, name)
    encoding = named[1].decode("ascii", "replace").lower()
    try:
        encoding = codecs.lookup(encoding).name
    except LookupError:
        return decode(data, name)  # a name that nobody knows: UTF-8 or an error
    # As browsers do (WHATWG Encoding): pages that say Latin-1 mean Windows-1252, and a page whose ASCII could be read
    # to find the name cannot be UTF-16.
    encoding = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030"}.get(encoding, encoding)
    if encoding.startswith(("utf-8", "utf-16", "utf-32")):
        return decode(data, name)
    return clean(decode_as(data, encoding, name))


@dataclass
class _Element:
    tag: str
    unseen: bool
    heading: tuple[int, int] | None = None  # for h1 to h6: the parts written before it, the level


class _Page(HTMLParser):
    """Writes visible text to `parts`. Gaps (space, line, blank line) are held back until a word follows them."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.titles: list[str] = []
        self.headings: list[Heading] = []
        self._length = 0
        self._gap = _NONE
        self._fresh = False  # a list's item or a table's cell has just begun: its first block needs no line of its own
        self._stack: list[_Element] = []
        self._open: Counter[str] = Counter()
        self._unseen = 0
        self._in_title = False
        self._lists: list[int | None] = []  # the next number of each open list, None for bullets
        self._marker = ""
        self._cells = 0
        self._bars = 0
        self._newlines = ""  # of preformatted text, written if more follows
        self._heading_start: int | None = None

    # --- what html.parser calls ---

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_title = False  # without its end tag, it would take the page
        if tag == "title" and not self._open["svg"]:
            self._in_title = not self.titles
            return
        self._close_implied(tag)
        if tag in _VOID:
            if not self._unseen and tag in ("br", "hr"):
                self._break(_LINE if tag == "br" else _BLANK_LINE, forced=tag == "br")
            return
        unseen = self._is_unseen(tag, attrs)
        element = _Element(tag, unseen)
        self._stack.append(element)
        self._open[tag] += 1
        self._unseen += unseen
        if not self._unseen:
            self._begin(element, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID and (self._open["svg"] or self._open["math"]):  # elsewhere HTML knows no <div/>
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "title":
            self._in_title = False
        elif tag == "p" and not self._open["p"]:
            self._break(_BLANK_LINE)
        elif self._open[tag]:
            while self._pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self.titles.append(clean(data))
        elif not self._unseen:
            data = clean(data)  # references may name half surrogates
            if self._open["pre"]:
                self._preformatted(data)
            else:
                self._flowing(data)

    def parse_marked_section(self, i: int, report: int = 1) -> int:
        """Pass over <![...]>: html.parser raises AssertionError for names that it does not know."""
        return self.rawdata.find(">", i) + 1 or -1

    def finish(self) -> None:
        """Close what the page left open."""
        while self._stack:
            self._pop()

    # --- elements ---

    def _is_unseen(self, tag: str, attrs: list[tuple[str, str | None]]) -> bool:
        if tag in _UNSEEN:
            return True
        if tag in ("body", "html"):
            return False  # pages hide them until their scripts have run
        if tag == "footer" and not any(self._open[room] for room in _ROOMS):
            return True
        values = dict(attrs)
        return (
            "hidden" in values
            or (values.get("aria-hidden") or "").lower() == "true"
            or (values.get("role") or "").lower() in _NOISE_ROLES
            or bool(_HIDING.search(values.get("style") or ""))
            or (tag == "a" and not _ANCHORS.isdisjoint((values.get("class") or "").split()))
        )

    def _close_implied(self, tag: str) -> None:
        """Close what a start tag ends where HTML lets end tags be left out."""
        if self._stack and self._stack[-1].tag == "head" and tag not in _IN_HEAD:
            self._pop()  # even </head> and <body> may be left out
        while depth := self._closed_depth(_CLOSES.get(tag, frozenset())):
            for _ in range(depth):
                self._pop()

    def _closed_depth(self, closed: frozenset[str]) -> int:
        """How many elements to close to end the innermost of `closed`; 0 if there is none to end."""
        if any(self._open[name] for name in closed):
            for depth, element in enumerate(reversed(self._stack[-64:]), 1):
                if element.tag in closed:
                    return depth
                if element.tag in _BARRIERS:
                    break
        return 0

    def _begin(self, element: _Element, values: dict[str, str | None]) -> None:
        tag = element.tag
        if tag in _LISTS:
            self._break(_LINE if self._lists else _BLANK_LINE)
            start = values.get("start") or ""
            number = int(start) if start.isascii() and start.isdigit() and len(start) < 10 else 1
            self._lists.append(number if tag == "ol" else None)
        elif tag == "li":
            self._break(_LINE)
            self._marker = "- "
            if self._lists and (number_ := self._lists[-1]) is not None:
                self._marker, self._lists[-1] = f"{number_}. ", number_ + 1
            self._fresh = True
        elif tag == "tr":
            self._break(_LINE)
            self._cells = self._bars = 0
        elif tag in ("td", "th"):
            self._cells += 1
            if self._cells > 1:
                self._bars += 1
                self._gap = _NONE
            self._fresh = True
        elif tag in ("dt", "dd"):
            self._break(_LINE)
        elif tag in _BLOCKS:
            self._break(_BLANK_LINE)
        if tag in _HEADINGS and sum(self._open[name] for name in _HEADINGS) == 1:  # none within another
            element.heading = len(self.parts), _HEADINGS[tag]
            self._heading_start = None

    def _pop(self) -> str:
        element = self._stack.pop()
        tag = element.tag
        self._open[tag] -= 1
        if self._unseen:
            self._unseen -= element.unseen
            return tag
        if element.heading:
            first, level = element.heading
            title = one_line("".join(self.parts[first:]))
            if title and self._heading_start is not None:
                self.headings.append(Heading(level, title, self._heading_start))
        self._fresh = False
        if tag in _LISTS and self._lists:
            self._lists.pop()
            self._marker = ""
            self._break(_LINE if self._lists else _BLANK_LINE)
        elif tag in ("li", "tr", "dt", "dd"):
            self._bars, self._marker = 0, ""
            self._break(_LINE)
        elif tag in _BLOCKS:
            self._newlines = "" if tag == "pre" else self._newlines
            self._break(_BLANK_LINE)
        return tag

    # --- text ---

    def _break(self, gap: int, forced: bool = False) -> None:
        if self._unseen or (self._fresh and not forced):
            return
        if gap == _BLANK_LINE and (self._lists or self._open["td"] or self._open["th"]):
            gap = _LINE  # rows and items stay together
        self._gap = max(self._gap, gap)

    def _flowing(self, data: str) -> None:
        text = _BLANKS.sub(" ", data)
        if text.startswith(" "):
            self._gap = max(self._gap, _SPACE)
        if body := text.strip(" "):
            self._write(body)
            if text.endswith(" "):
                self._gap = _SPACE

    def _preformatted(self, data: str) -> None:
        body = data.rstrip("\n")
        if not body:
            self._newlines += data
            return
        if self._gap >= _LINE or not self.parts:  # at the beginning, the first line end is none
            self._newlines = ""
            body = body.lstrip("\n")
        text, self._newlines = self._newlines + body, data[len(data.rstrip("\n")) :]
        if text:
            self._write(text)

    def _write(self, text: str) -> None:
        lead = ""
        if self.parts:
            lead = ("", " ", "\n", "\n\n")[self._gap]
        new_line = not self.parts or self._gap >= _LINE
        start = self._length + (len(lead) if new_line else 0)
        if self._bars:
            lead = ("\n" if new_line and self.parts else "") + " | " * self._bars
        elif new_line and self._lists:
            lead += "  " * (len(self._lists) - bool(self._marker)) + self._marker
        if self._heading_start is None:
            self._heading_start = start
        self._gap, self._fresh, self._marker, self._bars = _NONE, False, "", 0
        for part in (lead, text):
            if part:
                self.parts.append(part)
                self._length += len(part)
