"""Leakage: what training gives away of the tests is found, and what only looks alike is not."""

from __future__ import annotations

import random

import pytest

from craton.errors import UsageError
from craton.evaluation.leakage import LeakageReport, find_leaks

VOCABULARY = [f"{a}{b}" for a in ("ma", "ti", "so", "کت") for b in ("na", "ler", "q", "اب", "بو", "x7", "d")]


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(VOCABULARY, k=words))


def test_each_kind_is_found_and_named_once() -> None:
    rng = random.Random(0)
    test = [text(rng, 60) for _ in range(20)]
    fresh = [text(rng, 60) for _ in range(30)]
    shared_run = f"{text(rng, 40)} {' '.join(test[3].split()[10:24])} {text(rng, 40)}"
    # One word in eleven is another: no run of 13 is left, but of shorter texts' shingles too few; so 12 of 400.
    spaced = test[5].split()
    train = [*fresh, f"  «{test[1].upper()}»\n", shared_run, " ".join(spaced[:30]), *fresh[:2]]
    report = find_leaks(train, test)
    assert report.pairs == [(30, 1, "exact"), (31, 3, "overlap_13"), (32, 5, "overlap_13")]
    assert (report.exact, report.overlap_13, report.near, report.leaks) == (1, 2, 0, 3)
    assert report.kept(train) == [*fresh, *fresh[:2]]
    assert report.as_dict()["pairs"] == report.pairs


def test_near_duplicates_without_a_common_run_of_13_words() -> None:
    rng = random.Random(1)
    words = [f"{rng.choice(VOCABULARY)}{i % 7}" for i in range(12)]
    test = [" ".join(words)] + [text(rng, 12) for _ in range(10)]
    near = " ".join([*words[:11], "another"])  # 7 of 9 runs of five
    assert find_leaks([near], test, threshold=0.6).pairs == [(0, 0, "near")]
    assert find_leaks([near], test, threshold=0.99).pairs == []
    # A training text that is near to another one must not hide behind it.
    assert find_leaks([near, near, near], test, threshold=0.6).near == 3


def test_short_texts_leak_only_if_they_are_the_same() -> None:
    test = ["What is 3 + 4?", "Who wrote Hamlet?", "Yes", "پایتخت ایران کجاست؟"]
    train = [
        "What is 3 - 4?",
        "what  is 3 + 4",
        "Who wrote Hamlet and Macbeth?",
        "yes.",
        "پایتخت ایران کجاست",
        "…",
        "?",
    ]
    report = find_leaks(train, test)
    assert report.pairs == [(1, 0, "exact"), (3, 2, "exact"), (4, 3, "exact")]
    # Nor does a long text that holds a short one.
    assert find_leaks(["Yes, and who wrote Hamlet? That is a question for another long day."], test).pairs == []


def test_a_question_of_eight_words_within_a_longer_text_is_found() -> None:
    test = ["Which river flows through the old town of Basel?"]
    train = ["A quiz. Which river flows through the old town of Basel? The Rhine, of course, as all know."]
    assert find_leaks(train, test).pairs == [(0, 0, "overlap_13")]


def test_unrelated_texts_do_not_leak() -> None:
    rng = random.Random(2)
    report = find_leaks([text(rng, 80) for _ in range(200)], [text(rng, 80) for _ in range(200)])
    assert report == LeakageReport()
    assert find_leaks([], []) == LeakageReport()
    assert find_leaks(["a"], []) == LeakageReport()


def test_the_threshold_is_a_share() -> None:
    with pytest.raises(UsageError):
        find_leaks([], [], threshold=80)
