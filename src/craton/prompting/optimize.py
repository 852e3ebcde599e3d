"""The search for a better prompt: instructions, examples, scoring and reasoning, by a development split only."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np

from craton.evaluation.items import Item
from craton.evaluation.tasks import Task
from craton.inference.conversations import conversation_ids, defused
from craton.inference.model import Model
from craton.prompting.answering import PromptedModel
from craton.prompting.defaults import instructions
from craton.prompting.examples import Embed, ExamplePool
from craton.prompting.meter import Meter
from craton.prompting.prompt import ExampleSettings, Prompt
from craton.prompting.search import Budget, Search, successive_halving
from craton.prompting.settings import OptimizeSettings

PROPOSAL_EXAMPLES: Final = 4
FORMS: Final[tuple[Literal["chat", "text"], ...]] = ("chat", "text")


def optimize_prompt(
    model: Model,
    task: Task,
    base: Prompt,
    settings: OptimizeSettings,
    *,
    embed: Embed | None = None,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> Search[Prompt]:
    """Search around `base`, the first candidate, on the task's training and development items. What is found is to be
    reported on test items, which this search is never given."""
    budget = Budget(settings.token_budget, None if settings.minutes is None else 60 * settings.minutes)
    pool = ExamplePool(task.train, embed)
    proposed = propose_instructions(model, task, settings.proposals, settings.seed, budget)
    candidates = prompt_candidates(task, base, settings, proposed, similar=embed is not None)

    def make(prompt: Prompt) -> PromptedModel:
        return PromptedModel(model, prompt, choices=task.choices, pool=pool, seed=settings.seed)

    return successive_halving(
        candidates, make, task.dev, task.metric, budget=budget, seed=settings.seed, on_progress=on_progress
    )


def prompt_candidates(
    task: Task, base: Prompt, settings: OptimizeSettings, proposed: Sequence[str], *, similar: bool
) -> list[Prompt]:
    """`base`, then `trials` - 1 others drawn from the grid, each value of each dimension about equally often."""
    said = [base.system, *(i for i in instructions(task.kind, task.instruction) if i != base.system), *proposed]
    shots = [count for count in settings.shots if count <= len(task.train)] or [0]
    chooses = ("similar", "diverse", "random") if similar else ("random",)
    shown = [
        ExampleSettings(count=count, choose=choose, seed=settings.seed)
        for count in shots
        for choose in (chooses if count else ("random",))
    ]
    scorings = ("generate", "likelihood", "calibrated") if task.kind == "choice" else ("generate",)
    thoughts = (False, True) if settings.reasoning else (False,)
    grid = [
        base.model_copy(
            update={
                "form": form,
                "system": system,
                "examples": examples,
                "answer": base.answer.model_copy(update={"scoring": scoring}),
                "reasoning": thought,
            }
        )
        for form, system, examples, scoring, thought in itertools.product(FORMS, said, shown, scorings, thoughts)
        if not (thought and scoring != "generate")
    ]
    rng = np.random.default_rng(settings.seed)
    rest = [grid[i] for i in rng.permutation(len(grid)).tolist() if grid[i].digest != base.digest]
    return [base, *_spread(rest, settings.trials - 1)]


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    # The next one is the first whose values were used least: with few trials, no dimension is left out by chance.
    used: dict[tuple[str, object], int] = {}
    chosen: list[Prompt] = []
    left = list(prompts)
    while left and len(chosen) < count:
        best = min(left, key=lambda prompt: sum(used.get(value, 0) for value in _values(prompt)))
        left.remove(best)
        chosen.append(best)
        for value in _values(best):
            used[value] = used.get(value, 0) + 1
    return chosen


def _values(prompt: Prompt) -> list[tuple[str, object]]:
    return [
        ("form", prompt.form),
        ("system", prompt.system),
        ("examples", (prompt.examples.count, prompt.examples.choose)),
        ("scoring", prompt.answer.scoring),
        ("reasoning", prompt.reasoning),
    ]


def propose_instructions(model: Model, task: Task, count: int, seed: int, budget: Budget) -> list[str]:
    """Instructions that the model writes itself from a few training examples (Zhou et al. 2023, APE), as plain text;
    at most `count`, and none once the budget, which pays for them, is used up."""
    pool = ExamplePool(task.train)
    found: list[str] = []
    for number in range(count if task.train else 0):
        if budget.exceeded is not None:
            break
        shown = pool.choose(Item("", "", ("",), ""), ExampleSettings(count=PROPOSAL_EXAMPLES, seed=seed + number))
        pairs = "\n\n".join(f"Input: {one.input}\nOutput: {one.answers[0]}" for one in shown)
        asked = f"{pairs}\n\nWrite one sentence that tells somebody how to turn each input into its output."
        ids = conversation_ids(model, [{"role": "user", "content": defused(asked, model.tokenizer)}])
        meter = Meter(model)
        said = meter.generate(ids, max_tokens=48, temperature=0.8, seed=seed + number, stop=("\n",)).text.strip()
        budget.spend(meter.tokens)
        # A sentence that reads as a template would be run as one.
        if said and "{{" not in said and "{%" not in said and "{#" not in said:
            found.append(said)
    return found
