"""Reasoning, text and calls, however the text is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.serving.parsing import AnswerParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>'


def read(text: str, cuts: list[int], **options) -> dict[str, object]:
    parser = AnswerParser(**options)
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    said = [one for a, b in pairwise(places) for one in parser.push(text[a:b])]
    said += parser.finish()
    return {
        "content": "".join(one.text for one in said if one.kind == "content"),
        "reasoning": "".join(one.text for one in said if one.kind == "reasoning"),
        "calls": [(one.text, one.arguments) for one in said if one.kind == "call"],
    }


# A first draw may be slow where other processes have the processor.
FAST = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])

CUTS = st.lists(st.integers(0, 10**6), max_size=30)


@FAST
@given(CUTS)
def test_reasoning_text_and_calls_are_told_apart_wherever_the_text_is_cut(cuts):
    text = f"<think>\nhm <b>\n</think>\n\nsee < this\n{CALL}\n{CALL}"
    found = read(text, cuts, reasoning=True, calls=True)
    assert found["reasoning"] == "hm <b>"
    assert found["content"] == "see < this"
    assert found["calls"] == [("f", '{"a": "é"}')] * 2


@FAST
@given(CUTS)
def test_a_prompt_may_have_begun_the_reasoning(cuts):
    found = read("hm</think>so", cuts, reasoning=True, inside=True)
    assert (found["reasoning"], found["content"]) == ("hm", "so")


@FAST
@given(CUTS)
def test_what_only_looks_like_a_call_stays_text(cuts):
    broken = '<tool_call>{"name": 3}</tool_call>'
    assert read(f"a {broken} b", cuts, calls=True)["content"] == f"a {broken} b"
    cut_off = 'a <tool_call>{"name": "f", "arg'
    assert read(cut_off, cuts, calls=True)["content"] == cut_off


@FAST
@given(st.text('<>/thinkool_ca{}" \n', max_size=60), CUTS)
def test_no_text_raises_and_the_cuts_never_matter(text, cuts):
    options = {"reasoning": True, "calls": True}
    assert read(text, cuts, **options) == read(text, [], **options)


@FAST
@given(st.text(max_size=40), CUTS)
def test_without_tags_all_is_text(text, cuts):
    assert read(text, cuts)["content"] == text


def test_a_bare_call_is_read_at_the_end():
    found = read('{"name": "f", "arguments": {}}', [3, 9], bare_call=True)
    assert found["calls"] == [("f", "{}")]
