"""Reading PEFT's adapters from their folder, whatever is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from craton.checkpoints.checkpoint import read_json
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.heads import head_names
from craton.checkpoints.finite import is_finite
from craton.checkpoints.peft import BASE_WEIGHTS_KEY, CONFIG_NAME, LABELS_KEY, PREFIX, WEIGHTS_NAME, PeftAdapter
from craton.checkpoints.peft_modules import (
    LowRankUpdate,
    Module,
    adaptable_modules,
    in_task_class,
    is_routed,
    meant,
    split,
    within_model,
)
from craton.checkpoints.safetensors import SafetensorsFile
from craton.checkpoints.safetensors_header import PICKLE_REMEDY
from craton.errors import CheckpointError, FileFormatError, UsageError
from craton.models import ClassifierConfig, ImageClassifierConfig, ModelConfig

PICKLE_NAME: Final = "adapter_model.bin"
_LAST_LAYERS: Final = ("score.weight", "classifier.weight", "classifier.out_proj.weight")  # of classifiers

# What would make an adapter more than rows of scale B A, and the values with which it does not.
_PLAIN: Final[Mapping[str, tuple[Any, ...]]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "monteclora_config": (),
    "use_bdlora": (False,),
}
# Other ways to begin take something off the base's weights, which the adapter's file does not hold.
_PLAIN_BEGINNINGS: Final = (True, False, "gaussian", "eva", "orthogonal")


def read_peft(
    folder: str | Path, family: Family, config: ModelConfig, shapes: Mapping[str, tuple[int, int]]
) -> PeftAdapter:
    """The adapter in `folder`, for a model of `family`. shapes: [out, in] of each linear layer of the model.

    Raises:
        UsageError: there is no adapter.
        FileFormatError: a pickle, or files that are not what they say.
        CheckpointError: an adapter of another kind or for another base (unknown modules, wrong shapes), or one of
            which tensors are missing.
    """
    keys = read_adapter_config(folder)
    file = SafetensorsFile.open(Path(folder) / WEIGHTS_NAME)
    modules = adaptable_modules(family, config, shapes)
    of_head = head_names(family, config) if isinstance(config, ClassifierConfig | ImageClassifierConfig) else {}
    found: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    strangers = []
    for name in sorted(file.tensors):
        tensor = file.tensor(name)
        if not is_finite(tensor):
            raise CheckpointError(f"tensor {name!r} holds NaN or infinite values", where=str(file.path))
        path, kind = _split_name(name)
        module = within_model(family, path)
        if kind in ("a", "b", "magnitude") and module in modules:
            found.setdefault(module, {})[kind] = tensor.float().clone()
        elif kind == "copy" and module in modules and len(modules[module].ours) == 1:
            copies[modules[module].ours[0]] = tensor
        elif path in of_head:
            head[of_head[path]] = tensor.float().clone()
        else:
            strangers.append(name)
    if strangers:
        raise CheckpointError(
            f"{len(strangers)} tensors have no place in this model: {', '.join(strangers[:3])}",
            where=str(file.path),
            remedy="the adapter was trained on another model, as a classifier, on embeddings, or with whole modules of "
            "its base",
        )
    rslora, dora = keys.get("use_rslora", bool, False), keys.get("use_dora", bool, False)
    lacking = sorted(theirs for theirs, ours in of_head.items() if ours.startswith("head.") and ours not in head)
    _check_complete(keys, found, modules, dora, family, lacking)
    updates: dict[str, LowRankUpdate] = {}
    for path, tensors in found.items():
        update = LowRankUpdate(tensors["a"], tensors["b"], _alpha(keys, family, path), tensors.get("magnitude"))
        _check_shapes(modules[path], update, file.path)
        updates |= split(modules[path], update, rslora=rslora)
    dropout = keys.get("lora_dropout", float, 0.0)
    if not 0 <= dropout < 1:
        raise CheckpointError(f"{dropout} is no share to drop", where=f"{keys.where}: key 'lora_dropout'")
    summary = read_summary(folder)
    return PeftAdapter(
        updates=updates,
        rslora=rslora,
        dropout=dropout,
        task=keys.get("task_type", str, None),
        base=summary.base,
        base_weights=summary.base_weights,
        head=head,
        copies=copies,
    )


def read_adapter_config(folder: str | Path) -> Keys:
    """adapter_config.json of the adapter in `folder`, of a kind that is read here. Raises what `read_peft` raises."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UsageError(
            "there is no adapter here", where=str(folder), remedy=f"name a folder that holds {CONFIG_NAME}"
        )
    if not (folder / WEIGHTS_NAME).is_file():
        if (folder / PICKLE_NAME).exists():
            raise FileFormatError(f"{PICKLE_NAME} is a pickle", where=str(folder), remedy=PICKLE_REMEDY)
        raise CheckpointError(f"the adapter has no {WEIGHTS_NAME}", where=str(folder))
    keys = Keys(read_json(folder / CONFIG_NAME), str(folder / CONFIG_NAME))
    keys.need("peft_type", str)
    for key, allowed in _PLAIN.items():
        keys.refuse(key, *allowed)
    begun = keys.values.get("init_lora_weights", True)
    if begun not in _PLAIN_BEGINNINGS:
        raise CheckpointError(
            f"the adapter began as {begun!r}, which changes the base's weights as well",
            where=f"{keys.where}: key 'init_lora_weights'",
            remedy="convert it where it was trained: save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    return keys


@dataclass(frozen=True)
class AdapterSummary:
    """What an adapter's files say of the model that it needs.

    base: in the words of whoever trained it, with the revision behind an @. base_weights: how the base's were stored
    then. labels: the classes, if it is a classifier's.
    """

    base: str | None
    base_weights: str | None
    labels: tuple[str, ...]


def read_summary(folder: str | Path) -> AdapterSummary:
    """What is to be known of the adapter in `folder` before there is a model. Raises what `read_peft` raises."""
    keys = read_adapter_config(folder)
    file = SafetensorsFile.open(Path(folder) / WEIGHTS_NAME)
    base, revision = keys.get("base_model_name_or_path", str, None), keys.get("revision", str, None)
    return AdapterSummary(
        base=f"{base}@{revision}" if base and revision else base or None,
        base_weights=file.metadata.get(BASE_WEIGHTS_KEY),
        labels=_labels(file) if keys.get("task_type", str, None) == "SEQ_CLS" or _has_head(file) else (),
    )


def _has_head(file: SafetensorsFile) -> bool:
    # PEFT knows a task for classes of texts and none for those of pictures.
    return LABELS_KEY in file.metadata or any(name.removeprefix(PREFIX) in _LAST_LAYERS for name in file.tensors)


def _labels(file: SafetensorsFile) -> tuple[str, ...]:
    try:
        labels = json.loads(file.metadata.get(LABELS_KEY, "null"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"the labels are not valid JSON: {error}", where=str(file.path)) from None
    if isinstance(labels, list) and all(isinstance(label, str) for label in labels):
        return tuple(labels)
    shapes = [info.shape for name, info in file.tensors.items() if name.removeprefix(PREFIX) in _LAST_LAYERS]
    if not shapes or not shapes[0]:
        raise CheckpointError("the adapter of a classifier holds no classifier", where=str(file.path))
    return tuple(f"LABEL_{number}" for number in range(shapes[0][0]))


def _split_name(name: str) -> tuple[str, str]:
    """The module and what of it a tensor is: a, b, magnitude, the base's own weight ("copy"), or "" for another one."""
    path = name.removeprefix(PREFIX)
    for suffix, kind in (
        (".lora_A.weight", "a"),
        (".lora_B.weight", "b"),
        (".lora_magnitude_vector", "magnitude"),
        (".lora_magnitude_vector.weight", "magnitude"),
        (".base_layer.weight", "copy"),
    ):
        if path.endswith(suffix):
            return path.removesuffix(suffix), kind
    return path, ""


def _check_complete(
    keys: Keys,
    found: Mapping[str, Mapping[str, Tensor]],
    modules: Mapping[str, Module],
    dora: bool,
    family: Family,
    missing: list[str],
) -> None:
    wanted = {"a": "lora_A.weight", "b": "lora_B.weight"} | ({"magnitude": "lora_magnitude_vector"} if dora else {})
    missing = missing + [
        f"{path}.{name}" for path, tensors in found.items() for kind, name in wanted.items() if kind not in tensors
    ]
    targets = keys.values.get("target_modules")
    whole = not keys.values.get("layers_to_transform") and not keys.values.get("exclude_modules")
    if isinstance(targets, list) and whole:
        names = {in_task_class(family, path, None): path for path in modules} | {path: path for path in modules}
        asked = {names[name] for target in targets for name in meant(str(target), names)}
        # Where targets mean routed experts, other layers of the same names need not be meant.
        expert_parts = {path.rpartition(".")[2] for path in found if is_routed(path)}
        asked = {path for path in asked if is_routed(path) or path.rpartition(".")[2] not in expert_parts}
        missing += sorted(f"{path}.lora_A.weight" for path in asked - set(found))
    if missing or not found:
        what = f"{len(missing)} tensors are missing: {', '.join(missing[:3])}" if missing else "it holds none"
        raise CheckpointError(
            f"the adapter is incomplete: {what}",
            where=str(Path(keys.where).with_name(WEIGHTS_NAME)),
            remedy="save or fetch the adapter again",
        )


def _check_shapes(module: Module, update: LowRankUpdate, where: Path) -> None:
    outputs = sum(module.sizes)
    if update.a.dim() != 2 or not len(update.a):
        raise CheckpointError(f"{module.path}.lora_A of shape {list(update.a.shape)} has no rank", where=str(where))
    wanted: dict[str, tuple[int, ...]] = {"lora_A": (update.rank, module.inputs), "lora_B": (outputs, update.rank)}
    shapes = {"lora_A": tuple(update.a.shape), "lora_B": tuple(update.b.shape)}
    if update.magnitude is not None:
        wanted["lora_magnitude_vector"], shapes["lora_magnitude_vector"] = (outputs,), tuple(update.magnitude.shape)
    for name, shape in shapes.items():
        if shape != wanted[name]:
            raise CheckpointError(
                f"{module.path}.{name} has shape {list(shape)}, this model asks for {list(wanted[name])}",
                where=str(where),
                remedy="the adapter was trained on another base: name that one",
            )


def _alpha(keys: Keys, family: Family, path: str) -> float:
    alpha = keys.get("lora_alpha", float, 8.0)
    patterns: dict[str, Any] = keys.get("alpha_pattern", dict, {})
    where = f"{keys.where}: key 'alpha_pattern'"
    for pattern in patterns:
        # Names and simple expressions; groups and counted repeats could be made to search for ever.
        if not re.fullmatch(r"[\w.^$|\\*+\[\]-]*", pattern) or pattern.count("*") + pattern.count("+") > 3:
            raise CheckpointError(f"the pattern {pattern!r} is not read here", where=where)
        names = (path, in_task_class(family, path, None))
        try:
            meant_here = any(re.match(rf"(?:.*\.)?(?:{pattern})$", name) for name in names)
        except re.error as error:
            raise CheckpointError(f"the pattern {pattern!r} is malformed: {error}", where=where) from None
        if meant_here:
            return Keys(patterns, where).need(pattern, float)
    return alpha
