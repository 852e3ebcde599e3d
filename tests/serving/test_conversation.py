"""What a conversation becomes for models whose templates differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from craton.inference.pictures import Prompt
from craton.modalities.text import Tokenizer, render
from craton.serving.conversation import Chat, prepare
from craton.serving.errors import ApiError

MESSAGES = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.a }}{% endfor %};{% endfor %}"
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
ASK = [{"role": "user", "content": "red"}]


@pytest.fixture
def served(tiny_model):
    def make(template: str) -> SimpleNamespace:
        plain = Tokenizer.from_folder(tiny_model)
        tokenizer = Tokenizer(plain.backend, special_tokens=plain.special_tokens, chat_templates={"default": template})

        def prompt(messages, **more) -> Prompt:
            rendered = render(messages, tokenizer, add_generation_prompt=True, **more)
            return Prompt(rendered.ids, text=rendered.text)

        return SimpleNamespace(id="m", model=SimpleNamespace(tokenizer=tokenizer, prompt=prompt))

    return make


def said(prepared, text: str) -> list[tuple[str, str]]:
    parser = prepared.parsers[0]
    return [(one.kind, one.text) for one in parser.push(text) + parser.finish()]


def text_of(served, prepared) -> str:
    return served.model.tokenizer.decode(prepared.ids, skip_special_tokens=False)


def test_reasoning_is_kept_apart_where_the_template_knows_it(served):
    plain, thinking = served(MESSAGES), served(MESSAGES + "{# <think> #}assistant:")
    begun = served(MESSAGES + "assistant:<think>\n")
    written = "<think>hm</think>so"
    assert said(prepare(plain, Chat(ASK, {})), written) == [("content", written)]
    assert said(prepare(thinking, Chat(ASK, {})), written) == [("reasoning", "hm"), ("content", "so")]
    assert said(prepare(begun, Chat(ASK, {})), "hm</think>so") == [("reasoning", "hm"), ("content", "so")]
    # An answer of a given form cannot begin with reasoning.
    assert said(prepare(begun, Chat(ASK, {"choices": ("so",)})), "so") == [("content", "so")]


def test_tools_need_a_template_that_shows_them(served):
    with pytest.raises(ApiError, match="does not show tools"):
        prepare(served(MESSAGES), Chat(ASK, {}, TOOLS))
    unknown_format = served("{{ tools | tojson }}" + MESSAGES)
    assert said(prepare(unknown_format, Chat(ASK, {}, TOOLS)), "<tool_call>x") == [("content", "<tool_call>x")]
    forced = prepare(unknown_format, Chat(ASK, {}, TOOLS, "required"))
    assert "<tool_call>" not in forced.sampling["grammar"]
    assert said(forced, '{"name": "f", "arguments": {"a": 1}}') == [("call", "f")]
    known = prepare(served("<tool_call>{{ tools | tojson }}" + MESSAGES), Chat(ASK, {}, TOOLS))
    assert said(known, '<tool_call>{"name": "f", "arguments": {}}</tool_call>') == [("call", "f")]


def test_arguments_come_as_objects_and_developers_as_system(served):
    chat = [
        {"role": "developer", "content": "be"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "zim"}'}}],
        },
        *ASK,
    ]
    model = served(MESSAGES)
    assert text_of(model, prepare(model, Chat(chat, {}))) == "system:be;assistant:zim;user:red;"
    knows = served(MESSAGES + "{# developer #}")
    assert text_of(knows, prepare(knows, Chat(chat, {}))).startswith("developer:be;")


def test_variables_are_those_that_the_template_reads(served):
    model = served(MESSAGES + "{{ enable_thinking }}")
    assert text_of(model, prepare(model, Chat(ASK, {}, variables={"enable_thinking": False}))).endswith("False")
    with pytest.raises(ApiError, match="no variable"):
        prepare(model, Chat(ASK, {}, variables={"thinking": True}))
