"""What guessing ahead is worth: Craton's engine with speculation beside itself without, on text that repeats and text
that does not.

Cases
    repeats/TASK/threads=T   tokens/s of an answer that says again much of its prompt: a passage to correct, code to
                             edit, a list to sort out, questions to answer by quoting
    free/TASK/threads=T      tokens/s of an answer with little to look up: a story, an explanation, a letter, verse;
                             also sampled (temperature 0.8) instead of greedy
    form/TASK/threads=T      tokens/s of an answer whose form leaves little choice: a long class name, an object
    batch/TASK/threads=T     tokens/s over eight answers that are written at once

How the figures are made
    One model (SmolLM2-135M-Instruct as published, 4-bit weights), loaded twice: with `speculate="ngram"`, the default,
    and with "off". Turns interleave; a turn reads the prompt and writes its answer of up to 160 tokens, and its figure
    is the tokens after the first over the time after it. The median of the rounds counts. Where the two texts differ
    (a near-tie that last bits decide), the settings say so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from harness import Case, Document, case, interleave, machine, parser, report

if TYPE_CHECKING:
    from craton.inference.model import Model

MODEL = "smollm2-135m-instruct"
OFF = "without speculation"
TOKENS = 160
BATCH = 8

PASSAGE = (
    "The Nile is a major river in northeastern Africa. It flow north into the Mediterranean Sea and is about 6,650 km "
    "long, which makes it one of the longest rivers in the world. Its drainage basin cover eleven countries. The Nile "
    "has two major tributaries, the White Nile and the Blue Nile. Most of the water come from the Blue Nile, which "
    "begins at Lake Tana in Ethiopia."
)
CODE = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    centre = mean(values)
    return mean([(value - centre) ** 2 for value in values])
"""
LIST = "\n".join(
    f"- {name}: {place}, {year}"
    for name, place, year in (
        ("Abdul Rahman", "Kuala Lumpur", 1957),
        ("Berta Lutz", "Rio de Janeiro", 1922),
        ("Chinua Achebe", "Ogidi", 1958),
        ("Dorothy Hodgkin", "Oxford", 1964),
        ("Enheduanna", "Ur", 1100),
        ("Forugh Farrokhzad", "Tehran", 1963),
    )
)

REPEATS = {
    "passage": f"Repeat this passage word for word:\n\n{PASSAGE}",
    "correct": f"Correct the grammar mistakes in this text and write the whole text again:\n\n{PASSAGE}",
    "code": f"Rewrite this Python code and add a docstring to each function:\n\n{CODE}",
    "list": f"Write this list again as a Markdown table:\n\n{LIST}",
    "quote": f"Which rivers flow into the Nile, and how long is it? Quote the sentences.\n\n{PASSAGE}",
}
FREE = {
    "story": "Tell me a story about a fisherman and his daughter.",
    "explain": "Explain how photosynthesis works.",
    "letter": "Write a letter to a friend about moving to a new city.",
    "verse": "Write a poem about the sea in winter.",
    "opinion": "What makes a good teacher?",
}
INTENTS = [
    "card_arrival",
    "card_not_working",
    "cash_withdrawal_not_recognised",
    "change_pin",
    "compromised_card",
    "contactless_not_working",
    "declined_transfer",
    "exchange_rate_is_wrong",
    "getting_a_virtual_card",
    "lost_or_stolen_phone",
    "passcode_forgotten",
    "pending_cash_withdrawal",
    "refund_not_showing_up",
    "transfer_not_received_by_recipient",
    "unable_to_verify_identity",
]
FIELDS = ("name_of_the_river", "length_in_kilometres", "flows_into", "main_tributaries")
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "class": (
        f"Of which class is this question: My money is not there yet, it says it was sent? {', '.join(INTENTS)}",
        {"choices": INTENTS},
    ),
    "object": (
        f"Describe the river as JSON.\n\n{PASSAGE}",
        {
            "json_schema": {
                "type": "object",
                "properties": {field: {"type": "string", "maxLength": 20} for field in FIELDS},
                "required": FIELDS,
                "additionalProperties": False,
            }
        },
    ),
}


@dataclass(frozen=True)
class Scope:
    """What a run measures."""

    repeats: Mapping[str, str]
    free: Mapping[str, str]
    temperatures: Sequence[float]
    threads: Sequence[int]
    rounds: int
    batch: bool


FULL = Scope(REPEATS, FREE, (0.0, 0.8), (1, 2), rounds=5, batch=True)
QUICK = Scope({k: REPEATS[k] for k in ("passage", "code")}, {"story": FREE["story"]}, (0.0,), (1,), 3, batch=False)


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parser(__doc__.partition("\n")[0]).parse_args()
    facts = machine(("craton", "torch"))
    report(Document(machine=facts, cases=measure(QUICK if arguments.quick else FULL)), arguments.json)


def measure(scope: Scope) -> dict[str, Case]:
    """All cases of the scope, by name."""
    import craton

    cases: dict[str, Case] = {}
    for threads in scope.threads:
        models = {
            "ngram": craton.load(MODEL, threads=threads),
            OFF: craton.load(MODEL, threads=threads, speculate="off"),
        }
        for name, prompt in scope.repeats.items():
            cases[f"repeats/{name}/threads={threads}"] = _case(models, prompt, 0.0, scope.rounds)
        for name, prompt in scope.free.items():
            for temperature in scope.temperatures:
                how = f"{name}-sampled" if temperature else name
                cases[f"free/{how}/threads={threads}"] = _case(models, prompt, temperature, scope.rounds)
        for name, (prompt, form) in FORMS.items():
            cases[f"form/{name}/threads={threads}"] = _case(models, prompt, 0.0, scope.rounds, form)
        if scope.batch:
            cases[f"batch/free/threads={threads}"] = _batch_case(models, list(FREE.values()), scope.rounds)
            cases[f"batch/repeats/threads={threads}"] = _batch_case(models, list(REPEATS.values()), scope.rounds)
    return cases


def _case(
    models: Mapping[str, Model], prompt: str, temperature: float, rounds: int, form: Mapping[str, Any] | None = None
) -> Case:
    texts: dict[str, str] = {}
    guesses: dict[str, str] = {}

    def turn(way: str) -> float:
        completion = models[way].chat(
            [{"role": "user", "content": prompt}], max_tokens=TOKENS, temperature=temperature, seed=1, **(form or {})
        )
        texts[way] = completion.text
        guesses[way] = f"{completion.accepted_tokens} of {completion.drafted_tokens} guesses right"
        return completion.tokens_per_second

    figures, _ = interleave(_turns(models, turn), rounds)
    same = "" if texts["ngram"] == texts[OFF] else "; the texts differ"
    return case(figures["ngram"], {OFF: figures[OFF]}, "tokens/s", settings={"Craton": guesses["ngram"] + same})


def _batch_case(models: Mapping[str, Model], prompts: Sequence[str], rounds: int) -> Case:
    from craton.inference.settings import SamplingSettings

    settings = SamplingSettings(max_tokens=TOKENS)

    def turn(way: str) -> float:
        model = models[way]
        chosen = [prompts[i % len(prompts)] for i in range(BATCH)]
        requests = [(model.render([{"role": "user", "content": p}]), settings) for p in chosen]
        started = time.perf_counter()
        tokens = sum(completion.completion_tokens for completion in model.generate_many(requests))
        return tokens / (time.perf_counter() - started)

    figures, _ = interleave(_turns(models, turn), rounds)
    return case(figures["ngram"], {OFF: figures[OFF]}, "tokens/s")


def _turns(models: Mapping[str, Model], turn: Callable[[str], float]) -> dict[str, Callable[[], float]]:
    return {way: partial(turn, way) for way in models}


if __name__ == "__main__":
    main()
