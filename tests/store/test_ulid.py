"""ULIDs: unique, sorted by time, and readable again."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.store.ulid import new_ulid, ulid_seconds


def test_they_are_unique_and_tell_their_time() -> None:
    before = time.time()
    made = [new_ulid() for _ in range(1000)]
    after = time.time()
    assert len(set(made)) == 1000
    for text in made:
        seconds = ulid_seconds(text)
        assert seconds is not None
        assert before - 0.001 <= seconds <= after
    assert [text[:10] for text in made] == sorted(text[:10] for text in made)


@given(earlier=st.integers(0, 2**48 - 2), step=st.integers(1, 2**20))
def test_a_later_one_sorts_later(earlier: int, step: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: earlier * 1_000_000)
        first = new_ulid()
        patch.setattr(time, "time_ns", lambda: min(earlier + step, 2**48 - 1) * 1_000_000)
        second = new_ulid()
    assert first < second
    assert ulid_seconds(first) == earlier / 1000


def test_the_example_of_the_specification() -> None:
    assert ulid_seconds("01ARYZ6S41TSV4RRFFQ69G5FAV") == 1469918176.385


@pytest.mark.parametrize("text", ["", "v1", "01ARYZ6S41TSV4RRFFQ69G5FA", "8" + "0" * 25, "01aryz6s41tsv4rrffq69g5fav"])
def test_other_text_is_no_ulid(text: str) -> None:
    assert ulid_seconds(text) is None
