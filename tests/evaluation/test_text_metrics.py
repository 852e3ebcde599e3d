"""Text metrics: SQuAD's rules, and the same figures as rouge-score and sacrebleu."""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from math import inf, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import DataError, UnknownName, UsageError
from craton.evaluation.text_metrics import (
    bits_per_byte,
    bleu,
    bleu_counts,
    bleu_of_counts,
    contains,
    exact_match,
    normalise_answer,
    perplexity,
    rouge,
    token_f1,
)

ascii_text = st.text(st.characters(max_codepoint=127), max_size=40)
WORDS = [
    "the",
    "a",
    "cat",
    "Cat",
    "sat",
    "on",
    "mat.",
    "3,000.5",
    "U.S.",
    "it's",
    "x-ray",
    "10-12",
    "&amp;",
    "(ok)",
    "_",
]


def official_normal(text: str) -> str:
    """The steps of evaluate-v1.1.py, written from their description."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(answer: str, reference: str) -> float:
    given, wanted = official_normal(answer).split(), official_normal(reference).split()
    common = sum((Counter(given) & Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def sentence(rng: random.Random, most: int = 14) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(0, most)))


@given(ascii_text)
def test_ascii_is_normalised_as_the_official_script_does(text: str) -> None:
    assert normalise_answer(text) == official_normal(text)


@given(
    st.lists(st.sampled_from(WORDS)).map(" ".join), st.lists(st.lists(st.sampled_from(WORDS)).map(" ".join), min_size=1)
)
def test_exact_match_and_f1_are_squads(answer: str, references: list[str]) -> None:
    exact = max(float(official_normal(answer) == official_normal(reference)) for reference in references)
    assert exact_match(answer, references) == exact
    assert token_f1(answer, references) == pytest.approx(max(official_f1(answer, r) for r in references), abs=1e-12)


def test_known_scores() -> None:
    assert exact_match("The  Eiffel Tower!", "eiffel tower") == 1
    assert exact_match("Eiffel", ["Paris", "The Eiffel"]) == 1
    assert token_f1("in the Eiffel Tower", "Eiffel Tower") == pytest.approx(2 * (2 / 3) / (2 / 3 + 1))
    assert token_f1("Paris", ["London", "Rome"]) == 0
    assert token_f1("the", "a") == 0  # nothing is left of either; SQuAD 1.1 says 0
    assert exact_match("the", "a") == 1


def test_other_scripts_are_compared_as_readers_see_them() -> None:
    assert exact_match("تهران، ۱۴۰۳؟", "تهران 1403") == 1
    assert exact_match("«كتاب علي»", "کتاب علی") == 1  # Arabic and Persian keyboards
    assert exact_match("می‌خواهم", "میخواهم") == 1
    assert exact_match("Caf\u00e9", "cafe\u0301") == 1
    assert exact_match("“Zürich”…", "zürich") == 1
    assert token_f1("پایتخت ایران تهران", "تهران") == pytest.approx(0.5)
    assert token_f1("東京都", "東京") == pytest.approx(0.8)
    assert exact_match("کتاب", "کباب") == 0


def test_contains_looks_for_whole_words_in_a_row() -> None:
    assert contains("It is the Eiffel Tower, in Paris.", "eiffel tower") == 1
    assert contains("concatenate", "cat") == 0
    assert contains("tower of Eiffel", ["eiffel tower", "big ben"]) == 0
    assert contains("anything", "the") == 0
    assert contains("پاسخ: تهران، پایتخت", "تهران") == 1


@pytest.mark.parametrize("metric", [exact_match, token_f1, contains])
def test_an_item_without_reference_is_refused(metric) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError):
        metric("x", [])


@pytest.mark.peer
def test_rouge_agrees_with_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    rng = random.Random(0)
    for case in range(400):
        one, other = sentence(rng), sentence(rng)
        if case % 2:  # arbitrary ASCII, too
            one, other = ("".join(rng.choices(string.printable[:64] + " _'", k=30)) for _ in range(2))
        expected = scorer.score(other, one)
        for kind in ("rouge1", "rouge2", "rougeL"):
            assert rouge(one, other, kind) == pytest.approx(expected[kind].fmeasure, abs=1e-12), (kind, one, other)


def test_rouge_in_persian_and_of_long_texts() -> None:
    assert rouge("کتاب خوب را خواندم.", "کتاب خوب را", "rouge1") == pytest.approx(6 / 7)
    assert rouge("a b c d", "b d x", "rougeL") == pytest.approx(4 / 7)
    long = " ".join(map(str, range(3000)))
    assert rouge(long, long) == 1
    assert rouge("", "") == 0
    with pytest.raises(UnknownName):
        rouge("a", "a", "rouge3")  # type: ignore[arg-type]


@given(st.lists(st.sampled_from("abcd"), max_size=12), st.lists(st.sampled_from("abcd"), max_size=12))
def test_the_longest_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, x in enumerate(one):
        for j, y in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    longest = table[-1][-1]
    expected = 2 * longest / (len(one) + len(other)) if longest else 0.0
    assert rouge(" ".join(one), " ".join(other)) == pytest.approx(expected)


@pytest.mark.peer
def test_bleu_agrees_with_sacrebleu() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rng = random.Random(1)
    for case in range(300):
        size, many = rng.randint(1, 6), rng.randint(1, 3)
        answers = [sentence(rng) for _ in range(size)]
        references = [[sentence(rng) for _ in range(many)] for _ in range(size)]
        if case % 3 == 0:  # near to a reference, so that long runs match
            answers = [f"{own[0]} {rng.choice(WORDS)}" for own in references]
        if case % 7 == 0:
            answers = ["".join(rng.choices(string.printable, k=25)) + own for own in answers]
        expected = sacrebleu.corpus_bleu(
            answers, [list(column) for column in zip(*references, strict=True)], force=True
        )
        assert bleu(answers, references) == pytest.approx(expected.score, abs=1e-6), (answers, references)
    assert bleu(["همه چیز خوب است ."], ["همه چیز خوب است ."]) == pytest.approx(100)


def test_bleu_sums_counts_and_refuses_nothing_to_score() -> None:
    assert bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(100)
    rows = bleu_counts("the cat sat on a mat", ["the cat sat on the mat"])
    assert rows.tolist() == [6, 6, 5, 3, 2, 1, 6, 5, 4, 3]
    assert bleu_of_counts(rows[None]) == bleu(["the cat sat on a mat"], [["the cat sat on the mat"]])
    with pytest.raises(DataError):
        bleu([], [])
    with pytest.raises(UsageError):
        bleu(["a"], [])


def test_bits_per_byte_and_perplexity_of_a_uniform_model() -> None:
    assert bits_per_byte(100 * log(256), 100) == pytest.approx(8)
    assert perplexity(100 * log(256), 100) == pytest.approx(256)
    assert perplexity(1e6, 1) == inf
    with pytest.raises(UsageError):
        perplexity(1, 0)
    with pytest.raises(UsageError):
        bits_per_byte(1, 0)
