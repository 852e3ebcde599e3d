"""How fast Craton writes, beside transformers and llama.cpp, from the same weights on the same machine in the same run.

Cases
    decode/KIND/batch=B/threads=T/prompt=P   tokens/s over all B sequences, after a prompt of P tokens
    busy/KIND/programs=N                     ms a token at batch 1 with 2 threads beside N other programs that compute
                                             without a pause; limit: 1.5 x the same step on one thread, beside
                                             nothing (N = 1) or beside them (N > 1: one thread waits, too)
    memory/KIND                              peak memory in MB of a process that loads the model, reads 512 tokens and
                                             writes 16; limit: 1.3 x the weights + 300 MB
    start/help                               seconds of `craton --help`
    start/first_token                        seconds from the start of `craton generate` to the first text, files cached

KIND is the form of the weights: q4_1 (SmolLM2-135M-Instruct as published, embedding and head in 8 bits), and the same
weights rewritten as q4_0, q8_0 and bf16. Craton and llama.cpp read the same GGUF file. transformers has no packed
weights, and its work does not depend on the kind: it runs the dequantised weights in fp32 and in bf16, and its better
figure stands beside every kind. 1b-q4_0 is a model of Llama-3.2-1B's shape with random weights in 4 bits, in a GGUF
file that Craton and llama.cpp read: there the memory's speed decides, not what happens between two reads.

How the figures are made
    Every contender is a process of its own, loaded once and driven one at a time. A decode turn goes back to the
    prompt, writes 4 tokens to warm up and then 32 (8 each in a batch of 8, 4 in one of 16)
    against the clock. Turns interleave
    (A B C A B C ...); the figure is the median of the rounds. Craton runs through its engine, so its figures include
    choosing the token and making text of it; the peers run their bare forward pass, which is their best case:
    transformers without `generate`, choosing the likeliest token; llama.cpp without a sampler.
    A compiled transformers model with a static cache is left out: measured once, with one thread and a batch of 1, it
    wrote 1.2 x the tokens of the plain one after 58 seconds of compiling, which every new shape costs again.
    limit is what reading allows: the bandwidth of this machine, measured at the weights' own size with the same number
    of threads, over the bytes of weights and of Craton's cache that a token needs. A batch reads the weights once.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from contenders.worker import BENCHMARKS, WARMUP_STEPS, Worker, environment
from harness import Case, ContenderError, Document, case, interleave, machine, parser, read_bandwidth, report

from craton.errors import UsageError

PACKAGES = ("craton", "torch", "transformers", "llama-cpp-python")
MODEL = "smollm2-135m-instruct"
AS_PUBLISHED = "q4_1"  # the kind of its file; the others are made from it
PROMPT = "The three laws of motion are"
OURS, HF, LLAMA = "Craton", "transformers", "llama.cpp"
HF_DTYPES = ("bfloat16", "float32")

Key = tuple[str, str]  # (name, variant): Craton and llama.cpp in each kind, transformers in each dtype


@dataclass(frozen=True)
class Scope:
    """What a run measures. steps: how many a decode turn times, for each batch size."""

    kinds: tuple[str, ...]
    prompts: tuple[int, ...]
    rounds: int
    steps: Mapping[int, int]
    processes: bool  # the cases of whole processes: memory and start
    threads: tuple[int, ...] = (1, 2)
    large: str | None = None  # the form of the random model of a billion weights


FULL = Scope(
    (AS_PUBLISHED, "q4_0", "q8_0", "bf16"),
    (32, 512),
    rounds=7,
    steps={1: 32, 8: 8, 16: 4},
    processes=True,
    large="q4_0",
)
QUICK = Scope((AS_PUBLISHED, "bf16"), (32,), rounds=3, steps={1: 12, 8: 4}, processes=False)


class Race:
    """The contenders, each in its worker. One that fails is out for the rest of the run; Craton's failure ends it."""

    def __init__(self, workers: Mapping[Key, Worker]) -> None:
        self._workers = workers
        self._failed: dict[Key, str] = {}
        self.facts: dict[Key, dict[str, Any]] = {}
        for key, worker in workers.items():
            try:
                self.facts[key] = worker.facts()
            except ContenderError as error:
                self._fail(key, str(error))

    def run(self, what: str, rounds: int, **arguments: int) -> dict[Key, float]:
        """The medians of interleaved turns of one of `Session`'s methods."""
        turns = {k: partial(w.ask, what, **arguments) for k, w in self._workers.items() if k not in self._failed}
        medians, failed = interleave(turns, rounds)
        for key, reason in failed.items():
            self._fail(key, reason)
        return medians

    def case(
        self,
        figures: Mapping[Key, float],
        kind: str,
        unit: str,
        limit: float | None = None,
        *,
        less_is_better: bool = False,
    ) -> Case:
        """Craton in this kind beside llama.cpp in it and transformers at its best."""
        best = min if less_is_better else max
        rivals = {HF: [key for key in figures if key[0] == HF], LLAMA: [key for key in figures if key == (LLAMA, kind)]}
        chosen = {name: best(keys, key=figures.__getitem__) for name, keys in rivals.items() if keys}
        absent = {name: reason for (name, variant), reason in self._failed.items() if variant in (kind, *HF_DTYPES)}
        return case(
            figures[OURS, kind],
            {name: figures[key] for name, key in chosen.items()},
            unit,
            less_is_better=less_is_better,
            limit=limit,
            settings={name: self.facts[key]["setting"] for name, key in {OURS: (OURS, kind), **chosen}.items()},
            absent={name: reason for name, reason in absent.items() if name not in chosen},
        )

    def _fail(self, key: Key, reason: str) -> None:
        if key[0] == OURS:
            raise ContenderError(f"{' '.join(key)}: {reason}")
        self._failed[key] = reason


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument(
        "--model", default=MODEL, metavar="NAME|PATH", help="a Q4_1 GGUF model of the store, or its file"
    )
    arguments = flags.parse_args()
    facts = machine(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(published_file(arguments.model), QUICK if arguments.quick else FULL, Path(folder))
    report(Document(machine=facts, cases=cases), arguments.json)


def published_file(name: str) -> Path:
    """The GGUF file of a stored model or a path. Raises UsageError if its weights are not of the kind AS_PUBLISHED."""
    from craton.checkpoints.checkpoint import Checkpoint
    from craton.store import find

    path = find(name).path
    if AS_PUBLISHED.upper() not in Checkpoint.open(path).quantized_kinds():
        raise UsageError(
            f"{name} is not a {AS_PUBLISHED.upper()} GGUF model", remedy=f"leave out --model: {MODEL} is one"
        )
    return path


def measure(published: Path, scope: Scope, folder: Path) -> dict[str, Case]:
    """All cases of the scope, by name. `folder` takes the weights in their other forms."""
    from contenders.weights import plain_folder

    plain = plain_folder(published, folder)
    cases: dict[str, Case] = {}
    with ExitStack() as stack:
        race = line_up(stack, published, plain, scope, folder)
        if scope.processes:
            cases |= memory_cases(race, scope)  # first: nothing else has made the processes grow
        cases |= speed_cases(race, scope)
        if scope.processes:
            cases |= busy_cases(race, scope.rounds)
    if scope.large is not None:
        cases |= large_cases(published, scope, scope.large, folder)
    if scope.processes:
        cases |= start_cases(published, plain)
    order = ("decode", "busy", "memory", "start")
    return dict(sorted(cases.items(), key=lambda item: order.index(item[0].partition("/")[0])))


def line_up(stack: ExitStack, published: Path, plain: Path, scope: Scope, folder: Path) -> Race:
    """Every contender with the same weights, those of the file `published`; they end with the stack."""
    from contenders.weights import rewritten

    files = rewritten(published, [kind for kind in scope.kinds if kind != AS_PUBLISHED], folder)
    files[AS_PUBLISHED] = published

    def worker(module: str, **settings: Any) -> Worker:
        return stack.enter_context(Worker(module, **settings))

    workers = {(OURS, k): worker("craton_engine", path=str(files[k]), threads=scope.threads[-1]) for k in scope.kinds}
    workers |= {(HF, dtype): worker("transformers_model", path=str(plain), dtype=dtype) for dtype in HF_DTYPES}
    workers |= {(LLAMA, k): worker("llama_cpp_model", path=str(files[k])) for k in scope.kinds}
    return Race(workers)


def speed_cases(race: Race, scope: Scope) -> dict[str, Case]:
    """Decoding, in tokens per second."""
    cases = {}
    for threads in scope.threads:
        bandwidth = {k: read_bandwidth(race.facts[OURS, k]["weight_bytes"], threads) for k in scope.kinds}
        for length in scope.prompts:
            for batch, steps in scope.steps.items():
                setting = f"batch={batch}/threads={threads}/prompt={length}"
                print(f"{setting} ...", file=sys.stderr, flush=True)
                race.run("read", 1, threads=threads, batch=batch, length=length)  # to be continued
                written = race.run("decode", scope.rounds, steps=steps)
                for kind in scope.kinds:
                    facts = race.facts[OURS, kind]
                    seen = length + WARMUP_STEPS + steps / 2  # tokens before the middle one of a turn
                    needed = facts["weight_bytes"] / batch + facts["cache_bytes_per_token"] * seen
                    cases[f"decode/{kind}/{setting}"] = race.case(written, kind, "tokens/s", bandwidth[kind] / needed)
    return cases


def large_cases(published: Path, scope: Scope, form: str, folder: Path) -> dict[str, Case]:
    """The speed of a model of a billion random weights, beside llama.cpp alone."""
    from contenders.weights import random_file

    kind = f"1b-{form}"
    path = str(random_file(published, form, folder))
    with (
        Worker("craton_engine", path=path, threads=scope.threads[-1]) as ours,
        Worker("llama_cpp_model", path=path) as llama,
    ):
        race = Race({(OURS, kind): ours, (LLAMA, kind): llama})
        return speed_cases(race, replace(scope, kinds=(kind,), prompts=scope.prompts[:1], rounds=3, steps={1: 8}))


def busy_cases(race: Race, rounds: int) -> dict[str, Case]:
    """The time of a step where other programs want the processors, too."""
    kind, cores = AS_PUBLISHED, machine(())["cores"]
    cases = {}
    for programs in sorted({1, cores}):
        print(f"busy, {programs} other programs ...", file=sys.stderr, flush=True)
        times: dict[tuple[int, int], dict[Key, float]] = {}  # by (threads, programs)
        for threads, beside in ((1, 0), (1, programs), (2, programs)):
            with ExitStack() as stack:
                for _ in range(beside):
                    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    stack.callback(spinning.wait)
                    stack.callback(spinning.kill)
                race.run("read", 1, threads=threads, batch=1, length=32)
                speeds = race.run("decode", rounds, steps=32)
            times[threads, beside] = {key: 1000 / speed for key, speed in speeds.items()}
        found = race.case(
            times[2, programs],
            kind,
            "ms",
            1.5 * times[1, 0 if programs == 1 else programs][OURS, kind],
            less_is_better=True,
        )
        found["settings"] = found.get("settings", {}) | {
            OURS: f"one thread alone {times[1, 0][OURS, kind]:.1f} ms, beside them {times[1, programs][OURS, kind]:.1f}"
        }
        cases[f"busy/{kind}/programs={programs}"] = found
    return cases


def memory_cases(race: Race, scope: Scope) -> dict[str, Case]:
    """Peak memory of one conversation."""
    figures = race.run("memory", 1, threads=scope.threads[-1])
    limits = {kind: 1.3 * race.facts[OURS, kind]["weight_bytes"] / 1e6 + 300 for kind in scope.kinds}
    return {f"memory/{k}": race.case(figures, k, "MB", limits[k], less_is_better=True) for k in scope.kinds}


def start_cases(published: Path, plain: Path) -> dict[str, Case]:
    """How long a user waits for the help text, and for the first text of an answer."""
    craton = str(Path(sys.executable).with_name("craton"))
    python = [sys.executable, "-m"]
    commands = {
        OURS: [craton, "generate", PROMPT, "--model", str(published), "--max-tokens", "8"],
        HF: [*python, "contenders.transformers_answer", str(plain), PROMPT],
        LLAMA: [*python, "contenders.llama_cpp_answer", str(published), PROMPT],
    }
    # The first round fills the file cache; the median is that of the warm ones.
    first, failed = interleave({name: partial(seconds_to_first_output, c) for name, c in commands.items()}, rounds=5)
    help_seconds, _ = interleave({OURS: partial(seconds_to_first_output, [craton, "--help"])}, rounds=5)
    return {
        "start/help": case(help_seconds[OURS], {}, "s", less_is_better=True, limit=0.4),
        "start/first_token": case(first.pop(OURS), first, "s", less_is_better=True, limit=2.0, absent=failed),
    }


def seconds_to_first_output(command: list[str]) -> float:
    """Seconds from the start of a program to its first byte of output; the program is then ended."""
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, cwd=BENCHMARKS, env=environment()) as process,
    ):
        assert process.stdout is not None
        first = process.stdout.read(1)
        elapsed = time.perf_counter() - started
        process.kill()
        if not first:
            errors.seek(0)
            raise ContenderError(errors.read().decode(errors="replace").strip().rpartition("\n")[2])
    return elapsed


if __name__ == "__main__":
    main()
