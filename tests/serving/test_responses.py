"""`/v1/responses` through OpenAI's own client."""

from __future__ import annotations

import json

import openai
import pytest

import craton

WEATHER = {
    "type": "function",
    "name": "f",
    "parameters": {"type": "object", "properties": {"a": {"enum": ["red", "blue"]}}, "required": ["a"]}
    | {"additionalProperties": False},
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return craton.load(str(tiny_model), threads=1)


def test_a_response_is_what_the_model_says_in_process(client, model_id, model):
    said = client.responses.create(
        model=model_id, instructions="the code", input="what is red", temperature=0, max_output_tokens=8, store=False
    )
    chat = [{"role": "system", "content": "the code"}, {"role": "user", "content": "what is red"}]
    expected = model.chat(chat, max_tokens=8)
    assert said.output_text == expected.text
    assert said.status == ("incomplete" if expected.choices[0].finish_reason == "length" else "completed")
    assert said.usage.input_tokens == expected.prompt_tokens


def test_a_stream_of_events_builds_the_same_response(client, model_id):
    common = {"model": model_id, "input": [{"role": "user", "content": "red"}], "temperature": 0}
    whole = client.responses.create(**common, max_output_tokens=8)
    events = list(client.responses.create(**common, max_output_tokens=8, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[0].type == "response.created"
    assert events[-1].response.output_text == whole.output_text
    shape = {"format": {"type": "json_schema", "name": "x", "schema": {"enum": ["red", "blue"]}}}
    with client.responses.stream(**common, max_output_tokens=40, text=shape) as stream:
        assert json.loads(stream.get_final_response().output_text) in ("red", "blue")


def test_calls_and_their_results_go_there_and_back(client, model_id):
    said = client.responses.create(
        model=model_id,
        input="red",
        tools=[WEATHER],
        tool_choice={"type": "function", "name": "f"},
        max_output_tokens=80,
    )
    [call] = said.output
    assert call.name == "f"
    assert json.loads(call.arguments)["a"] in ("red", "blue")
    given = [
        {"role": "user", "content": "red"},
        call.model_dump(exclude_none=True),
        {"type": "function_call_output", "call_id": call.call_id, "output": "blue"},
    ]
    again = client.responses.create(model=model_id, input=given, tools=[WEATHER], max_output_tokens=4)
    assert again.output[-1].type == "message"


def test_text_has_the_form_that_was_asked_for(client, model_id):
    shape = {"type": "json_schema", "name": "x", "schema": {"enum": ["red", "blue"]}}
    said = client.responses.create(model=model_id, input="red", text={"format": shape}, max_output_tokens=20)
    assert json.loads(said.output_text) in ("red", "blue")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"store": True}, "store"), ({"previous_response_id": "r"}, "previous_response_id"), ({"background": True},) * 2],
)
def test_state_is_refused(client, model_id, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=model_id, input="red", **fields)
    assert caught.value.param == (param if isinstance(param, str) else "background")
