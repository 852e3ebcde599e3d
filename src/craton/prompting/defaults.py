"""The prompts that a task begins with, and the other ways of saying it that a search tries."""

from __future__ import annotations

from typing import Final, Literal

from craton.prompting.prompt import AnswerSettings, Prompt

Kind = Literal["choice", "answer"]

# The first of each is the default; the others say the same in other words, because small models hear words.
INSTRUCTIONS: Final[dict[str, tuple[str, ...]]] = {
    "choice": (
        "Sort the text into one of these classes: {{ choices | join(', ') }}. Answer with the class only.",
        "You label texts. Reply with the one label that fits.",
        "Which of these fits the text best? {{ choices | join(', ') }}",
    ),
    "answer": (
        "Answer the question as shortly as you can.",
        "Give only the answer: a name, a number or a few words. No sentence.",
        "You answer questions exactly and in as few words as possible.",
    ),
}
TEMPLATES: Final[dict[str, str]] = {
    "choice": "{{ input }}",
    "answer": "{{ input }}",
    "answer+passages": "{% if passages %}{{ context }}\n\nFrom the text above: {% endif %}{{ input }}",
    "choice+passages": "{% if passages %}{{ context }}\n\nText: {% endif %}{{ input }}",
}


def default_prompt(kind: Kind, instruction: str | None = None, *, passages: bool = False) -> Prompt:
    """The prompt for a choice or a short answer, from the question alone or from passages that are shown with it."""
    template = TEMPLATES[f"{kind}+passages" if passages else kind]
    system = instruction if instruction is not None else INSTRUCTIONS[kind][0]
    return Prompt(system=system, template=template, answer=AnswerSettings(max_tokens=32))


def instructions(kind: Kind, instruction: str | None = None) -> tuple[str, ...]:
    """The ways of saying what to do: the user's own first."""
    own = (instruction,) if instruction is not None else ()
    return tuple(dict.fromkeys([*own, *INSTRUCTIONS[kind]]))
