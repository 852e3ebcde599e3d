"""`/v1/chat/completions` through OpenAI's own client."""

from __future__ import annotations

import json
import math
import re

import openai
import pytest

import craton

ASK = [{"role": "user", "content": "what is the code of red"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["red", "blue"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def model(tiny_model):
    return craton.load(str(tiny_model), threads=1)


def streamed(chunks) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_an_answer_is_what_the_model_says_in_process(client, model_id, model):
    said = client.chat.completions.create(model=model_id, messages=ASK, temperature=0, max_tokens=12)
    expected = model.chat(ASK, max_tokens=12)
    assert said.choices[0].message.content == expected.text
    assert said.choices[0].finish_reason == expected.choices[0].finish_reason
    assert said.usage.prompt_tokens == expected.prompt_tokens
    assert said.usage.completion_tokens == expected.completion_tokens
    assert said.id.startswith("chatcmpl-")


def test_a_stream_says_the_same_and_brings_usage(client, model_id):
    sampling = {"model": model_id, "messages": ASK, "temperature": 0.9, "seed": 5, "max_tokens": 20}
    whole = client.chat.completions.create(**sampling)
    chunks = list(client.chat.completions.create(**sampling, stream=True, stream_options={"include_usage": True}))
    assert streamed(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_several_answers_have_seeds_of_their_own_and_come_in_one_stream(client, model_id, model):
    sampling = {"model": model_id, "messages": ASK, "temperature": 1.5, "seed": 3, "max_tokens": 10, "n": 3}
    whole = client.chat.completions.create(**sampling)
    expected = model.generate(model.render(ASK), temperature=1.5, seed=3, max_tokens=10, n=3)
    assert [c.message.content for c in whole.choices] == [c.text for c in expected.choices]
    texts = {0: "", 1: "", 2: ""}
    for chunk in client.chat.completions.create(**sampling, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert list(texts.values()) == [c.message.content for c in whole.choices]


def test_logprobs_are_the_models(client, model_id, model):
    said = client.chat.completions.create(
        model=model_id, messages=ASK, temperature=0, max_tokens=5, logprobs=True, top_logprobs=3
    )
    content = said.choices[0].logprobs.content
    expected = model.generate(model.render(ASK), max_tokens=5, logprobs=3).choices[0].tokens
    assert [t.logprob for t in content] == pytest.approx([t.logprob for t in expected], abs=1e-4)
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].logprob == t.logprob for t in content)
    assert b"".join(bytes(t.bytes) for t in content).decode(errors="replace") == said.choices[0].message.content
    chunks = client.chat.completions.create(
        model=model_id, messages=ASK, temperature=0, max_tokens=5, logprobs=True, stream=True
    )
    found = [t.logprob for c in chunks for choice in c.choices if choice.logprobs for t in choice.logprobs.content]
    assert found == pytest.approx([t.logprob for t in content], abs=1e-4)


def test_stop_bias_and_penalties_are_followed(client, model_id, model):
    plain = client.chat.completions.create(model=model_id, messages=ASK, temperature=0, max_tokens=16)
    text = plain.choices[0].message.content
    stop = text[6:8]
    said = client.chat.completions.create(model=model_id, messages=ASK, temperature=0, max_tokens=16, stop=[stop])
    assert said.choices[0].message.content == text[: text.index(stop)]
    assert said.choices[0].finish_reason == "stop"
    token = model.tokenizer.encode(" zim", add_special_tokens=False)[0]
    biased = client.chat.completions.create(
        model=model_id, messages=ASK, temperature=0, max_tokens=4, logit_bias={str(token): 100}
    )
    assert biased.choices[0].message.content == model.tokenizer.decode([token] * 4)
    spread = client.chat.completions.create(
        model=model_id,
        messages=ASK,
        temperature=0,
        max_tokens=4,
        logit_bias={str(token): 3},
        frequency_penalty=2,
        presence_penalty=2,
    )
    expected = model.chat(ASK, max_tokens=4, logit_bias={token: 3}, frequency_penalty=2, presence_penalty=2)
    assert spread.choices[0].message.content == expected.text


def test_an_answer_has_the_form_that_was_asked_for(client, model_id):
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    common = {"model": model_id, "messages": ASK, "temperature": 1, "seed": 1, "max_tokens": 100}
    said = client.chat.completions.create(**common, response_format=shape)
    assert json.loads(said.choices[0].message.content)["colour"] in ("red", "blue")
    said = client.chat.completions.create(**common, extra_body={"guided_choice": ["zim", "zam"]})
    assert said.choices[0].message.content in ("zim", "zam")
    said = client.chat.completions.create(**common, extra_body={"guided_regex": "[0-9]{3}"})
    assert re.fullmatch("[0-9]{3}", said.choices[0].message.content)
    with pytest.raises(openai.BadRequestError, match="one form"):
        client.chat.completions.create(**common, response_format=shape, extra_body={"guided_regex": "a"})


def test_a_call_that_must_be_made_is_made(client, model_id):
    common = {"model": model_id, "messages": ASK, "temperature": 1, "seed": 2, "max_tokens": 90}
    named = {"type": "function", "function": {"name": "get_weather"}}
    said = client.chat.completions.create(**common, tools=[NOW, WEATHER], tool_choice=named)
    [call] = said.choices[0].message.tool_calls
    assert said.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in ("red", "blue")
    said = client.chat.completions.create(
        **common, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, stream=True
    )
    deltas = [call for chunk in said for choice in chunk.choices for call in choice.delta.tool_calls or []]
    [delta] = deltas
    assert delta.id
    assert json.loads(delta.function.arguments)["city"] in ("red", "blue")
    # What was called goes back into the conversation, with its result.
    again = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    said = client.chat.completions.create(model=model_id, messages=again, tools=[WEATHER], max_tokens=4, temperature=0)
    assert said.choices[0].message.tool_calls is None


def test_tools_that_may_not_be_called_are_not_shown(client, model_id):
    plain = client.chat.completions.create(model=model_id, messages=ASK, max_tokens=1)
    shown = client.chat.completions.create(model=model_id, messages=ASK, max_tokens=1, tools=[WEATHER])
    hidden = client.chat.completions.create(
        model=model_id, messages=ASK, max_tokens=1, tools=[WEATHER], tool_choice="none"
    )
    assert shown.usage.prompt_tokens > plain.usage.prompt_tokens == hidden.usage.prompt_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 10**9}, "n"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"extra_body": {"chat_template_kwargs": {"messages": "x"}}}, "messages"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client, model_id, fields, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": model_id, "messages": ASK, "max_tokens": 4, **fields})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_prompt_that_does_not_fit_is_refused_with_counts(client, model_id):
    long = [{"role": "user", "content": "red " * 600}]
    with pytest.raises(openai.BadRequestError, match="of prompt") as caught:
        client.chat.completions.create(model=model_id, messages=long)
    assert caught.value.code == "context_length_exceeded"
    assert math.isfinite(float(caught.value.response.headers["content-length"]))


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="../../etc/passwd", messages=ASK)
    assert caught.value.code == "model_not_found"
