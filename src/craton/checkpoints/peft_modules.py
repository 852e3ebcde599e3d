"""Low-rank updates of our linear layers as those of the modules of transformers that PEFT's files name, and back.

Where several layers of ours lie in one module of theirs (q, k and v in one matrix), their updates become one with the
A's over one another and the B's as blocks along the diagonal, which is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Final

import torch
from torch import Tensor

from craton.checkpoints.families.family import Family
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ModelConfig

# Under which name a family's task classes hold the model itself; the others call it "model".
_BASE_NAMES: Final[Mapping[str, str]] = {
    "bert": "bert",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "gpt2": "transformer",
    "gpt_neox": "gpt_neox",
    "roberta": "roberta",
    "vit": "vit",
    "xlm_roberta": "roberta",
}
_HEADS: Final = ("lm_head", "embed_out")  # beside the model itself and not in it

# In their task classes other layers, none of ours, are called "dense" too; a short target must not mean them as well.
_THEIRS_ONLY: Final = ("pooler.dense", "classifier.dense")

_ROUTED: Final = re.compile(r"\.experts\.\d+\.")
_UNREAD_EXPERTS: Final = ("qwen2_moe",)  # whose adapters PEFT 0.21 fits to nothing
_ONE_PARAMETER: Final = ({"gate_proj", "up_proj"}, {"w1", "w3"})  # of all experts together, since transformers 5


@dataclass(frozen=True)
class LowRankUpdate:
    """What one adapter adds to one linear layer, in fp32: scale B A; with magnitudes, each row is then put to its own
    (DoRA). a[R, in], b[out, R], magnitude[out]."""

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """Columns of B and rows of A."""
        return len(self.a)

    def alpha_at(self, rank: int, *, rslora: bool) -> float:
        """The alpha that gives the same scale at another rank."""
        ratio = rank / self.rank
        return self.alpha * (sqrt(ratio) if rslora else ratio)


@dataclass(frozen=True)
class Module:
    """A module of theirs, by its path in the model itself, and the linear layers of ours whose rows make it up.

    order: row i of theirs is row order[i] of ours, put one after another. sizes: rows of each of ours. inputs: columns.
    """

    path: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...]
    inputs: int
    order: Tensor
    transposed: bool

    def to_theirs(self, rows: Tensor) -> Tensor:
        """Rows of ours, one layer after another, in their order."""
        return rows[self.order]

    def to_ours(self, rows: Tensor) -> list[Tensor]:
        """Their rows, as those of each of ours."""
        ours = torch.empty_like(rows)
        ours[self.order] = rows
        return [part.contiguous() for part in ours.split(self.sizes)]


def adaptable_modules(family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, int]]) -> dict[str, Module]:
    """Their modules by path. shapes: [out, in] of each of our linear layers."""
    if isinstance(config, CausalLMConfig):
        config = config.model_copy(update={"tied": False})  # so that the head has an entry
    modules: dict[str, Module] = {}
    for entry in family.entries(config):
        ours = tuple(name.removesuffix(".weight") for name in entry.ours)
        if not entry.linear or not all(name in shapes and f"{name}.weight" in entry.ours for name in ours):
            continue
        sizes = tuple(shapes[name][0] for name in ours)
        # What becomes of the rows' numbers says how the rows of theirs are made of ours.
        numbers = torch.arange(sum(sizes))[:, None]
        saved = entry.save(numbers.split(sizes))[0]
        path = within_model(family, entry.theirs[0].removesuffix(".weight"))
        for pattern, replacement in family.modules:
            path = re.sub(pattern, replacement, path)
        transposed = len(saved) != len(numbers)
        modules[path] = Module(path, ours, sizes, shapes[ours[0]][1], saved.flatten(), transposed)
    return modules


def within_model(family: Family, path: str) -> str:
    """A module's path in the model itself, of its path in any class that holds it."""
    return path.removeprefix(_base_prefix(family))


def in_task_class(family: Family, path: str, task: str | None) -> str:
    """The inverse of `within_model` for the class of transformers that `task`, in PEFT's words, is trained with."""
    if task == "FEATURE_EXTRACTION" or path in _HEADS:
        return path
    return f"{_base_prefix(family)}{path}"


def _base_prefix(family: Family) -> str:
    return _BASE_NAMES.get(family.name.partition("-")[0], "model") + "."  # "bert-classifier" holds what "bert" is


def shortest_targets(adapted: Iterable[str], family: Family, modules: Iterable[str], task: str | None) -> list[str]:
    """PEFT's `target_modules` for the adapted ones of the `modules` that there are: short names where they mean no
    other module, else the path within a layer, else the whole path. Routed experts go by their short names."""
    adapted, everything = set(adapted), [*modules, *_THEIRS_ONLY]
    targets = set()
    for path in adapted:
        last, in_layer = _last(path), re.sub(r"^.*?\.\d+\.", "", path)
        short = (name for name in (last, in_layer) if adapted.issuperset(meant(name, everything)))
        targets.add(last if is_routed(path) else next(short, in_task_class(family, path, task)))
    return sorted(targets)


def meant(target: str, paths: Iterable[str]) -> list[str]:
    """The paths that a name in PEFT's `target_modules` means."""
    return [path for path in paths if path == target or path.endswith(f".{target}")]


def check_experts(family: Family, updates: Mapping[str, LowRankUpdate], modules: Iterable[str], *, plain: bool) -> None:
    """Refuse an adapter of routed experts (by their modules) that PEFT would not read as what it is: the experts of a
    layer are two parameters to transformers 5, and PEFT makes the adapters of these of the experts', by their names.

    plain: neither rank-stabilised nor with dropout. Raises CheckpointError.
    """
    routed = {path for path in updates if is_routed(path)}
    names = {_last(path) for path in routed}
    of_these_names = {path for path in modules if _last(path) in names}
    fits = (
        plain
        and family.name not in _UNREAD_EXPERTS
        and len({(update.rank, update.alpha) for update in updates.values()}) == 1
        and not any(update.magnitude is not None for update in updates.values())
        and routed == {path for path in of_these_names if is_routed(path)}
        and not any(path in updates for path in of_these_names - routed)
        and all(len(names & pair) in (0, len(pair)) for pair in _ONE_PARAMETER)
    )
    if routed and not fits:
        raise CheckpointError(
            f"PEFT's files cannot say this adapter of {family.name}'s routed experts",
            remedy="adapt the attention alone, or (for families other than qwen2_moe) experts with plain LoRA, no "
            "dropout and one rank: all of them, gate and up together, and no other layer that is called the same",
        )


def is_routed(path: str) -> bool:
    """Whether a module of theirs lies in a routed expert."""
    return _ROUTED.search(path) is not None


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def join(module: Module, parts: Mapping[str, LowRankUpdate], *, rslora: bool) -> LowRankUpdate:
    """One update for a module of theirs, of the `parts` for some of the layers of ours in it.

    Raises CheckpointError for DoRA on some layers only: the module's magnitudes are those of all its rows.
    """
    magnitudes = [update.magnitude for update in parts.values() if update.magnitude is not None]
    if magnitudes and len(magnitudes) < len(module.ours):
        raise CheckpointError(
            f"DoRA on a part of {module.path!r} cannot be said in PEFT's files: its magnitudes are those of all rows",
            remedy=f"adapt all of {', '.join(module.ours)}, or none of them",
        )
    rank = sum(update.rank for update in parts.values())
    alpha = next(iter(parts.values())).alpha_at(rank, rslora=rslora)
    b_rows, first = [], 0
    for name, size in zip(module.ours, module.sizes, strict=True):
        rows_OR = torch.zeros(size, rank)
        if name in parts:
            part = parts[name]
            # One scale for all of them: what differs goes into B.
            rows_OR[:, first : first + part.rank] = part.b * (part.alpha_at(rank, rslora=rslora) / alpha)
            first += part.rank
        b_rows.append(rows_OR)
    return LowRankUpdate(
        a=torch.cat([update.a for update in parts.values()]),
        b=module.to_theirs(torch.cat(b_rows)),
        alpha=alpha,
        magnitude=module.to_theirs(torch.cat(magnitudes)) if magnitudes else None,
    )


def split(module: Module, update: LowRankUpdate, *, rslora: bool) -> dict[str, LowRankUpdate]:
    """The inverse of `join`: each layer of ours takes its rows of B, and of the rank what reaches them."""
    b_parts = module.to_ours(update.b)
    if len(b_parts) == 1:
        magnitude_O = module.to_ours(update.magnitude)[0] if update.magnitude is not None else None
        return {module.ours[0]: replace(update, b=b_parts[0], magnitude=magnitude_O)}
    magnitudes = module.to_ours(update.magnitude) if update.magnitude is not None else [None] * len(b_parts)
    parts, untrained = {}, not update.b.any()
    for name, rows_OR, magnitude_O in zip(module.ours, b_parts, magnitudes, strict=True):
        used_R = rows_OR.any(0)
        if untrained or (magnitude_O is not None and not used_R.any()):
            used_R = torch.ones_like(used_R)  # all of it may still be trained
        if used_R.any():
            alpha = update.alpha_at(int(used_R.sum()), rslora=rslora)
            parts[name] = LowRankUpdate(update.a[used_R], rows_OR[:, used_R].contiguous(), alpha, magnitude_O)
    return parts
