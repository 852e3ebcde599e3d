"""How `craton serve` stands up to its clients, beside llama-cpp-python's server and `transformers serve`.

Cases
    throughput/clients=N       tokens of answers a second, over all clients
    first-token-p95/clients=N  seconds from sending a prompt to the answer's first text: 95 % wait no longer
    between-tokens-p95/...     seconds between two pieces of an answer's text, likewise
    prefix/first, prefix/later seconds to the first text behind a long common system prompt: of the first question, and
                               the median of the questions after it

How the figures are made
    One model (SmolLM2-135M-Instruct as published; for transformers, which has no packed weights, the same weights in
    bfloat16), the same prompts in the same order: docstrings of Python's library from a line to a page, greedy answers
    of at most 16 to 128 tokens. Each of N clients sends its next prompt when it has its answer (`craton bench serve`
    with rate 0). No prompt comes twice, so only what prompts share can be found in a cache.
    In every round each server is started, warmed, measured in all cases and stopped, in turns: it has the machine to
    itself, and its caches are empty. The figure is the median of the rounds. Craton guesses ahead, as it does for a
    user; llama-cpp-python's server answers one request at a time, and the others wait inside it.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from contenders.serve_process import craton, llama_cpp, transformers
from decode import MODEL, published_file
from harness import Case, ContenderError, Document, case, machine, parser, report

from craton.serving.load import Load, run_load

PACKAGES = ("craton", "torch", "transformers", "llama-cpp-python", "fastapi", "uvicorn")
OURS, HF, LLAMA = "Craton", "transformers serve", "llama_cpp.server"
MODULES = (
    *("argparse", "asyncio", "collections", "csv", "datetime", "decimal", "difflib", "email.message", "fractions"),
    *("heapq", "http.client", "inspect", "itertools", "json", "logging", "os", "pathlib", "pickle", "random", "re"),
    *("shutil", "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "tokenize", "urllib.parse"),
)
DOCSTRING_CHARS = (40, 2400)
QUESTIONS = ("Who is it for?", "What is missing?", "Which part is oldest?", "What would you add?", "How long is it?")
RESOLUTION = 1e-4  # seconds, of the load generator's report
UNITS = {"throughput": "tokens/s"}  # all others are seconds, and less is better


@dataclass(frozen=True)
class Scope:
    """What a run measures. clients: how many at once, each with its number of requests. answers: their longest lengths
    in tokens, in turn. system_chars: of the common prompt."""

    clients: Mapping[int, int]
    rounds: int
    answers: Sequence[int] = (16, 32, 64, 128)
    system_chars: int = 6000


FULL = Scope({1: 8, 4: 24, 16: 64, 64: 192}, rounds=3)
QUICK = Scope({1: 2, 4: 8}, rounds=1, answers=(8, 16), system_chars=2000)


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parser(__doc__.partition("\n")[0]).parse_args()
    facts = machine(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(QUICK if arguments.quick else FULL, Path(folder))
    report(Document(machine=facts, cases=cases), arguments.json)


def measure(scope: Scope, folder: Path) -> dict[str, Case]:
    """All cases of the scope, by name. `folder` takes the weights in their other form."""
    published, threads = published_file(MODEL), len(os.sched_getaffinity(0))
    servers = {
        OURS: craton(MODEL, threads),
        HF: transformers(published, folder),
        LLAMA: llama_cpp(published, threads),
    }
    figures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))  # case -> server -> rounds
    failed: dict[str, str] = {}
    asked = prompts(sum(scope.clients.values()) + 1)
    for turn in range(scope.rounds):
        for name, server in servers.items():
            if name in failed:
                continue
            print(f"round {turn + 1}: {name} ...", file=sys.stderr, flush=True)
            try:
                with server.running(threads) as url:
                    for which, figure in ask_all(url, server.model, scope, asked):
                        figures[which][name].append(figure)
            except ContenderError as error:
                if name == OURS:
                    raise
                failed[name] = str(error)
    return as_cases(figures, failed, {name: server.setting for name, server in servers.items()})


def ask_all(url: str, model: str, scope: Scope, asked: Sequence[str]) -> Iterator[tuple[str, float]]:
    """(case, figure) of one server's turn, as they come. asked: a prompt for each request and one more. Raises
    ContenderError where a request fails."""
    texts = iter(asked)
    _ask(url, Load([next(texts)], model, requests=1, rate=0, max_tokens=(4,)))  # warms what the first request warms
    for clients, requests in scope.clients.items():
        some = [next(texts) for _ in range(requests)]
        load = Load(some, model, requests, rate=0, clients=clients, max_tokens=scope.answers, temperature=0.0)
        said = _ask(url, load)
        yield f"throughput/clients={clients}", said["tokens_per_second"]
        yield f"first-token-p95/clients={clients}", _seconds(said, "first_token", "p95")
        yield f"between-tokens-p95/clients={clients}", _seconds(said, "between_tokens", "p95")
    system = "Answer in one sentence. The text:\n\n" + "\n\n".join(documentation())[: scope.system_chars]
    for name, questions in (("first", QUESTIONS[:1]), ("later", QUESTIONS[1:])):
        load = Load(questions, model, len(questions), 0, 1, max_tokens=(8,), system=system, temperature=0.0)
        yield f"prefix/{name}", _seconds(_ask(url, load), "first_token", "p50")


def as_cases(
    figures: Mapping[str, Mapping[str, Sequence[float]]], failed: Mapping[str, str], settings: Mapping[str, str]
) -> dict[str, Case]:
    """The medians as cases of the document; a server that failed before a case is absent from it."""
    cases = {}
    for which, by_server in figures.items():
        medians = {name: statistics.median(values) for name, values in by_server.items()}
        unit = UNITS.get(which.partition("/")[0], "s")
        cases[which] = case(
            medians[OURS],
            {name: value for name, value in medians.items() if name != OURS},
            unit,
            less_is_better=unit == "s",
            settings={name: settings[name] for name in medians},
            absent={name: reason for name, reason in failed.items() if name not in medians},
        )
    return cases


def prompts(count: int) -> list[str]:
    """Different questions about pieces of documentation, short and long ones mixed."""
    found = documentation()
    random.Random(0).shuffle(found)
    return [f"{text}\n\nExplain this in plain words." for text in found[:count]]


def documentation() -> list[str]:
    """The docstrings of MODULES' functions and classes, each once, in a fixed order."""
    found: dict[str, None] = {}
    for name in MODULES:
        for _, thing in sorted(vars(import_module(name)).items()):
            doc = inspect.getdoc(thing) if inspect.isroutine(thing) or inspect.isclass(thing) else None
            if doc is not None and DOCSTRING_CHARS[0] <= len(doc) <= DOCSTRING_CHARS[1]:
                found[doc] = None
    return list(found)


def _ask(url: str, load: Load) -> dict[str, Any]:
    said = asyncio.run(run_load(url, load))
    if said["errors"]:
        kind = next(iter(said["error_kinds"]))
        raise ContenderError(f"{said['errors']} of {said['requests']} requests failed: {kind}")
    return said


def _seconds(said: Mapping[str, Any], what: str, rank: str) -> float:
    value = said[f"{what}_seconds"][rank]
    if value is None:
        raise ContenderError("the answers have too little text to be timed")
    return max(float(value), RESOLUTION)


if __name__ == "__main__":
    main()
