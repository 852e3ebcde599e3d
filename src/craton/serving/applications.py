"""Whole adaptations behind a name: the application's own prompt, passages and form of an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from craton.evaluation.items import Item
from craton.serving.conversation import Chat, Prepared
from craton.serving.errors import ApiError
from craton.serving.parsing import AnswerParser

if TYPE_CHECKING:
    from craton.compare.application import Application

# What an application has settled by measurement, and a request cannot change.
SETTLED = {
    "json_schema": "response_format",
    "regex": "guided_regex",
    "choices": "guided_choice",
    "grammar": "guided_grammar",
    "stop": "stop",
}


def prepare_application(application: Application, chat: Chat) -> Prepared:
    """Find the passages for the last question and write the prompt; call it in the worker's thread.

    Each question is answered for itself, as it was measured. Raises ApiError for what a request cannot change.
    """
    _check(chat)
    question = next((_text(m["content"]) for m in reversed(chat.messages) if m["role"] == "user"), None)
    if question is None:
        raise ApiError(400, "there is no question in the conversation", param="messages")
    item = Item("question", question, ("",), "question", fields={"input": question})
    prompted = application.prompted
    prompt = prompted.prompt
    ids, passages = prompted.read(item)
    if prompt.answer.scoring != "generate" or prompt.samples > 1 or prompt.reasoning:
        return Prepared(ids, {}, (AnswerParser(),), sources=tuple(passages), said=prompted(item).text)
    # Greedy where nothing else is asked for: so it was measured.
    sampling: dict[str, Any] = {"temperature": 0.0, **chat.sampling, **prompted.form}
    if "max_tokens" in chat.sampling and "choices" not in prompted.form:
        sampling["max_tokens"] = min(sampling["max_tokens"], chat.sampling["max_tokens"])
    return Prepared(ids, sampling, (AnswerParser(),), sources=tuple(passages))


def _check(chat: Chat) -> None:
    for name, field in SETTLED.items():
        if name in chat.sampling:
            raise ApiError(400, "an application answers in the form that it was measured in", param=field)
    if chat.sampling.get("n", 1) > 1:
        raise ApiError(400, "an application gives one answer", param="n")
    if chat.tools:
        raise ApiError(400, "an application calls no functions", param="tools")
    if chat.variables:
        raise ApiError(400, "an application has its own prompt", param="chat_template_kwargs")
    if any(message["role"] in ("system", "developer") for message in chat.messages):
        raise ApiError(400, "an application has its own prompt: a system message would not be read", param="messages")


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
