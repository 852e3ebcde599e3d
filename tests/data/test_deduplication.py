"""Duplicates: the same text is found always, nearly the same by its share of five-word runs, in any script."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.data.deduplication import (
    SHINGLE_WORDS,
    THRESHOLD,
    ExactDuplicates,
    NearDuplicates,
    signature,
)
from craton.data.documents import digest
from craton.data.words import WordHasher, runs, words

VOCABULARY = [
    f"{a}{b}" for a in ("ma", "ti", "so", "کت", "می‌رو") for b in ("na", "ler", "q", "اب", "بو", "م", "x7", "d")
]


def jaccard(one: str, other: str) -> float:
    """The exact similarity of two texts, by sets of tuples of words."""
    sets = []
    for text in (one, other):
        own = words(text)
        n = min(SHINGLE_WORDS, len(own))
        sets.append({tuple(own[i : i + n]) for i in range(len(own) - n + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, edits: int, rng: random.Random) -> str:
    own = text.split()
    for place in rng.sample(range(len(own)), edits):
        own[place] = f"edit{rng.random()}"
    return " ".join(own)


def test_words_keep_marks_joiners_and_letters_of_any_script() -> None:
    assert words("Don't PANIC: x_1, 3.14!") == ["don", "t", "panic", "x_1", "3", "14"]
    assert words("می‌خواهم کِتابِ خوب را، بخوانم!") == ["می‌خواهم", "کِتابِ", "خوب", "را", "بخوانم"]
    assert words("cafe\u0301 CAFÉ") == ["café", "café"]
    assert words("हिन्दी भाषा") == ["हिन्दी", "भाषा"]
    assert words("東京に行く, 2 回") == ["東", "京", "に", "行", "く", "2", "回"]
    assert words("… — !") == []


def test_exact_duplicates_are_found_but_for_white_space_and_composition() -> None:
    seen = ExactDuplicates()
    assert seen.add(digest("کتاب  خوب\nCafé"), "a:1") is None
    assert seen.add(digest(" کتاب خوب Cafe\u0301"), "a:2") == "a:1"
    assert seen.add(digest("کتاب خوب café"), "a:3") is None
    assert seen.add(digest("کتاب خوب Café"), "a:1") == "a:1"


@given(st.lists(st.sampled_from(VOCABULARY), min_size=1, max_size=40), st.integers(1, 6))
def test_equal_runs_have_equal_hashes_and_others_do_not(text: list[str], n: int) -> None:
    hashes = runs(WordHasher()(" ".join(text)), n).tolist()
    expected = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
    assert len(hashes) == len(expected)
    assert len(set(hashes)) == len(set(expected))
    assert len(set(zip(hashes, expected, strict=True))) == len(set(expected))


def test_signatures_estimate_the_similarity() -> None:
    rng, hasher = random.Random(1), WordHasher()
    errors = []
    for edits in (0, 1, 2, 4, 8, 16, 32, 100) * 8:
        text = " ".join(rng.choices(VOCABULARY, k=200))
        other = edited(text, edits, rng)
        one, two = signature(hasher(text)), signature(hasher(other))
        assert one is not None
        assert two is not None
        errors.append(float((one == two).mean()) - jaccard(text, other))
    # The spread of 128 coin tosses is 0.044 at most, and no bias.
    assert float(np.sqrt(np.mean(np.square(errors)))) < 0.05
    assert abs(float(np.mean(errors))) < 0.02


@pytest.mark.parametrize("length", [60, 1200])
def test_recall_and_precision_on_near_duplicates(length: int) -> None:
    rng, hasher = random.Random(2), WordHasher()
    near, found_near, far, found_far = 0, 0, 0, 0
    for _ in range(40 if length < 1000 else 12):
        text = " ".join(rng.choices(VOCABULARY, k=length))
        for share in (0.005, 0.01, 0.02, 0.04, 0.06, 0.1):
            other = edited(text, round(share * length), rng)
            similarity = jaccard(text, other)
            index = NearDuplicates()
            one, two = signature(hasher(text)), signature(hasher(other))
            assert one is not None
            assert two is not None
            assert index.add(one, "first") is None
            found = index.add(two, "second") == "first"
            if similarity >= THRESHOLD + 0.07:
                near, found_near = near + 1, found_near + found
            elif similarity <= THRESHOLD - 0.1:
                far, found_far = far + 1, found_far + found
    assert near > 20
    assert far > 20
    assert found_near / near >= 0.97
    assert found_far / far <= 0.02


def test_the_most_similar_earlier_text_is_named_among_many() -> None:
    rng, hasher = random.Random(3), WordHasher()
    index = NearDuplicates()
    texts = [" ".join(rng.choices(VOCABULARY, k=80)) for _ in range(1500)]
    for number, text in enumerate(texts):
        own = signature(hasher(text))
        assert own is not None
        assert index.add(own, f"t:{number}") is None
    for number in (0, 700, 1499):
        own = signature(hasher(edited(texts[number], 1, rng)))
        assert own is not None
        assert index.add(own, "again") == f"t:{number}"


def test_texts_without_words_have_no_signature_and_short_ones_are_one_shingle() -> None:
    hasher = WordHasher()
    assert signature(hasher("… !")) is None
    one, same, other = (signature(hasher(text)) for text in ("Yes, sir.", "yes sir", "no sir"))
    assert one is not None
    assert (one == same).all()
    assert (one != other).mean() > 0.9


def test_signatures_are_the_same_in_every_process() -> None:
    program = (
        "from craton.data.deduplication import signature\nfrom craton.data.words import WordHasher\n"
        "print(signature(WordHasher()('می‌خواهم a quick brown fox jumps'))[:3].tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env={"PYTHONHASHSEED": seed}, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
