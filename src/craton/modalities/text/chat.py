"""The one renderer: from a conversation to text, token ids and the tokens to train on.

Training, evaluation and serving all pass through `render`, so that a model never sees at work a format that it was not
trained on. The text is, byte for byte, what the checkpoint's own Jinja template gives in transformers.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from craton.errors import TemplateError, UnknownName
from craton.modalities.text import template_limits as limits
from craton.modalities.text.chat_mask import Span, block_mask, turn_mask
from craton.modalities.text.messages import Message, check_messages, check_objects, plain
from craton.modalities.text.template_sandbox import compile_template, render_template
from craton.modalities.text.tokenizer import Tokenizer

# Variables beside messages, tools and documents that published templates read, and that a caller may set.
TEMPLATE_VARIABLES = frozenset(
    {
        "builtin_tools",
        "clear_thinking",
        "controls",
        "custom_tools",
        "date_string",
        "enable_thinking",
        "keep_past_thinking",
        "model_identity",
        "preserve_thinking",
        "python_tools",
        "reasoning_effort",
        "thinking",
        "tools_in_user_message",
        "xml_tools",
    }
)


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model reads it. ids and trained have one entry for each token.

    trained: True for what the assistant says, up to and including the token that ends its turn.
    """

    text: str
    ids: list[int]
    trained: list[bool]


def render(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> Rendered:
    """Renders a conversation with the model's own chat template and tokenises it.

    add_generation_prompt: end with the beginning of an assistant's turn, for the model to go on; such a prompt trains
    nothing. variables: any of TEMPLATE_VARIABLES.

    No token is added to what the template writes, so BOS is there if and only if the template writes it. Raises
    TemplateError if there is no template, if it fails or refuses the messages, if the text begins with two BOS, or if
    the trained tokens cannot be told for certain; UsageError for malformed messages.
    """
    template = ChatTemplate.of(tokenizer, with_tools=bool(tools))
    return template.render(
        messages,
        tokenizer,
        tools=tools,
        documents=documents,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )


class ChatTemplate:
    """A chat template, compiled. special_tokens: variables such as {"bos_token": "<s>"}."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._compiled = compile_template(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, with_tools: bool = False) -> ChatTemplate:
        """The model's own template (the one for tools, if it has a separate one and tools are used)."""
        source = tokenizer.chat_template
        if with_tools:
            source = tokenizer.chat_templates.get("tool_use", source)
        if source is None:
            raise TemplateError(
                "this model has no chat template",
                where="tokenizer",
                remedy="use a model made for chat, prompt this one with plain text, or choose a template for it "
                "(it must then be trained with that template)",
            )
        return cls(source, tokenizer.special_tokens)

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text of a conversation. Raises as `render` does."""
        chat = self._chat(messages, tools, documents, variables)
        return chat.text(chat.messages, add_generation_prompt)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> Rendered:
        """The text, ids and trained tokens of a conversation; see the function `render`."""
        chat = self._chat(messages, tools, documents, variables)
        text = chat.text(chat.messages, add_generation_prompt)
        ids, offsets = tokenizer.encode_with_offsets(text)
        if tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2:
            raise TemplateError(
                "the rendered conversation begins with two BOS tokens",
                where="chat template",
                remedy=f"take {tokenizer.special_tokens['bos_token']!r} out of the first message",
            )
        ends = tokenizer.special_ids.union(tokenizer.eos_ids)
        assistant_turns = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        if add_generation_prompt or not assistant_turns:
            trained = [False] * len(ids)
        elif self._compiled.marks_turns:
            trained = block_mask(text, ids, offsets, chat.generation_blocks(text), ends)
        else:
            spans = [chat.turn_span(i, text) for i in assistant_turns]
            trained = turn_mask(text, ids, offsets, spans, ends)
        return Rendered(text, ids, trained)

    def _chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> _Chat:
        for name in variables:
            if name not in TEMPLATE_VARIABLES:
                raise UnknownName("template variable", name, TEMPLATE_VARIABLES)
        fixed = {
            **self._special_tokens,
            **plain(variables, "template variables"),
            "tools": check_objects(tools, "tools"),
            "documents": check_objects(documents, "documents"),
        }
        return _Chat(self._compiled.template, check_messages(messages, keep_parts=self._compiled.takes_parts), fixed)


class _Chat:
    """One conversation with one template: whole, in part, or with its generation blocks marked."""

    def __init__(self, template: Any, messages: list[Message], variables: Mapping[str, Any]) -> None:
        self.messages = messages
        self._template = template
        self._variables = variables
        self._now = datetime.datetime.now()  # one date for all renderings of this conversation

    def text(self, messages: list[Message], add_generation_prompt: bool, marks: tuple[str, str] | None = None) -> str:
        values = {**self._variables, "messages": messages, "add_generation_prompt": add_generation_prompt}
        with limits.rendering(values, marks=marks, now=self._now):
            return render_template(self._template, values)

    def turn_span(self, index: int, text: str) -> Span:
        """Where the assistant's turn `messages[index]` stands in the whole text.

        The conversation before the turn, ready for an answer, must begin the one after it, and that the whole: only
        then is what lies between the answer. Templates that rewrite earlier turns break this.
        """
        before = self.text(self.messages[:index], add_generation_prompt=True)
        after = self.text(self.messages[: index + 1], add_generation_prompt=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise TemplateError(
                "the chat template renders an assistant's turn differently once the conversation goes on, or does not "
                "begin it with its generation prompt, so the tokens to train on cannot be told",
                where=f"messages[{index}]",
                remedy="train on conversations whose only assistant turn is the last, or use a template with "
                "{% generation %} blocks",
            )
        return Span(len(before), len(after), f"messages[{index}]")

    def generation_blocks(self, text: str) -> list[Span]:
        """Where the template's `{% generation %}` blocks stand in the whole text.

        The blocks are printed with marks around them, which must then be all that differs from the text.
        """
        marks = _absent_characters(text)
        marked = self.text(self.messages, add_generation_prompt=False, marks=marks)
        spans, position = [], 0
        before, *blocks = marked.split(marks[0])
        position = len(before)
        for i, block in enumerate(blocks):
            inside, _, outside = block.partition(marks[1])
            spans.append(Span(position, position + len(inside), f"generation block {i}"))
            position += len(inside) + len(outside)
        plain_text = marked.replace(marks[0], "").replace(marks[1], "")
        if plain_text != text or marked.count(marks[0]) != marked.count(marks[1]):
            raise TemplateError(
                "the chat template changes the text of its generation blocks, so the tokens to train on cannot be told",
                where="chat template",
                remedy="print {% generation %} blocks as they are, outside macros and filters",
            )
        return spans


def _absent_characters(text: str) -> tuple[str, str]:
    """Two private-use characters that the text does not contain."""
    present = set(text)
    absent = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in present)
    return next(absent), next(absent)
