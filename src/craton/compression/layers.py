"""Which matrices of a model are compressed: those of its blocks and an untied head, without those that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import nn

from craton.checkpoints.weights import QuantizedLinear
from craton.compression.blocks import HEAD, NOT_COMPRESSED, Source
from craton.errors import UnknownName, UsageError
from craton.models import CausalLM

DEFAULT_KEEP: Final = "lm_head"


@dataclass(frozen=True)
class Matrix:
    """A matrix to compress. name: in the model. published: in the files. entry: matrices of one entry are one matrix in
    the files, and have one form."""

    name: str
    published: str
    shape: tuple[int, int]
    entry: int

    @property
    def size(self) -> int:
        """Weights."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Chosen:
    """The matrices to compress, in order, and the names of those that are kept."""

    matrices: tuple[Matrix, ...]
    kept: tuple[str, ...]


def choose_layers(source: Source, keep: Sequence[str]) -> Chosen:
    """keep: names of layers or dotted parts of them, ours or the files' ("lm_head", "layers.0", "down_proj").

    Raises UnknownName for a part that no layer's name has, UsageError if nothing is left.
    """
    found = _matrices(source)
    kept: set[int] = set()
    for part in keep:
        hits = {one.entry for one in found if _has(one.name, part) or _has(one.published, part)}
        if not hits and part != DEFAULT_KEEP:  # a tied head is no matrix of its own
            parts = {name for one in found for name in one.published.split(".") if not name.isdigit()}
            raise UnknownName("layer to keep", part, {*parts, DEFAULT_KEEP}, where="--keep")
        kept |= hits
    matrices = tuple(one for one in found if one.entry not in kept)
    if not matrices:
        raise UsageError("every layer is to be kept", where="--keep", remedy="name fewer")
    return Chosen(matrices, tuple(one.published for one in found if one.entry in kept))


def check_groups(matrices: Sequence[Matrix], group: int) -> None:
    """Refuse matrices whose rows are not whole groups."""
    odd = [one for one in matrices if one.shape[1] % group and one.shape[1] > group]
    if odd:
        columns = odd[0].shape[1]
        fits = [str(g) for g in (128, 64, 32) if not any(one.shape[1] % g for one in odd)]
        parts = sorted({one.published.rpartition(".")[2] for one in odd})
        raise UsageError(
            f"{len(odd)} matrices have rows of {columns} weights, which are not whole groups of {group}",
            where=odd[0].published,
            remedy=f"take --group {fits[0]}" if fits else f"leave them as they are: --keep {','.join(parts)}",
        )


def _matrices(source: Source) -> list[Matrix]:
    inside = tuple(f"{tower.name}.layers." for tower in source.towers)
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in source.model.named_modules():
        in_block = name.startswith(inside) and name.rpartition(".")[2] not in NOT_COMPRESSED
        head = name == HEAD and isinstance(source.model, CausalLM) and not source.model.config.tied
        if isinstance(module, nn.Linear | QuantizedLinear) and (in_block or head):
            shapes[name] = (module.out_features, module.in_features)
    found = []
    for number, entry in enumerate(source.checkpoint.family.entries(source.checkpoint.config)):
        for position, ours in enumerate(entry.ours):
            name = ours.removesuffix(".weight")
            if ours.endswith(".weight") and name in shapes:
                theirs = entry.theirs[min(position, len(entry.theirs) - 1)].removesuffix(".weight")
                found.append(Matrix(name, theirs, shapes[name], number))
    order = {name: place for place, name in enumerate(shapes)}
    return sorted(found, key=lambda one: order[one.name])


def _has(name: str, part: str) -> bool:
    return f".{part.strip('.')}." in f".{name}."
