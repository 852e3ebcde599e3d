"""The form of the table of GGUF's architectures: what one entry says, and how its names are looked up both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from craton.checkpoints.gguf_changes import Change

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # of the file's tensors


@dataclass(frozen=True)
class Key:
    """One setting: `inside` follows the architecture's name in the metadata, `theirs` is the key of config.json."""

    theirs: str
    inside: str
    kind: type = int
    required: bool = True


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    hf_architectures: what a file is read as; after it, what is written as such a file where nothing is lost by it.
    tensors: names without ".weight" and ".bias". changes: by Hugging Face's name, what conversion does besides.
    fixed: metadata that every file has. rope_factors: the tensors of rotary factors that a file may have.
    conventions: config.json keys that files leave unsaid, from those that they say and the shapes of their tensors.
    unplaced: Hugging Face's tensors that the format leaves out, since no output of the model needs them.
    """

    name: str
    hf_architectures: tuple[str, ...]
    model_type: str
    keys: tuple[Key, ...]
    tensors: Mapping[str, str]
    changes: Mapping[str, Change] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotary: bool = True
    rope_factors: tuple[str, ...] = ()
    conventions: Callable[[Config, Shapes], dict[str, Any]] = lambda config, shapes: {}
    unplaced: tuple[str, ...] = ()

    @property
    def expert_count(self) -> str | None:
        """The key of config.json that counts the experts, where there are some."""
        return next((key.theirs for key in self.keys if key.inside == "expert_count"), None)

    def in_file(self, theirs: str) -> tuple[str, int | None] | None:
        """The file's tensor that holds Hugging Face's `theirs`, and as which of its experts; None if there is none."""
        pattern, numbers, kind = _split(theirs)
        if pattern not in self.tensors:
            return None
        inside = self.tensors[pattern].format(n=numbers[0] if numbers else None)
        return f"{inside}.{kind}", int(numbers[1]) if len(numbers) > 1 else None

    def from_file(self, inside: str) -> tuple[str, bool] | None:
        """Hugging Face's name of the file's tensor `inside`, and whether it has an {e} for the experts of a stack."""
        pattern, numbers, kind = _split(inside)
        if pattern not in self._theirs:
            return None
        theirs = self._theirs[pattern].replace("{n}", numbers[0] if numbers else "")
        return f"{theirs}.{kind}", "{e}" in theirs

    def change_of(self, theirs: str) -> Change | None:
        """What conversion does to Hugging Face's tensor `theirs`, if anything."""
        return self.changes.get(_split(theirs)[0])

    @cached_property
    def _theirs(self) -> dict[str, str]:
        return {inside: theirs for theirs, inside in self.tensors.items()}


def _split(name: str) -> tuple[str, list[str], str]:
    # "model.layers.3.mlp.up_proj.weight" -> "model.layers.{n}.mlp.up_proj", ["3"], "weight"
    stem, _, kind = name.rpartition(".")
    numbers: list[str] = []

    def letter(match: re.Match[str]) -> str:
        numbers.append(match[0])
        return "{n}" if len(numbers) == 1 else "{e}"

    return re.sub(r"(?<=\.)\d+(?=\.|$)", letter, stem), numbers, kind
