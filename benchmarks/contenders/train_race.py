"""Contenders that train beside one another: each in a process of its own, in interleaved turns of a few steps."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from harness import Case, ContenderError, case, interleave

from contenders.train_models import Job
from contenders.worker import Worker

OURS, INSTALLED, BEST = "Craton", "transformers as installed", "transformers at its best"
PEAK = ("peak", "")
DATA_STEPS = 64  # steps until the data of a pretraining job begins again
# Of first losses, relative: bf16 against fp32 stays far below it, other targets or another batch do not.
SAME_LOSS = 0.02

Key = tuple[str, str]  # (name, variant)


class Contender:
    """One contender of a race. counted: for each of its turns, how many tokens of it count."""

    def __init__(self, module: str, settings: Mapping[str, Any], counted: Sequence[int], steps: int) -> None:
        self._module, self._settings, self._counted, self._steps = module, settings, iter(counted), steps
        self._worker: Worker | None = None
        self.facts: dict[str, Any] = {}
        self.memory = 0.0

    def start(self) -> None:
        """Load, compile, make the first steps. Raises ContenderError."""
        self._worker = Worker(self._module, **self._settings)
        self.facts = self._worker.facts()

    def turn(self) -> float:
        """Tokens per second over a turn's steps; `memory` is the peak in MB up to now."""
        assert self._worker is not None
        seconds = float(self._worker.ask("train", steps=self._steps))
        self.memory = float(self._worker.ask("memory"))
        return next(self._counted) / seconds

    def whole_turn(self) -> float:
        """A turn of a process that is started for it and ended behind it."""
        try:
            self.start()
            return self.turn()
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    @property
    def setting(self) -> str:
        """What was chosen for it, and how long compiling took."""
        compiled = self._settings.get("compile", False)
        return self.facts["setting"] + (f" in {self.facts['extra_seconds']:.0f} s" if compiled else "")


@dataclass
class Results:
    """What a race gave. rates: counted tokens per second; memory: MB; peak: FLOP/s of the machine's products."""

    rates: dict[Key, float]
    memory: dict[Key, float]
    settings: dict[Key, str]
    failed: dict[Key, str]
    peak: float | None = None
    _names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._names = list(dict.fromkeys(name for name, _ in (*self.rates, *self.failed)))

    def speed(self, variants: Iterable[str] | None = None, limit: float | None = None) -> Case:
        """Each name at its fastest of these variants (none: of all)."""
        return self._case(self.rates, "tokens/s", variants, limit=limit)

    def footprint(self) -> Case:
        """The peak memory of what stands in `speed`."""
        return self._case(self.memory, "MB", None, less_is_better=True)

    def share(self, flops: float, peak: float, variants: Iterable[str] | None = None, **settings: str) -> Case:
        """Craton's arithmetic, `flops` a token, beside `peak` FLOP/s."""
        key = self._fastest(OURS, variants)
        assert key is not None
        ours = self.rates[key] * flops / 1e12
        return case(ours, {}, "TFLOP/s", limit=peak / 1e12, settings={OURS: self.settings[key], **settings})

    def _case(
        self,
        figures: Mapping[Key, float],
        unit: str,
        variants: Iterable[str] | None,
        *,
        less_is_better: bool = False,
        limit: float | None = None,
    ) -> Case:
        chosen = {name: key for name in self._names if (key := self._fastest(name, variants))}
        absent = {
            name: reason for (name, variant), reason in self.failed.items() if variants is None or variant in variants
        }
        return case(
            figures[chosen[OURS]],
            {name: figures[key] for name, key in chosen.items() if name != OURS},
            unit,
            less_is_better=less_is_better,
            limit=limit,
            settings={name: self.settings[key] for name, key in chosen.items()},
            absent={name: reason for name, reason in absent.items() if name not in chosen},
        )

    def _fastest(self, name: str, variants: Iterable[str] | None) -> Key | None:
        keys = [key for key in self.rates if key[0] == name and (variants is None or key[1] in variants)]
        return max(keys, key=self.rates.__getitem__, default=None)


def race(
    entrants: Mapping[Key, tuple[str, Mapping[str, Any]]],
    *,
    steps: int,
    counted: Sequence[int],
    peak: Callable[[], float] | None = None,
    apart: bool = False,
) -> Results:
    """As many rounds as `counted` has numbers: the tokens that count in each. entrants: (module, its settings).

    peak: measures the machine, once in each round. apart: one process at a time, started anew for every turn, where
    memory does not hold all of them.

    A peer that fails, or whose first loss says that it does other work, leaves with its reason. Raises ContenderError
    where no variant of Craton is left.
    """
    contenders = {key: Contender(*entrant, counted, steps) for key, entrant in entrants.items()}
    failed: dict[Key, str] = {}
    turns: dict[Key, Callable[[], float]] = {}
    try:
        for key, one in contenders.items():
            turns[key] = partial(_announced, key, one.whole_turn if apart else one.turn)
            if not apart:
                # One after another: compilers side by side would take each other's time.
                print(f"  {' '.join(key)} starts", file=sys.stderr, flush=True)
                try:
                    one.start()
                except ContenderError as error:
                    failed[key] = str(error)
        turns = {key: turn for key, turn in turns.items() if key not in failed}
        medians, left = interleave(turns if peak is None else {**turns, PEAK: peak}, len(counted))
    finally:
        for one in contenders.values():
            one.stop()
    failed |= left
    measured_peak = medians.pop(PEAK, None)
    failed |= _other_work({key: contenders[key].facts["loss"] for key in medians})
    rates = {key: rate for key, rate in medians.items() if key not in failed}
    if not any(name == OURS for name, _ in rates):
        raise ContenderError("; ".join(f"{' '.join(key)}: {why}" for key, why in failed.items() if key[0] == OURS))
    memory = {key: contenders[key].memory for key in rates}
    settings = {key: contenders[key].setting for key in rates}
    return Results(rates, memory, settings, failed, measured_peak)


def pretraining_entrants(
    job: Job, folder: Path, data: Path, *, bf16: bool, device: str = "cpu", best: Iterable[bool] = (True,)
) -> dict[Key, tuple[str, dict[str, Any]]]:
    """Craton with and without compiling, transformers as installed, and at its best: `best` says compiled or not.

    folder: the fresh weights; data: `DATA_STEPS` steps of windows. bf16: what this machine is fast in.
    """
    common = {"folder": str(folder), "data": str(data), "batch": job.batch, "device": device}
    ours = common | {"micro_tokens": job.step_tokens}
    variants = {False: "eager", True: "compiled"}
    return {
        **{(OURS, variants[c]): ("train_craton", {**ours, "compile": c}) for c in (False, True)},
        (INSTALLED, "eager"): ("train_transformers", common),
        **{
            (BEST, variants[c]): ("train_transformers", common | {"best": True, "bf16": bf16, "compile": c})
            for c in best
        },
    }


def _other_work(losses: Mapping[Key, float]) -> dict[Key, str]:
    """The peers whose first loss is not Craton's, on the same weights and the same batch."""
    ours = next((loss for key, loss in losses.items() if key[0] == OURS), None)
    return {
        key: f"its first loss is {loss:.4f} and Craton's {ours:.4f}: they do not do the same work"
        for key, loss in losses.items()
        if ours is not None and abs(loss - ours) > SAME_LOSS * ours
    }


def _announced(key: Key, turn: Callable[[], float]) -> float:
    print(f"  {' '.join(key)} ...", file=sys.stderr, flush=True)
    return turn()
