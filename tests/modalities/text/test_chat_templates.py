"""Rendered text, byte for byte as transformers renders it, for templates in the style of the published ones."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.errors import TemplateError
from craton.modalities.text import ChatTemplate

# chatml: SmolLM2's; qwen3 drops the reasoning of earlier turns; corners: what templates use now and then.
TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "templates").iterdir())
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}

PLAIN = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I'm doing great.\n How can I help?"},
    {"role": "user", "content": '  سلام 👩‍👩‍👧 <b>&"quotes"</b> {{ not a template }} '},
]
WITH_SYSTEM = [{"role": "system", "content": "Be brief. "}, *PLAIN]
ANSWERED = [*PLAIN, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfine", "name": None}]
REASONED = [*PLAIN[:2], PLAIN[0], {"role": "assistant", "content": "fine", "reasoning": "because"}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "تهران", "days": 2}}}
WITH_TOOLS = [
    PLAIN[0],
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "sunny & <warm>", "tool_call_id": "1"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather, <today>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CONVERSATIONS = {
    "plain": PLAIN,
    "system": WITH_SYSTEM,
    "answered": ANSWERED,
    "reasoned": REASONED,
    "tools": WITH_TOOLS,
}


def both(source: str, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
    """What we and transformers render; the kind of failure where rendering fails."""
    theirs_module = pytest.importorskip("transformers.utils.chat_template_utils")
    try:
        ours = ChatTemplate(source, SPECIAL).render_text(messages, **options)
    except TemplateError:
        ours = "refused"
    dropped = [{k: v for k, v in message.items() if v is not None} for message in messages]
    try:
        theirs, _ = theirs_module.render_jinja_template([dropped], chat_template=source, **SPECIAL, **options)
        return ours, theirs[0]
    except Exception:
        return ours, "refused"


@pytest.mark.peer
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(name: str, conversation: str) -> None:
    messages = CONVERSATIONS[conversation]
    for prompt in (False, True):
        for tools in (None, TOOLS):
            ours, theirs = both(TEMPLATES[name], messages, tools=tools, add_generation_prompt=prompt)
            assert ours == theirs


@pytest.mark.peer
def test_the_cases_above_are_not_all_refused() -> None:
    rendered = {name: both(source, PLAIN)[0] for name, source in TEMPLATES.items()}
    assert "refused" not in rendered.values()
    assert both(TEMPLATES["mistral"], [PLAIN[1]])[0] == "refused"
    assert both(TEMPLATES["gemma"], WITH_SYSTEM)[0] == "refused"


@pytest.mark.peer
def test_variables_reach_the_template() -> None:
    ours, theirs = both(TEMPLATES["qwen3"], PLAIN, add_generation_prompt=True, enable_thinking=False)
    assert ours == theirs
    assert ours.endswith("</think>\n\n")
    ours, theirs = both(TEMPLATES["llama3"], PLAIN, date_string="1 Jan 2000")
    assert ours == theirs
    assert "1 Jan 2000" in ours
    documents = [{"title": "t", "text": "<x>"}]
    assert both("{{ documents | tojson }}", PLAIN, documents=documents) == ('[{"title": "t", "text": "<x>"}]',) * 2


@pytest.mark.peer
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    contents=st.lists(
        st.one_of(st.text(), st.sampled_from(["</think>a", " x ", "\n", "</s><s>"])), min_size=1, max_size=5
    ),
    prompt=st.booleans(),
)
def test_any_text_as_transformers_renders_it(name: str, contents: list[str], prompt: bool) -> None:
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    ours, theirs = both(TEMPLATES[name], messages, add_generation_prompt=prompt)
    assert ours == theirs


def test_known_text() -> None:
    """The same without a peer: SmolLM2's format, written out."""
    text = ChatTemplate(TEMPLATES["chatml"], SPECIAL).render_text(PLAIN[:2], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHello, how are you?<|im_end|>\n"
        "<|im_start|>assistant\nI'm doing great.\n How can I help?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_today() -> None:
    text = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", {}).render_text(PLAIN)
    assert abs(datetime.date.fromisoformat(text) - datetime.date.today()) <= datetime.timedelta(days=1)


def test_parts_of_content() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate("{{ messages[0].content }}", {}).render_text(parts) == "ab"
    looping = "{% for part in messages[0]['content'] %}[{{ part.text }}]{% endfor %}"
    assert ChatTemplate(looping, {}).render_text(parts) == "[a][b]"
    filtered = (
        "{% for part in messages[0].content | selectattr('type', 'equalto', 'text') %}[{{ part.text }}]{% endfor %}"
    )
    assert ChatTemplate(filtered, {}).render_text(parts) == "[a][b]"
