"""Several models of one architecture as one: weights averaged, interpolated on the sphere, or their changes combined.

Tensor by tensor from mapped files: beside the result, no model is ever in memory as a whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.finite import is_finite
from craton.checkpoints.save import copy_preprocessing, save_checkpoint
from craton.checkpoints.weights import QuantizedTensor
from craton.compression.blocks import tokenizer_of
from craton.compression.merge_settings import MergeSettings
from craton.data.documents import fingerprint
from craton.errors import CheckpointError, UsageError
from craton.models import AnyModel, build
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.runs import Run

KIND: Final = "merge"
# Beyond this cosine two tensors point the same way, and the sphere between them is a line (as Shoemake's slerp needs).
PARALLEL: Final = 0.9995
STORED_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class ModelMerge:
    """What was made. tensors: how many were merged. distance: of each model's weights from the merged ones, relative:
    |theta_i - theta| / |theta_i| over all tensors."""

    model: str
    path: str
    run: str
    models: tuple[str, ...]
    method: str
    weights: tuple[float, ...]
    tensors: int
    distance: tuple[float, ...]


def merge_models(
    models: Sequence[str],
    settings: MergeSettings,
    *,
    name: str,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> ModelMerge:
    """Merge stored models (or paths) of one architecture into one and publish it under `name`.

    The result has the number format, tokeniser and chat template of the first model. Written files are read again and
    compared before they count.

    Raises UsageError for models that do not fit together or settings that make no merge, and what opening raises.
    """
    check_model_name(name)
    weights = settings.shares(len(models))
    found = [find(model) for model in models]
    opened = [Checkpoint.open(one.path) for one in found]
    base = find(settings.base) if settings.base is not None else None
    base_opened = Checkpoint.open(base.path) if base is not None else None
    for other, called in zip(
        [*opened[1:], *([base_opened] if base_opened else [])],
        [*models[1:], *([settings.base] if settings.base else [])],
        strict=True,
    ):
        _check_alike(opened[0], other, models[0], called)
    parents = [Parent(relation="merged_from", name=_known_as(one)) for one in found]
    if base is not None:
        parents.append(Parent(relation="base", name=_known_as(base)))
    config = {"models": list(models), "settings": settings.model_dump(mode="json")}
    origins = {f"settings.{key}": "the command" for key in settings.model_fields_set}
    run = Run.create(
        KIND, config=config, provenance={"models": "the command", **origins}, parents=tuple(parents), name=name
    )
    distances: list[float] = []
    count = 0

    def write(folder: Path) -> None:
        nonlocal count
        merged, distance, count = _merge(opened, base_opened, settings, weights, on_progress)
        distances.extend(distance)
        on_progress("writing and reading again")
        first = opened[0]
        save_checkpoint(merged, first.family, folder, tokenizer=tokenizer_of(first), pooling=first.pooling)
        copy_preprocessing(first.folder, folder)
        _check_written(merged, folder)
        card = model_card(run, name=name, licence=found[0].licence, metrics={})
        replace_file(folder / "README.md", card.encode())

    with run.lock():
        stored = publish_model(name, write, source=f"run:{run.id}", parents=run.record.parents, licence=_licence(found))
        run.finish("done", {"model": stored.id})
    return ModelMerge(
        model=stored.id,
        path=str(stored.path),
        run=run.id,
        models=tuple(_known_as(one) for one in found),
        method=settings.method,
        weights=weights,
        tensors=count,
        distance=tuple(distances),
    )


def combine(
    tensors: Sequence[Tensor], base: Tensor | None, settings: MergeSettings, weights: Sequence[float], key: str
) -> Tensor:
    """One tensor of the merged model, fp32, of the models' (and the base's) tensors of the same shape.

    key: its name; with the seed and the model's number it decides what DARE drops.
    """
    parts = [tensor.float() for tensor in tensors]
    if settings.method == "slerp":
        return slerp(parts[0], parts[1], weights[1])
    if base is None:
        return _weighted(parts, weights)
    origin = base.float()
    changes = [part - origin for part in parts]
    if settings.method in ("dare", "dare-ties"):
        changes = [
            dropped(change, settings.density, _seed(settings.seed, number, key))
            for number, change in enumerate(changes)
        ]
    if settings.method == "ties":
        changes = [trimmed(change, settings.density) for change in changes]
    if settings.method in ("ties", "dare-ties"):
        return origin + elected_mean(changes, weights)
    return origin + _weighted(changes, weights)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """Spherical interpolation from `a` (share 0) to `b` (share 1), both taken as vectors (Shoemake 1985).

    The angle is between their directions; where they are parallel, or one is zero, the line between them.
    """
    lengths = a.norm() * b.norm()
    cosine = float((a * b).sum() / lengths) if lengths > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return torch.lerp(a, b, share)
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    first, second = (float(torch.sin(part * angle) / torch.sin(angle)) for part in (1 - share, share))
    return first * a + second * b


def trimmed(change: Tensor, density: float) -> Tensor:
    """The share `density` of a change that is largest in size; the rest is zero (TIES, arXiv 2306.01708)."""
    kept = max(1, round(density * change.numel()))
    if kept >= change.numel():
        return change
    least = change.abs().flatten().kthvalue(change.numel() - kept + 1).values
    return torch.where(change.abs() >= least, change, 0.0)


def dropped(change: Tensor, density: float, seed: int) -> Tensor:
    """A random share `density` of a change, scaled by 1 / density so that its mean stays (DARE, arXiv 2311.03099)."""
    generator = torch.Generator().manual_seed(seed)
    return change * (torch.rand(change.shape, generator=generator) < density) / density


def elected_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES (arXiv 2306.01708): each number's sign is elected by weighted size, and the changes that have it are
    averaged by weight; those against it, and zeros, take no part."""
    weighted = torch.stack([weight * change for weight, change in zip(weights, changes, strict=True)])
    sign = weighted.sum(0).sign()
    agrees = (weighted.sign() == sign) & (weighted != 0)
    shape = (len(changes), *[1] * changes[0].dim())
    votes = agrees * torch.tensor(weights).view(shape)
    return (weighted * agrees).sum(0) / votes.sum(0).clamp_min(1e-12)


def _weighted(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        total.add_(part, alpha=weight)
    return total


def _merge(
    opened: Sequence[Checkpoint],
    base: Checkpoint | None,
    settings: MergeSettings,
    weights: Sequence[float],
    on_progress: Callable[[str], None],
) -> tuple[AnyModel, list[float], int]:
    """The merged model, each model's relative distance from it, and the number of tensors."""
    first = opened[0]
    dtype = STORED_DTYPES.get(first.stored_kind(), torch.float32)
    entries = first.family.entries(first.config)
    readers = [_Reader(one) for one in (*opened, *([base] if base else []))]
    state: dict[str, Tensor] = {}
    squares, wholes = [0.0] * len(opened), [0.0] * len(opened)
    names = [name for entry in entries for name in entry.theirs]
    done = 0
    for entry in entries:
        merged = []
        for name in entry.theirs:
            done += 1
            on_progress(f"tensor {done} of {len(names)}: {name}")
            tensors = [reader(name) for reader in readers]
            models, origin = tensors[: len(opened)], tensors[-1] if base else None
            one = combine(models, origin, settings, weights, name)
            for number, tensor in enumerate(models):
                squares[number] += float((tensor.float() - one).square().sum())
                wholes[number] += float(tensor.float().square().sum())
            merged.append(one.to(torch.float32 if entry.fp32 else dtype))
            for reader in readers:
                reader.release()
        state |= zip(entry.ours, entry.load(merged), strict=True)
    with torch.device("meta"):
        model = build(first.config)
    if getattr(first.config, "tied", False) and "head.weight" not in state:
        state["head.weight"] = state["embedding.weight"]
    model.load_state_dict(state, assign=True)
    distances = [(square / whole) ** 0.5 if whole else 0.0 for square, whole in zip(squares, wholes, strict=True)]
    return model, distances, len(names)


class _Reader:
    """A checkpoint's tensors by their current names, as numbers."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._source = checkpoint.source
        self._names = {checkpoint.family.current_name(name): name for name in checkpoint.source.shapes}
        self._path = checkpoint.path

    def __call__(self, name: str) -> Tensor:
        if name not in self._names:
            raise CheckpointError(f"tensor {name!r} is missing", where=str(self._path))
        weight = self._source.weight(self._names[name])
        tensor = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
        if not is_finite(tensor):
            raise CheckpointError(f"tensor {name!r} holds NaN or infinite values", where=str(self._path))
        return tensor

    def release(self) -> None:
        self._source.release()


def _check_alike(first: Checkpoint, other: Checkpoint, first_name: str, other_name: str) -> None:
    """Raises UsageError unless both are the same network over the same tokens."""
    where = f"{first_name} and {other_name}"
    if first.family.name != other.family.name:
        raise UsageError(
            f"a {first.family.name} and a {other.family.name} have no weights in common",
            where=where,
            remedy="merge models that were trained from one base",
        )
    if first.config != other.config:
        ours, theirs = first.config.model_dump(mode="json"), other.config.model_dump(mode="json")
        raise UsageError(
            f"the two models differ in shape: {_difference(ours, theirs)}",
            where=where,
            remedy="merge models that were trained from one base",
        )
    ours_read, theirs_read = tokenizer_of(first), tokenizer_of(other)
    if ours_read is not None and theirs_read is not None and fingerprint(ours_read) != fingerprint(theirs_read):
        a, b = (one.backend.get_vocab(with_added_tokens=True) for one in (ours_read, theirs_read))
        if a != b:
            raise UsageError(
                f"the two models have other tokens: {len(set(a.items()) ^ set(b.items())):,} entries differ",
                where=where,
                remedy="merge models that share a tokeniser",
            )


def _difference(ours: object, theirs: object, at: str = "") -> str:
    """The first place where two configs differ, in words."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            if ours[key] != theirs.get(key):
                return _difference(ours[key], theirs.get(key), f"{at}.{key}".lstrip("."))
    if isinstance(ours, list) and isinstance(theirs, list):
        if len(ours) != len(theirs):
            return f"{at}: {len(ours)} and {len(theirs)}"
        number = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1])
        return _difference(ours[number], theirs[number], f"{at}[{number}]")
    return f"{at} is {ours} in one and {theirs} in the other"


def _check_written(model: AnyModel, folder: Path) -> None:
    """Raises CheckpointError unless the files hold the model, number by number."""
    dtype = next(model.parameters()).dtype
    again = Checkpoint.open(folder).load(dtype).state_dict()
    for name, tensor in model.state_dict().items():
        if not torch.equal(again[name], tensor):
            raise CheckpointError(
                f"{name!r} was written with other values",
                remedy="nothing was kept; please report this with the names of the models",
            )


def _seed(seed: int, number: int, key: str) -> int:
    # torch's generator looks at the lower 32 bits of a seed only.
    return zlib.crc32(f"{seed}:{number}:{key}".encode())


def _known_as(model: StoredModel) -> str:
    return model.id if model.folder is not None else model.source


def _licence(found: Sequence[StoredModel]) -> str | None:
    """The models' licence where all have one and the same: of others, the merged model's is for its maker to say."""
    licences = {one.licence for one in found}
    return licences.pop() if len(licences) == 1 else None
