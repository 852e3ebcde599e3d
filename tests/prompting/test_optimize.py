"""The search for a prompt: what it may spend covers all that the model reads and writes."""

from __future__ import annotations

import pytest

from craton.evaluation.items import Item
from craton.evaluation.tasks import Sealed, Task
from craton.inference.model import load
from craton.prompting.answering import PromptedModel
from craton.prompting.defaults import default_prompt
from craton.prompting.optimize import optimize_prompt
from craton.prompting.prompt import AnswerSettings, Prompt
from craton.prompting.settings import OptimizeSettings

ITEMS = tuple(Item(str(i), f"the word number {i}", (("zim", "zam")[i % 2],), str(i)) for i in range(24))
TASK = Task("words", "choice", "accuracy", ITEMS[:12], ITEMS[12:], Sealed(()), choices=("zim", "zam"))


@pytest.fixture(scope="module")
def model(tiny_model):
    return load(tiny_model, threads=1)


@pytest.fixture
def spent(model, monkeypatch):
    """[kind, tokens] of every call that reaches the model, counted here once more."""
    calls = []
    generate, score = model.generate, model.score

    def spy_generate(ids, **sampling):
        found = generate(ids, **sampling)
        # Of a proposal, the settings tell: no answer is written at that temperature.
        kind = "proposal" if sampling.get("temperature") == 0.8 else "answer"
        calls.append((kind, len(ids) + sum(len(choice.tokens) for choice in found.choices)))
        return found

    def spy_score(pairs):
        assert len({tuple(context) for context, _ in pairs}) == 1
        calls.append(("score", len(pairs[0][0]) + sum(len(continuation) for _, continuation in pairs)))
        return score(pairs)

    monkeypatch.setattr(model, "generate", spy_generate)
    monkeypatch.setattr(model, "score", spy_score)
    return calls


def search(model, **settings):
    base = default_prompt("choice")
    return optimize_prompt(model, TASK, base, OptimizeSettings(trials=6, shots=(0, 2), **settings))


def test_everything_that_is_read_and_written_is_counted(model, spent):
    found = search(model, proposals=2)
    assert {kind for kind, _ in spent} == {"proposal", "answer", "score"}
    assert found.tokens == sum(tokens for _, tokens in spent)
    assert {trial.candidate.answer.scoring for trial in found.trials} >= {"likelihood", "calibrated"}


def test_a_budget_ends_at_the_answer_that_reaches_it(model, spent):
    found = search(model, proposals=2, token_budget=2500)
    assert found.stopped == "tokens"
    assert found.tokens == sum(tokens for _, tokens in spent) >= 2500
    # Without the last answer, which is one call or a calibrated one's four, there was something left.
    assert sum(tokens for _, tokens in spent[:-4]) < 2500


def test_proposals_are_paid_for_and_end_with_the_budget(model, spent):
    found = search(model, proposals=50, token_budget=300)
    proposals = [tokens for kind, tokens in spent if kind == "proposal"]
    assert sum(proposals[:-1]) < 300 <= sum(proposals)
    assert found.stopped == "tokens"
    assert len(found.best.rows) == 1  # a search has a best one, whatever was left for it


def test_the_clock_begins_before_the_proposals(model, spent):
    found = search(model, proposals=3, minutes=1e-9)
    assert [kind for kind, _ in spent] == ["answer"]
    assert found.stopped == "seconds"


@pytest.mark.parametrize(
    ("prompt", "calls"),
    [
        (Prompt(samples=3), 3),
        (Prompt(reasoning=True, reasoning_tokens=4), 2),
        (Prompt(samples=2, reasoning=True, reasoning_tokens=4), 4),
        (Prompt(answer=AnswerSettings(scoring="likelihood")), 1),
        (Prompt(answer=AnswerSettings(scoring="calibrated")), 4),  # and what it thinks of three blanks
    ],
)
def test_an_answer_counts_every_reading(model, spent, prompt, calls):
    answerer = PromptedModel(model, prompt, choices=("zim", "zam"))
    answer = answerer(ITEMS[0])
    assert len(spent) == calls
    assert answerer.spent == sum(tokens for _, tokens in spent) > answer.prompt_tokens + answer.completion_tokens
