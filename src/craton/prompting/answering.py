"""A model behind a prompt: items in, answers out, by writing under constraints or by scoring choices."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from craton.errors import ContextOverflow, UsageError
from craton.evaluation.items import Answer, Item
from craton.inference.conversations import conversation_ids, conversation_text, defused
from craton.inference.model import Completion, Model
from craton.prompting.examples import ExamplePool
from craton.prompting.meter import Meter
from craton.prompting.prompt import Prompt

# What stands for a question where calibration asks what a model thinks of the choices without one (Zhao et al. 2021).
NO_CONTENT: Final = ("N/A", "[MASK]", "")
REASON: Final = "Think step by step, briefly."
CONCLUDE: Final = "So the answer is:"


@dataclass(frozen=True)
class Passage:
    """A text that a model is shown, and the name that it is cited by."""

    name: str
    text: str


FindPassages = Callable[[Item], Sequence[Passage]]


class PromptedModel:
    """Answers items (an `Answerer`). choices: where the prompt's answer names none. pool: where examples come from.

    passages: finds what is shown beside the question. seed: of drawn answers.

    Raises UsageError for a prompt that this model or task cannot follow.
    """

    def __init__(
        self,
        model: Model,
        prompt: Prompt,
        *,
        choices: Sequence[str] = (),
        pool: ExamplePool | None = None,
        passages: FindPassages | None = None,
        seed: int = 0,
    ) -> None:
        plain = prompt.answer.regex or prompt.answer.json_schema
        self.model, self.prompt, self.seed = model, prompt, seed
        self._meter = Meter(model)
        self.choices = tuple(prompt.answer.choices or (() if plain else choices))
        self.pool, self._passages = pool, passages
        self._shown_with: dict[str, list[Passage]] = {}
        self._priors: np.ndarray[Any, Any] | None = None
        if prompt.answer.scoring != "generate" and not self.choices:
            raise UsageError("likelihoods are of choices, and this prompt has none", remedy="set answer.choices")
        if prompt.examples.count and pool is None:
            raise UsageError("the prompt shows examples, and there are none to choose from")

    def __call__(self, item: Item) -> Answer:
        """The answer to one item. Raises ContextOverflow where the prompt does not fit, even with fewer examples."""
        started = time.perf_counter()
        ids, passages = self.read(item)
        if self.prompt.answer.scoring == "generate":
            text, confidence, written = self._generate(ids)
        else:
            text, confidence = self._score(ids, item)
            written = 0
        seconds = time.perf_counter() - started
        return Answer(text, confidence, len(ids), written, seconds, tuple(passage.name for passage in passages))

    @property
    def spent(self) -> int:
        """The tokens that the model has read and written for all answers so far, and for what calibrates them: an
        answer's own `prompt_tokens` are its prompt's length, however often the prompt was read for it."""
        return self._meter.tokens

    def read(self, item: Item) -> tuple[list[int], list[Passage]]:
        """What the model reads to answer `item`: its tokens, and the passages that are in them. Where not all fits,
        the farthest examples go first, then the last passages."""
        ids, _, passages = self._fitting(item, *self._found(item))
        return ids, passages

    @property
    def form(self) -> dict[str, Any]:
        """The sampling settings that hold a written answer to its form."""
        answer = self.prompt.answer
        length = {"max_tokens": self._longest}
        if self.choices:
            return {"choices": self.choices, **length}
        if answer.json_schema is not None:
            return {"json_schema": answer.json_schema, **length}
        if answer.regex is not None:
            return {"regex": answer.regex, **length}
        return {"stop": answer.stop, **length}

    def conversation(self, item: Item) -> list[dict[str, str]]:
        """The messages that the model reads to answer `item`."""
        return self._fitting(item, *self._found(item))[1]

    def _found(self, item: Item) -> tuple[list[Item], list[Passage]]:
        passages = list(self._passages(item)) if self._passages else []
        return self.pool.choose(item, self.prompt.examples) if self.pool else [], passages

    def _messages(self, item: Item, examples: Sequence[Item], passages: Sequence[Passage]) -> list[dict[str, str]]:
        shown = [(self._variables(one, self._example_passages(one)), one.answers[0]) for one in examples]
        messages = self.prompt.messages(self._variables(item, passages), shown)
        if self.prompt.reasoning:
            messages[-1]["content"] += f"\n\n{REASON}"
        return messages

    def _example_passages(self, example: Item) -> Sequence[Passage]:
        if self._passages is None or not self.prompt.examples.passages:
            return ()
        if example.id not in self._shown_with:
            self._shown_with[example.id] = list(self._passages(example))[:1]
        return self._shown_with[example.id]

    @property
    def _plain(self) -> bool:
        return self.prompt.form == "text" or self.model.tokenizer.chat_template is None

    def tokens(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation as this prompt sends it."""
        if self._plain:
            return self.model.tokenizer.encode(conversation_text(messages))
        return conversation_ids(self.model, messages)

    def _variables(self, item: Item, passages: Sequence[Passage]) -> dict[str, Any]:
        tokenizer = self.model.tokenizer
        values: Mapping[str, Any] = {**item.fields, "input": item.input}
        safe: dict[str, Any] = {key: defused(value, tokenizer) for key, value in values.items()}
        return {**safe, "choices": self.choices, "passages": [defused(p.text, tokenizer) for p in passages]}

    def _fitting(
        self, item: Item, examples: list[Item], passages: list[Passage]
    ) -> tuple[list[int], list[dict[str, str]], list[Passage]]:
        # The farthest example stands first. Where nothing more can go, the question itself is too long.
        room = self.model.context - self._room()
        while True:
            messages = self._messages(item, examples, passages)
            ids = self.tokens(messages)
            if len(ids) <= room:
                return ids, messages, passages
            if examples:
                examples = examples[1:]
            elif passages:
                passages = passages[:-1]
            else:
                raise ContextOverflow(
                    f"the prompt has {len(ids)} tokens, and {room} are the most that leave room for an answer",
                    where=item.id,
                    remedy="shorten the input or the prompt, or choose a model with a longer context",
                )

    def _room(self) -> int:
        return self._longest + (self.prompt.reasoning_tokens + 16 if self.prompt.reasoning else 0)

    @cached_property
    def _longest(self) -> int:
        # A choice is written to its end, whatever the prompt says of lengths.
        return max([self.prompt.answer.max_tokens, *(len(self._choice_ids(c)) + 1 for c in self.choices)])

    def _generate(self, ids: list[int]) -> tuple[str, float | None, int]:
        prompt, written = self.prompt, 0
        if prompt.samples == 1:
            text, spent, logprob = self._one(ids, {})
            return text, logprob, spent
        answers = []
        for draw in range(prompt.samples):
            sampling = {"temperature": prompt.temperature, "seed": self.seed + draw}
            text, spent, _ = self._one(ids, sampling)
            answers.append(text)
            written += spent
        best, count = Counter(answers).most_common(1)[0]  # of equally frequent ones, the first
        return best, count / len(answers), written

    def _one(self, ids: list[int], sampling: Mapping[str, Any]) -> tuple[str, int, float | None]:
        """An answer, the tokens that were written for it, and the probability of it in the model's eyes."""
        prompt, spent = self.prompt, 0
        if prompt.reasoning:
            thought = self._meter.generate(ids, max_tokens=prompt.reasoning_tokens, stop=(CONCLUDE,), **sampling)
            spent += thought.completion_tokens
            said = [token.id for token in thought.choices[0].tokens]
            ids = [*ids, *said, *self.model.tokenizer.encode(f"\n{CONCLUDE} ", add_special_tokens=False)]
        completion: Completion = self._meter.generate(ids, logprobs=0, **self.form, **sampling)
        tokens = completion.choices[0].tokens
        logprob = sum(token.logprob for token in tokens if token.logprob is not None)
        return completion.text.strip(), spent + completion.completion_tokens, math.exp(logprob) if tokens else None

    def _score(self, ids: list[int], item: Item) -> tuple[str, float]:
        logprobs = self._logprobs(ids)
        if self.prompt.answer.scoring == "calibrated":
            if self._priors is None:
                blank = [Item("", text, ("",), "", fields=dict.fromkeys(item.fields, text)) for text in NO_CONTENT]
                examples = self.pool.choose(blank[0], self.prompt.examples) if self.pool else []
                asked = [self.tokens(self._messages(one, examples, ())) for one in blank]
                found = [self._logprobs(ids) for ids in asked]
                self._priors = np.logaddexp.reduce(np.array(found), axis=0) - math.log(len(found))
            logprobs = logprobs - self._priors
        probabilities = np.exp(logprobs - np.logaddexp.reduce(logprobs))
        best = int(probabilities.argmax())
        return self.choices[best], float(probabilities[best])

    def _logprobs(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """[choices] the log-probability that each choice, and then the end of the answer, follows."""
        tokenizer = self.model.tokenizer
        end = tokenizer.encode("\n", add_special_tokens=False) if self._plain else list(tokenizer.eos_ids[:1])
        return np.array(self._meter.logprobs(ids, [[*self._choice_ids(choice), *end] for choice in self.choices]))

    def _choice_ids(self, choice: str) -> list[int]:
        # Behind "Answer:" a word begins with its space, as in all text; an answer's turn begins with the word.
        return self.model.tokenizer.encode(f" {choice}" if self._plain else choice, add_special_tokens=False)
