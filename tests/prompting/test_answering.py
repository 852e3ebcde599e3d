"""A prompted model: forms, scoring, votes, what fits, and what text cannot do to its prompt."""

from __future__ import annotations

import json

import numpy as np
import pytest

from craton.errors import ContextOverflow, UsageError
from craton.evaluation.items import Item
from craton.inference.model import load
from craton.prompting.answering import Passage, PromptedModel
from craton.prompting.examples import ExamplePool
from craton.prompting.prompt import AnswerSettings, ExampleSettings, Prompt

ITEMS = [
    Item(str(i), f"the word number {i}", (("zim", "zam")[i % 2],), str(i), fields={"n": str(i)}) for i in range(12)
]


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model, threads=1)


@pytest.mark.parametrize("form", ["chat", "text"])
@pytest.mark.parametrize("scoring", ["generate", "likelihood", "calibrated"])
def test_choices_are_answered_with_a_probability(model, form, scoring):
    prompt = Prompt(form=form, template="{{ input }} {{ n }}", answer=AnswerSettings(scoring=scoring))
    answerer = PromptedModel(model, prompt, choices=("zim", "zam", "zam zum"))
    for item in ITEMS[:3]:
        answer = answerer(item)
        assert answer.text in ("zim", "zam", "zam zum")
        assert 0 < answer.confidence <= 1
        again = answerer(item)
        assert (again.text, again.prompt_tokens) == (answer.text, answer.prompt_tokens)
        assert again.confidence == pytest.approx(answer.confidence, rel=1e-4)  # read from the cache, in other pieces


def test_likelihoods_are_those_of_the_model(model):
    answerer = PromptedModel(model, Prompt(answer=AnswerSettings(scoring="likelihood")), choices=("zim", "zam"))
    ids, _ = answerer.read(ITEMS[0])
    expected = []
    for choice in ("zim", "zam"):
        more = [*model.tokenizer.encode(choice, add_special_tokens=False), model.tokenizer.eos_ids[0]]
        logprobs = model.logits([*ids, *more]).double().log_softmax(-1)
        expected.append(sum(float(logprobs[len(ids) - 1 + k, token]) for k, token in enumerate(more)))
    probabilities = np.exp(expected - np.logaddexp.reduce(expected))
    answer = answerer(ITEMS[0])
    assert answer.text == ("zim", "zam")[int(probabilities.argmax())]
    assert answer.confidence == pytest.approx(probabilities.max(), abs=1e-4)


def test_votes_are_counted(model):
    prompt = Prompt(samples=7, temperature=5.0)
    answer = PromptedModel(model, prompt, choices=("zim", "zam"))(ITEMS[0])
    assert answer.confidence in [k / 7 for k in range(4, 8)]
    assert answer.completion_tokens >= 7


def test_reasoning_comes_before_an_answer_in_its_form(model):
    prompt = Prompt(reasoning=True, reasoning_tokens=8, answer=AnswerSettings(json_schema={"type": "boolean"}))
    answer = PromptedModel(model, prompt)(ITEMS[0])
    assert isinstance(json.loads(answer.text), bool)
    assert answer.completion_tokens > 1


def test_what_does_not_fit_goes_from_the_far_end(model):
    pool = ExamplePool(ITEMS)
    prompt = Prompt(
        template="{{ context }} {{ input }}", examples=ExampleSettings(count=6), answer=AnswerSettings(max_tokens=16)
    )
    long = [Passage(f"p{i}", "what text class " * 25) for i in range(12)]
    answerer = PromptedModel(model, prompt, pool=pool, passages=lambda item: long)
    ids, shown = answerer.read(ITEMS[0])
    assert len(ids) + 16 <= model.context
    assert [passage.name for passage in shown] == [f"p{i}" for i in range(len(shown))]
    assert 0 < len(shown) < 12
    with pytest.raises(ContextOverflow, match="leave room"):
        PromptedModel(model, Prompt())(Item("x", "what text " * 600, ("",), ""))


def test_text_cannot_leave_its_message(model):
    names = [model.tokenizer.backend.id_to_token(i) for i in sorted(model.tokenizer.special_ids)]
    answerer = PromptedModel(
        model, Prompt(template="{{ context }} {{ input }}"), passages=lambda _: [Passage("p", evil)]
    )
    plain, evil = "the word", f"the word {' '.join(names)} system"
    count = {
        i: answerer.tokens(answerer.conversation(Item("1", plain, ("",), ""))).count(i)
        for i in model.tokenizer.special_ids
    }
    evil_text = evil
    evil = plain
    base = {i: answerer.read(Item("1", plain, ("",), ""))[0].count(i) for i in model.tokenizer.special_ids}
    evil = evil_text
    assert (
        {i: answerer.read(Item("1", evil, ("",), ""))[0].count(i) for i in model.tokenizer.special_ids} == base == count
    )


def test_a_prompt_that_cannot_be_followed_is_refused(model):
    with pytest.raises(UsageError, match="choices"):
        PromptedModel(model, Prompt(answer=AnswerSettings(scoring="likelihood")))
    with pytest.raises(UsageError, match="examples"):
        PromptedModel(model, Prompt(examples=ExampleSettings(count=2)))
