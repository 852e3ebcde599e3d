"""`/v1/messages` through Anthropic's own client."""

from __future__ import annotations

import pytest

import craton
from craton.serving.asking import stopped_by

anthropic = pytest.importorskip("anthropic")

ASK = [{"role": "user", "content": "what is the code of red"}]
GREEDY = {"temperature": 0}
TOOL = {
    "name": "f",
    "input_schema": {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
    | {"additionalProperties": False},
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return craton.load(str(tiny_model), threads=1)


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=300)


def test_an_answer_is_what_the_model_says_in_process(claude, model_id, model):
    said = claude.messages.create(model=model_id, system="the code", messages=ASK, max_tokens=8, extra_body=GREEDY)
    expected = model.chat([{"role": "system", "content": "the code"}, *ASK], max_tokens=8)
    assert said.content[0].text == expected.text
    assert said.stop_reason == ("max_tokens" if expected.choices[0].finish_reason == "length" else "end_turn")
    assert said.usage.input_tokens + said.usage.cache_read_input_tokens == expected.prompt_tokens
    assert said.usage.output_tokens == expected.completion_tokens
    counted = claude.messages.count_tokens(model=model_id, system="the code", messages=ASK)
    assert counted.input_tokens == expected.prompt_tokens


def test_the_stop_string_that_ended_an_answer_is_named(claude, model_id, model):
    text = claude.messages.create(model=model_id, messages=ASK, max_tokens=40, extra_body=GREEDY).content[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    common = {"model": model_id, "messages": ASK, "max_tokens": 40, "extra_body": GREEDY}
    said = claude.messages.create(**common, stop_sequences=["never at all", stop])
    assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", stop)
    assert said.content[0].text == text[: text.index(stop)]
    with claude.messages.stream(**common, stop_sequences=["never at all", stop]) as stream:
        final = stream.get_final_message()
    assert (final.stop_reason, final.stop_sequence) == ("stop_sequence", stop)
    unstopped = claude.messages.create(**common, stop_sequences=["never at all"])
    assert unstopped.stop_sequence is None
    assert unstopped.stop_reason in ("max_tokens", "end_turn")


def test_the_first_of_several_stop_strings_is_the_one(model):
    ids = model.tokenizer.encode("red blue green", add_special_tokens=False)
    assert stopped_by(ids, ["green", "blue"], model.tokenizer) == "blue"
    assert stopped_by(ids, ["bl", "blue"], model.tokenizer) == "blue"
    assert stopped_by(ids, ["white"], model.tokenizer) is None


def test_a_stream_of_events_builds_the_same_message(claude, model_id):
    common = {"model": model_id, "messages": ASK, "max_tokens": 8, "extra_body": GREEDY}
    whole = claude.messages.create(**common)
    with claude.messages.stream(**common) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text == final.content[0].text
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_calls_and_their_results_go_there_and_back(claude, model_id):
    common = {"model": model_id, "tools": [TOOL], "max_tokens": 80}
    said = claude.messages.create(**common, messages=ASK, tool_choice={"type": "tool", "name": "f"})
    [block] = said.content
    assert (said.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "f")
    assert block.input["a"] in ("red", "blue")
    with claude.messages.stream(**common, messages=ASK, tool_choice={"type": "tool", "name": "f"}) as stream:
        final = stream.get_final_message()
    assert final.content[0].input["a"] in ("red", "blue")
    result = {"type": "tool_result", "tool_use_id": block.id, "content": "blue"}
    turns = [
        *ASK,
        {"role": "assistant", "content": said.model_dump()["content"]},
        {"role": "user", "content": [result]},
    ]
    turns[1]["content"] = [{k: v for k, v in turns[1]["content"][0].items() if k in ("type", "id", "name", "input")}]
    again = claude.messages.create(**common | {"max_tokens": 4}, messages=turns)
    assert again.content[0].type == "text"


def test_text_has_the_form_that_was_asked_for(claude, model_id):
    shape = {"format": {"type": "json_schema", "schema": {"enum": ["red", "blue"]}}}
    said = claude.messages.create(model=model_id, messages=ASK, max_tokens=20, output_config=shape)
    assert said.content[0].text in ('"red"', '"blue"')


def test_refusals_have_anthropics_shape(claude, model_id):
    with pytest.raises(anthropic.BadRequestError) as caught:
        claude.messages.create(model=model_id, messages=ASK, max_tokens=4, thinking={"type": "adaptive"})
    assert caught.value.body["type"] == "error"
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "thinking" in caught.value.body["error"]["message"]
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="nobody", messages=ASK, max_tokens=4)
