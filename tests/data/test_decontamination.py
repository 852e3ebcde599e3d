"""Evaluation data is found in documents: by thirteen words in a row, whatever stands around them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.data.decontamination import RUN_WORDS, SHORTEST_RUN, EvaluationOverlap, strings
from craton.data.records import Record
from craton.data.words import WordHasher, words

LONG = "How do I find my card that was sent to me by post two weeks ago, and not yet seen?"
PERSIAN = "من می‌خواهم کتابِ خوبی را که دیروز در کتاب‌فروشیِ نزدیکِ خانه دیده‌ام دوباره بخوانم و بفهمم"


def overlap(*texts: str) -> EvaluationOverlap:
    return EvaluationOverlap([Record({"text": t}, f"eval:{n}") for n, t in enumerate(texts, 1)], WordHasher())


def find(index: EvaluationOverlap, text: str) -> str | None:
    return index.find(WordHasher()(text))


@pytest.mark.parametrize("text", [LONG, PERSIAN])
def test_thirteen_words_in_a_row_are_found_whatever_their_case_and_punctuation(text: str) -> None:
    index = overlap("something else that is long enough to be looked for, but is not here at all", text)
    own = words(text)
    assert len(own) > RUN_WORDS
    shared = " … ".join(own[1 : 1 + RUN_WORDS]).upper()
    assert find(index, f"before {shared}. After") == "eval:2"
    assert find(index, f"before {' '.join(own[1:RUN_WORDS])} after") is None  # twelve
    cut = own[1 : 1 + RUN_WORDS]
    assert find(index, " ".join([*cut[:6], "other", *cut[6:]])) is None


def test_texts_of_eight_to_twelve_words_count_whole() -> None:
    text = "where is the card that i ordered last week"
    assert SHORTEST_RUN <= len(words(text)) < RUN_WORDS
    index = overlap(text)
    assert find(index, f"Hello! {text.upper()}?") == "eval:1"
    assert find(index, text.replace("card", "book")) is None
    assert find(index, text.rsplit(" ", 1)[0] + " year") is None


def test_shorter_ones_count_where_they_are_the_whole_document() -> None:
    index = overlap("Where is my card?", "…")
    assert find(index, "where is my card") == "eval:1"
    assert find(index, "where is my card now") is None
    assert find(index, "I asked them: where is my card? And they said nothing at all.") is None
    assert find(index, "") is None


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=40)


@given(st.lists(WORDS, min_size=1, max_size=5), WORDS)
def test_it_agrees_with_the_rule_written_down(evaluation: list[list[str]], document: list[str]) -> None:
    def holds(text: list[str]) -> bool:
        n = min(len(text), RUN_WORDS)
        if n < SHORTEST_RUN:
            return document == text
        here = {tuple(document[i : i + n]) for i in range(len(document) - n + 1)}
        return any(tuple(text[i : i + n]) in here for i in range(len(text) - n + 1))

    found = find(overlap(*(" ".join(text) for text in evaluation)), " ".join(document))
    holding = [f"eval:{number}" for number, text in enumerate(evaluation, 1) if holds(text)]
    assert (found is not None) == bool(holding)
    if found:
        assert found in holding


def test_all_texts_of_a_record_are_looked_for() -> None:
    value = {
        "question": "a",
        "answers": {"text": ["b", "c"]},
        "number": 3,
        "messages": [{"content": "d"}],
        "none": None,
    }
    assert list(strings(value)) == ["a", "b", "c", "d"]
    index = EvaluationOverlap([Record({"messages": [{"role": "user", "content": LONG}]}, "chat:9")], WordHasher())
    assert find(index, LONG) == "chat:9"


def test_unrelated_text_is_left_alone() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(50)]
    index = overlap(*(" ".join(rng.choices(vocabulary, k=60)) for _ in range(200)))
    assert all(find(index, " ".join(rng.choices(vocabulary, k=2000))) is None for _ in range(20))
