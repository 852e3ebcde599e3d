"""Sentences and search terms in the scripts that documents mix."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.retrieval.segmentation import search_terms, sentences

MIXED = st.text(
    st.sampled_from(list("aB1.!? \n\t\"')(-#|;:_،؟۔۱م‌یےक्।。「」中文字ไท\u200f\u0301\ud83d😀🏽👩‍💻\x00\x0c=>*`")),
    max_size=200,
)


def split(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


@pytest.mark.parametrize(
    "parts",
    [
        ["It rains.", "Go home!", "Why?", "Because."],
        ["Dr. Smith met Mrs. Jones at St. Mary.", "They spoke."],
        ["He lives in the U.S. Army base.", "She is from the U.S.", "He is not."],
        ["J. K. Rowling wrote it.", "It sold, e.g. five times, i.e. often."],
        ["See No. 5 and p. 12 of vol. 3.", "It costs 3.14 a piece."],
        ["Edit setup.py for Python 3.11.", "Then visit https://a.b/c?d=e.f now.", "Done."],
        ["Wait... there is more.", "Well…", "No."],
        ['"Stop!" he said.', "(He went.)", "“Good.”", "It stands there.[3]", "**Bold.**", "Next."],
        ["We met at 5 p.m. and left.", "Apples, pears, etc.", "All were sold by Acme Inc. yesterday."],
        ["The function returns.", "os.path is next."],
        ["سلام دنیا.", "حال شما چطور است؟", "خوبم؛", "می‌روم به خانه.", "سال ۱۳۵۷ ه. ش. بود!"],
        ["یہ ایک جملہ ہے۔", "دوسرا جملہ۔"],
        ["مرحبا.", "كيف حالك؟", "الثمن ٣٫١٤ دينار."],
        ["यह एक वाक्य है।", "दूसरा वाक्य।"],
        ["Hello دنیا.", "این Python 3.11 است.", "Done."],
    ],
)
def test_sentences_end_where_a_reader_ends_them(parts: list[str]) -> None:
    assert split(" ".join(parts)) == parts


def test_chinese_and_japanese_need_no_blanks() -> None:
    assert split("你好。你是谁？我很好！「対。」彼は言った。") == [
        "你好。",
        "你是谁？",
        "我很好！",
        "「対。」",
        "彼は言った。",
    ]


def test_lines_that_end_a_sentence() -> None:
    text = (
        "# Title\nA paragraph that wraps\nover two lines.\n\nNo stop here\n\n"
        "1. First item\n2. Second, which\n   goes on\n"
        "- a bullet\n\nname: Ada\nborn: 1815\n\n    x = f(1)\n    y = g(2)\n\n| a | b |\n| 1 | 2 |"
    )
    assert split(text) == [
        "# Title",
        "A paragraph that wraps\nover two lines.",
        "No stop here",
        "1. First item",
        "2. Second, which\n   goes on",
        "- a bullet",
        "name: Ada",
        "born: 1815",
        "x = f(1)",
        "y = g(2)",
        "| a | b |",
        "| 1 | 2 |",
    ]


def test_a_short_line_of_wrapped_text_ends_and_a_full_one_does_not() -> None:
    assert split("Setup\nInstall it with the tool\nthat you like.") == [
        "Setup",
        "Install it with the tool\nthat you like.",
    ]
    text = "All of this line is long enough to be wrapped text here\nand it ends.\nShort one\nThen another line begins"
    assert split(text)[-1] == "Then another line begins"


def test_a_window_of_the_text() -> None:
    text = "One. Two. Three."
    assert [text[a:b] for a, b in sentences(text, 5, 9)] == ["Two."]


@settings(deadline=None)
@given(MIXED)
def test_every_character_is_in_one_sentence_and_none_begins_or_ends_blank(text: str) -> None:
    spans = sentences(text)
    assert all(start < end and text[start:end] == text[start:end].strip() for start, end in spans)
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    covered = {i for start, end in spans for i in range(start, end)}
    assert all(i in covered or c.isspace() for i, c in enumerate(text))


@pytest.mark.parametrize("unit", ["a", "a.", ". ", "aB", "中", "\n", " ", "x\n", "*", '."', "[", "_", "A.", "م‌", "1)"])
def test_odd_text_takes_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    begun = time.process_time()
    sentences(text)
    search_terms(text)
    assert time.process_time() - begun < 2


# --- search terms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("The Cat sat", {"the", "cat", "sat"}),
        ("parse_args", {"parse_args", "parse", "args"}),
        ("parseHTTPArgs", {"parsehttpargs", "parse", "http", "args"}),
        ("os.path.join", {"os.path.join", "os", "path", "join"}),
        ("setup.py 3.11", {"setup.py", "setup", "py", "3.11", "3", "11"}),
        ("__init__", {"__init__", "init"}),
        ("می‌روم", {"میروم", "می", "روم"}),
        ("自然語言", {"自然", "然語", "語言"}),
        ("猫 dog", {"猫", "dog"}),
        ("中a文字", {"中", "a", "文字"}),
    ],
)
def test_terms(text: str, terms: set[str]) -> None:
    assert set(search_terms(text)) == terms


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("كتاب علي", "کتاب علی"),
        ("على", "علی"),
        ("مُحَمَّد", "محمد"),
        ("ســلام", "سلام"),
        ("۱۳۵۷", "1357"),
        ("١٣٥٧", "1357"),
        ("ﻛﺘﺎﺏ", "کتاب"),
        ("ﬁne Ｆｕｌｌ", "fine full"),
        ("\u200fسلام\u200e", "سلام"),
        ("Cafe\u0301 STRASSE", "café straße"),
    ],
)
def test_forms_of_one_word_are_one_term(one: str, other: str) -> None:
    assert search_terms(one) == search_terms(other)


@settings(deadline=None)
@given(st.one_of(MIXED, st.text(max_size=100)))
def test_terms_are_words_and_never_blank(text: str) -> None:
    assert all(term and not any(c.isspace() for c in term) for term in search_terms(text))
