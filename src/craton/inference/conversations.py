"""What is safe and sound to send to a model that a program asks: conversations for any model, texts of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from craton.inference.model import Model
from craton.modalities.text import Tokenizer


def conversation_ids(model: Model, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """A conversation as tokens, the answer due next: by the model's chat template, or by `conversation_text` where
    there is none."""
    if model.tokenizer.chat_template is not None:
        return model.render(messages)
    return model.tokenizer.encode(conversation_text(messages))


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation for a model that has no chat template: texts with blank lines between them, "Answer:" behind each
    question, nothing behind the last."""
    text = ""
    for message in messages:
        match message["role"]:
            case "assistant":
                text += f" {message['content']}\n\n"
            case "user":
                text += f"{message['content']}\nAnswer:"
            case _:
                text += f"{message['content']}\n\n"
    return text


def defused(text: str, tokenizer: Tokenizer) -> str:
    """The text with the names of special tokens broken up by a space: what a user or a document writes must not end
    its message and begin another."""
    for token in map(tokenizer.backend.id_to_token, sorted(tokenizer.special_ids)):
        if token and token in text:
            text = text.replace(token, f"{token[:1]} {token[1:]}")
    return text
