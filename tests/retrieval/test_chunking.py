"""Passages: exact spans of the document, none lost, none too long, cut where the text pauses."""

from __future__ import annotations

import re
import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.config import parse
from craton.errors import UsageError
from craton.retrieval.chunking import ChunkSettings, chunk
from craton.retrieval.documents import Chunk, Document, Heading, Page
from craton.retrieval.reading.markdown import markdown
from craton.retrieval.reading.source_code import python_source


def count_words(text: str) -> int:
    return len(text.split())


def count_like_a_tokeniser(text: str) -> int:
    """Pieces of at most four characters, line ends, and two special tokens, as some tokenisers add them."""
    return 2 + len(re.findall(r"\n|[^\W]{1,4}|[^\w\s]", text))


def cut(text: str, size: int, overlap: int = 0, kind: str = "text", headings: tuple[Heading, ...] = ()) -> list[Chunk]:
    document = Document("d", "d", text, kind, headings=headings)
    return chunk(document, ChunkSettings(size=size, overlap=overlap), count_words)


def check(document: Document, chunks: list[Chunk], size: int, count) -> None:
    text = document.text
    covered = set()
    for one in chunks:
        assert one.text == text[one.start : one.end]
        assert one.text.strip()
        assert count(one.text) <= size or len(one.text) == 1
        covered.update(range(one.start, one.end))
    for before, after in pairwise(chunks):
        assert before.start < after.start
        assert before.end < after.end
    assert all(i in covered or c.isspace() for i, c in enumerate(text))


MIXED = (
    "a word. Another! سلام می‌روم دنیا. 你好。 中文字 हिन्दी। x=1; - # 1. \n \n\n \n\n\n \t 👩‍💻👍🏽 🇮🇷🇫🇷 e\u0301e\u0301 "
    "https://example.org/aVeryLongPathWithoutAnyBlank snake_case_name ........ \u00a0 \x0c"
)
WORDS = st.sampled_from(MIXED.split(" ")) | st.text(max_size=12)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(WORDS, max_size=60).map(" ".join),
    st.integers(3, 25),
    st.integers(0, 10),
    st.sampled_from(["text", "source"]),
    st.sampled_from([count_words, count_like_a_tokeniser, len]),
    st.data(),
)
def test_passages_are_spans_that_cover_the_document(text, size, overlap, kind, count, data) -> None:
    starts = data.draw(st.sets(st.integers(0, max(0, len(text) - 1)), max_size=4)) if text else set()
    headings = tuple(Heading(1 + i % 4, f"h{i}", start) for i, start in enumerate(sorted(starts)))
    document = Document("d", "d", text, kind, headings=headings)
    chunks = chunk(document, ChunkSettings(size=size, overlap=min(overlap, size - 1)), count)
    check(document, chunks, size, count)


def test_passages_fill_up_and_end_with_sentences() -> None:
    text = " ".join(f"Sentence number {i} has exactly seven words." for i in range(100))
    chunks = cut(text, 50)
    assert all(one.text.endswith("words.") for one in chunks)
    assert all(count_words(one.text) >= 42 for one in chunks[:-1])


def test_overlap_repeats_whole_sentences() -> None:
    text = " ".join(f"Sentence number {i} has exactly seven words." for i in range(30))
    chunks = cut(text, 50, overlap=16)
    for before, after in pairwise(chunks):
        shared = text[after.start : before.end]
        assert 0 < count_words(shared) <= 16
        assert shared.startswith("Sentence")
        assert shared.endswith("words.")


def test_a_passage_ends_with_its_paragraph_rather_than_full() -> None:
    paragraphs = [" ".join(f"Short one {i} {k}." for k in range(6)) for i in range(6)]  # 24 words each
    assert [one.text for one in cut("\n\n".join(paragraphs), 40)] == paragraphs


GUIDE = """# Guide

Intro of the guide.

## Setup

### Linux

Run apt.

### macOS

Run brew.

## Usage

Call it. Then call it again.
"""


def test_sections_are_kept_apart_and_named() -> None:
    content = markdown(GUIDE)
    chunks = cut(GUIDE, 200, overlap=20, kind="markdown", headings=content.headings)
    assert [(one.heading, one.text.partition("\n")[0]) for one in chunks] == [
        ("Guide", "# Guide"),
        ("Guide > Setup", "## Setup"),
        ("Guide > Usage", "## Usage"),
    ]
    assert "brew" in chunks[1].text  # a heading of level 3 does not cut what fits


def test_a_small_size_cuts_at_lower_headings_and_leaves_no_title_behind() -> None:
    content = markdown(GUIDE)
    chunks = cut(GUIDE, 7, kind="markdown", headings=content.headings)
    assert [one.heading for one in chunks] == [
        "Guide",
        "Guide > Setup > Linux",
        "Guide > Setup > macOS",
        "Guide > Usage",
        "Guide > Usage",
    ]
    assert not any(one.text.splitlines()[-1].startswith("#") for one in chunks)


def test_code_is_cut_at_lines_and_keeps_its_indents() -> None:
    text = "import os\n\n\ndef first(a):\n    return a\n\n\nclass Second:\n    def third(self):\n        return 3\n"
    content = python_source(text)
    chunks = cut(text, 200, kind="source", headings=content.headings)
    assert [one.heading for one in chunks] == ["", "first", "Second > third"]
    small = cut(text, 3, kind="source", headings=content.headings)
    assert small[-1].text == "        return 3"
    assert small[-1].heading == "Second > third"


def test_a_heading_without_words_still_parts_what_is_around_it() -> None:
    headings = (Heading(3, "a", 0), Heading(1, "b", 2), Heading(4, "c", 4))
    assert [one.text for one in cut("a\n \n \nb", 9, headings=headings)] == ["a", "b"]


def test_pages() -> None:
    text = "On page one.\n\nOn page two.\n\nOn page three."
    pages = (Page(1, 0, 12), Page(2, 14, 26), Page(3, 28, 42))
    chunks = chunk(Document("d", "d", text, "pdf", pages), ChunkSettings(size=3, overlap=0), count_words)
    assert [one.page for one in chunks] == [1, 2, 3]


@pytest.mark.parametrize("text", ["👩‍💻" * 40, "e\u0301" * 90, "🇮🇷" * 50, "👍🏽" * 50, "कि" * 90, "مي‌ن" * 60])
def test_characters_are_not_taken_apart(text: str) -> None:
    document = Document("d", "d", text, "text")
    chunks = chunk(document, ChunkSettings(size=10, overlap=0), len)
    check(document, chunks, 10, len)
    unit = 2 if text[1] != "\u200d" else 3
    if "ن" not in text:
        assert all(one.start % unit == 0 for one in chunks)
    assert not any(one.text[0] in "\u200c\u200d\u0301" or one.text[-1] in "\u200c\u200d" for one in chunks)


def test_a_character_larger_than_the_size_stands_alone() -> None:
    chunks = chunk(Document("d", "d", "ab", "text"), ChunkSettings(size=1, overlap=0), lambda text: 5 * len(text))
    assert [one.text for one in chunks] == ["a", "b"]


def test_nothing_comes_of_blanks() -> None:
    assert cut("", 10) == []
    assert cut(" \n\t\u00a0\n", 10) == []


@pytest.mark.parametrize(
    "text", ["Some words here. " * 12_000, "x" * 200_000, "word " * 40_000, "a\n" * 100_000, " " * 200_000 + "x"]
)
def test_counting_is_bounded(text: str) -> None:
    characters = 0

    def count(piece: str) -> int:
        nonlocal characters
        characters += len(piece)
        return -(-len(piece) // 4)

    begun = time.process_time()
    chunk(Document("d", "d", text, "text"), ChunkSettings(), count)
    assert characters < 8 * len(text)
    assert time.process_time() - begun < 5


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="overlap"):
        parse(ChunkSettings, {"size": 10, "overlap": 10}, where="--overlap")
    assert ChunkSettings() == ChunkSettings(size=200, overlap=32)
    assert all(field.description for field in ChunkSettings.model_fields.values())
