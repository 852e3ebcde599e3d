"""From a conversation to tokens: which are trained, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.errors import TemplateError, UnknownName, UsageError
from craton.modalities.text import Rendered, Tokenizer, render

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
BLOCKS_WITHOUT_STOP = BLOCKS.replace(
    "message['content'] + '<|im_end|>' }}{% endgen", "message['content'] }}{% endgen"
).replace("{% endgeneration %}", "{% endgeneration %}<|im_end|>")
# Only the last turn keeps its reasoning.
REASONING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

USER = {"role": "user", "content": "What is the quick fox? سلام"}
ANSWER = {"role": "assistant", "content": "A fox 🦊 می‌شود; it runs."}
TURNS = [USER, ANSWER, {"role": "user", "content": "And the dog?"}, {"role": "assistant", "content": "lazy"}]


def with_template(tokenizer: Tokenizer, source: str | dict[str, str]) -> Tokenizer:
    templates = {"default": source} if isinstance(source, str) else source
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    return Tokenizer(backend, special_tokens=tokenizer.special_tokens, chat_templates=templates)


@pytest.fixture(scope="session")
def chatml(byte_level: Tokenizer) -> Tokenizer:
    return with_template(byte_level, CHATML)


def trained_text(tokenizer: Tokenizer, rendered: Rendered) -> str:
    ids = [i for i, trained in zip(rendered.ids, rendered.trained, strict=True) if trained]
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_text_and_ids(chatml: Tokenizer) -> None:
    rendered = render(TURNS[:1], chatml, add_generation_prompt=True)
    assert rendered.text == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered.ids == chatml.encode(rendered.text, add_special_tokens=False)
    assert rendered.trained == [False] * len(rendered.ids)


@pytest.mark.parametrize("source", [CHATML, BLOCKS, BLOCKS_WITHOUT_STOP])
def test_what_the_assistant_says_is_trained_and_its_stop_token(byte_level: Tokenizer, source: str) -> None:
    tokenizer = with_template(byte_level, source)
    rendered = render(TURNS, tokenizer)
    assert len(rendered.trained) == len(rendered.ids)
    assert trained_text(tokenizer, rendered) == f"{ANSWER['content']}<|im_end|>lazy<|im_end|>"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=6))
def test_blocks_and_prefixes_give_the_same_mask(byte_level: Tokenizer, contents: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    by_prefix, by_block = with_template(byte_level, CHATML), with_template(byte_level, BLOCKS)
    # (This small vocabulary has no token that joins a template's line break with the white space of an answer.)
    rendered = render(messages, by_prefix)
    assert render(messages, by_block) == rendered
    answers = [text for message, text in zip(messages, contents, strict=True) if message["role"] == "assistant"]
    assert trained_text(by_prefix, rendered) == "".join(f"{text}<|im_end|>" for text in answers)


@pytest.mark.peer
def test_mask_of_blocks_as_in_transformers(byte_level: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = with_template(byte_level, BLOCKS)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend)
    whole = theirs.apply_chat_template(
        TURNS, chat_template=BLOCKS, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    rendered = render(TURNS, tokenizer)
    assert rendered.ids == whole["input_ids"]
    assert rendered.trained == [bool(m) for m in whole["assistant_masks"]]


@pytest.mark.peer
def test_ids_of_the_real_model_as_in_transformers(smollm2: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=smollm2.backend, **smollm2.special_tokens)
    for messages in (TURNS, [{"role": "system", "content": "خلاصه بگو"}, USER]):
        for prompt in (False, True):
            ids = theirs.apply_chat_template(
                messages, chat_template=smollm2.chat_template, add_generation_prompt=prompt, return_dict=False
            )
            assert render(messages, smollm2, add_generation_prompt=prompt).ids == ids


def test_the_real_model_trains_its_answers(smollm2: Tokenizer) -> None:
    assert trained_text(smollm2, render(TURNS, smollm2)) == f"{ANSWER['content']}<|im_end|>lazy<|im_end|>"


def test_sentencepiece_masks(sentencepiece: Tokenizer) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = with_template(sentencepiece, source)
    rendered = render(TURNS, tokenizer)
    assert rendered.ids[0] == tokenizer.bos_id
    assert rendered.ids.count(tokenizer.bos_id) == 1
    assert trained_text(tokenizer, rendered) == f"{ANSWER['content']}</s> lazy</s>"


# BOS


def test_no_bos_is_added_where_the_template_writes_none(sentencepiece: Tokenizer) -> None:
    tokenizer = with_template(sentencepiece, "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    assert tokenizer.adds_bos
    assert tokenizer.bos_id not in render([USER], tokenizer).ids


def test_two_bos_are_refused(sentencepiece: Tokenizer) -> None:
    tokenizer = with_template(sentencepiece, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert render([{"role": "user", "content": "fox"}], tokenizer).ids[0] == tokenizer.bos_id
    with pytest.raises(TemplateError, match="two BOS") as refusal:
        render([{"role": "user", "content": "<s>fox"}], tokenizer)
    assert "'<s>'" in str(refusal.value.remedy)


# Masks that cannot be told


def test_a_template_that_rewrites_earlier_turns_is_refused(byte_level: Tokenizer) -> None:
    tokenizer = with_template(byte_level, REASONING)
    assert trained_text(tokenizer, render(TURNS[:2], tokenizer)).endswith(f"</think>\n\n{ANSWER['content']}<|im_end|>")
    with pytest.raises(TemplateError, match="differently once the conversation goes on") as refusal:
        render(TURNS, tokenizer)
    assert refusal.value.where == "messages[1]"
    # A prompt is not trained, so nothing stands in its way.
    assert not any(render(TURNS, tokenizer, add_generation_prompt=True).trained)


def test_a_generation_prompt_that_is_not_how_turns_begin_is_refused(byte_level: Tokenizer) -> None:
    tokenizer = with_template(
        byte_level, CHATML.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>bot\n' }}{% endif")
    )
    with pytest.raises(TemplateError, match="generation prompt"):
        render(TURNS, tokenizer)


def test_a_turn_without_a_stop_token_is_refused(byte_level: Tokenizer) -> None:
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    with pytest.raises(TemplateError, match="would never stop"):
        render(TURNS, with_template(byte_level, plain))
    blocks = (
        "{% for m in messages %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    )
    with pytest.raises(TemplateError, match="would never stop"):
        render(TURNS, with_template(byte_level, blocks))
    # A special token in the middle of an answer does not end it.
    middle = [USER, {"role": "assistant", "content": "a<|endoftext|>b"}]
    with pytest.raises(TemplateError, match="would never stop"):
        render(middle, with_template(byte_level, CHATML.replace("+ '<|im_end|>' ", "")))


@pytest.mark.parametrize("source", [CHATML, BLOCKS])
def test_a_token_across_the_border_is_refused(smollm2: Tokenizer, source: str) -> None:
    tokenizer = with_template(smollm2, source)
    with pytest.raises(TemplateError, match="reaches into") as refusal:
        render([USER, {"role": "assistant", "content": "\n\nfox"}], tokenizer)
    assert "white space" in str(refusal.value.remedy)
    # A word takes the space before it along, and a character may be cut into tokens: neither hides the border.
    source = source.replace("message['role'] + '\n'", "message['role'] + ': '").replace("assistant\n", "assistant: ")
    spaced = with_template(smollm2, source)
    for answer in ("fox", "👋"):
        with pytest.raises(TemplateError, match="reaches into"):
            render([USER, {"role": "assistant", "content": answer}], spaced)


def test_generation_blocks_that_are_changed_afterwards_are_refused(byte_level: Tokenizer) -> None:
    block = "{% generation %}{{ messages[1].content + '<|im_end|>' }}{% endgeneration %}"
    moved = with_template(byte_level, "{% macro say() %}" + block + "{% endmacro %}{{ messages[0].content + say() }}")
    assert trained_text(moved, render(TURNS[:2], moved)) == f"{ANSWER['content']}<|im_end|>"
    for use in ("{{ x[:3] }}", "{{ x | trim }}", "{{ x | length }}", "{{ x.split('<')[0] }}"):
        changed = with_template(byte_level, "{% set x %}" + block + "{% endset %}" + use)
        with pytest.raises(TemplateError, match="changes the text of its generation blocks"):
            render([USER, {"role": "assistant", "content": "  fox"}], changed)


# Templates


def test_a_model_without_a_template_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(TemplateError, match="no chat template") as refusal:
        render(TURNS, byte_level)
    assert refusal.value.remedy


def test_the_template_for_tools(byte_level: Tokenizer) -> None:
    tokenizer = with_template(byte_level, {"default": "plain", "tool_use": "{{ tools | length }} tools"})
    assert render([USER], tokenizer).text == "plain"
    assert render([USER], tokenizer, tools=[]).text == "plain"
    assert render([USER], tokenizer, tools=[{"type": "function"}]).text == "1 tools"


def test_only_known_variables_reach_a_template(chatml: Tokenizer) -> None:
    with pytest.raises(UnknownName, match="enable_thinkin") as refusal:
        render(TURNS, chatml, enable_thinkin=True)
    assert "enable_thinking" in str(refusal.value.remedy)
    with pytest.raises(UnknownName):
        render(TURNS, chatml, bos_token="x")
    with pytest.raises(UsageError, match="object cannot"):
        render(TURNS, chatml, date_string=object())


def test_dates_do_not_change_within_a_rendering(byte_level: Tokenizer) -> None:
    """A mask takes several renderings; midnight in between would spoil it."""
    tokenizer = with_template(byte_level, "{{ strftime_now('%f') }}" + CHATML)
    assert trained_text(tokenizer, render(TURNS, tokenizer)).endswith("lazy<|im_end|>")


# Messages


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ("hello", "messages"),
        ({"role": "user"}, "messages"),
        (None, "messages"),
        (5, "messages"),
        ([], "messages"),
        (["hello"], "messages[0]"),
        ([USER, None], "messages[1]"),
        ([{"content": "x"}], "messages[0]"),
        ([{"role": 5, "content": "x"}], "messages[0]"),
        ([USER, {"role": "asistant", "content": "x"}], "messages[1].role"),
        ([{"role": "user"}], "messages[0]"),
        ([USER, {"role": "assistant", "content": None}], "messages[1]"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0]"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {"text": "x"}}], "messages[0].content"),
        ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image"}]}], "messages[0].content[1]"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages[0].extra"),
        ([{"role": "user", "content": "x", 5: "y"}], "messages[0]"),
    ],
)
def test_bad_messages(chatml: Tokenizer, messages: Any, where: str) -> None:
    with pytest.raises(UsageError) as refusal:
        render(messages, chatml)
    assert refusal.value.where == where


def test_bad_tools_and_documents(chatml: Tokenizer) -> None:
    with pytest.raises(UsageError) as refusal:
        render(TURNS, chatml, tools=["weather"])  # type: ignore[list-item]
    assert refusal.value.where == "tools[0]"
    with pytest.raises(UsageError) as refusal:
        render(TURNS, chatml, documents={"title": "x"})  # type: ignore[arg-type]
    assert refusal.value.where == "documents"


def test_messages_nested_without_end(chatml: Tokenizer) -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UsageError, match="nested too deeply"):
        render([USER | {"extra": deep}], chatml)


def test_callers_keep_their_messages(chatml: Tokenizer) -> None:
    messages: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]
    before = repr(messages)
    render(messages, chatml)
    assert repr(messages) == before
