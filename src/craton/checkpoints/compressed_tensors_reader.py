"""Checkpoints in the layout of the library `compressed-tensors` (see `compressed_tensors`), whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from craton.checkpoints.bit_packing import packed_words, unpack_bits
from craton.checkpoints.families.family import Keys
from craton.checkpoints.packed_layers import BITS, FLOATS, REMEDY, Codes, PackedLayer, Tensors
from craton.errors import CheckpointError, FileFormatError

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
STRATEGIES = ("group", "channel", "tensor")


@dataclass(frozen=True)
class Scheme:
    """One of the config's groups of layers."""

    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    strategy: str
    group_size: int
    int8_activations: bool


def read_compressed_tensors(
    tensors: Tensors, config: Mapping[str, Any], where: str
) -> tuple[dict[str, PackedLayer], bool]:
    """The packed layers, and whether the config asks for inputs in 8 bits (see `PackedSource`)."""
    keys = Keys(config, where)
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        value = keys.get(key, dict, {})
        if value and not (key == "sparsity_config" and value.get("format") == "dense"):
            raise CheckpointError(
                f"{key} = {value!r} is not supported",
                where=where,
                remedy="fetch a version of this model with quantised weights alone",
            )
    overall = keys.get("format", str, "")
    schemes = [
        _scheme(Keys(group, f"{where}: group {name!r}"), overall)
        for name, group in keys.need("config_groups", dict).items()
        if _is_of_weights(group, f"{where}: group {name!r}")
    ]
    packed = tensors.names(".weight_packed")
    plain = [name for name in tensors.names(".weight_scale") if name not in set(packed)]
    layers = {name: _packed(tensors, name, _find(schemes, name, where)) for name in packed}
    layers |= {name: _unpacked(tensors, name, _find(schemes, name, where)) for name in plain}
    return layers, any(scheme.int8_activations for scheme in schemes)


def _is_of_weights(group: Any, where: str) -> bool:
    if not isinstance(group, Mapping):
        raise CheckpointError(f"a group of layers must be an object, not {group!r}", where=where)
    return group.get("weights") is not None


def _scheme(group: Keys, overall: str) -> Scheme:
    weights = Keys(group.need("weights", dict), f"{group.where}: key 'weights'")
    Keys({"format": group.get("format", str, overall)}, group.where).refuse("format", *FORMATS)
    group.refuse("output_activations", None)
    weights.refuse("type", "int")
    weights.refuse("num_bits", *BITS)
    weights.refuse("dynamic", False)
    group_size = weights.get("group_size", int, -1)
    strategy = weights.get("strategy", str, "group" if group_size > 0 else "channel")
    Keys({"strategy": strategy}, weights.where).refuse("strategy", *STRATEGIES)
    if strategy == "group" and group_size < 1:
        raise CheckpointError(f"groups of {group_size} inputs", where=weights.where)
    inputs = Keys(group.get("input_activations", dict, {}), f"{group.where}: key 'input_activations'")
    if inputs.values:
        inputs.refuse("type", "int")
        inputs.refuse("num_bits", 8)
        inputs.refuse("dynamic", True)
    targets = tuple(str(target) for target in group.need("targets", list))
    symmetric, bits = weights.get("symmetric", bool, True), weights.get("num_bits", int, 8)
    return Scheme(targets, bits, symmetric, strategy, group_size, bool(inputs.values))


def _find(schemes: list[Scheme], name: str, where: str) -> Scheme:
    """The scheme of a layer: its name decides before a pattern, and a pattern before the kind of layer."""

    def by_pattern(target: str) -> bool:
        try:
            return target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None
        except re.error as error:
            raise CheckpointError(f"{target!r} is not a pattern: {error}", where=where) from None

    for matches in (lambda target: target == name, by_pattern, lambda target: target == "Linear"):
        for scheme in schemes:
            if any(map(matches, scheme.targets)):
                return scheme
    raise CheckpointError(f"no group of the config is for the packed layer {name!r}", where=where)


def _packed(tensors: Tensors, name: str, scheme: Scheme) -> PackedLayer:
    size = f"{name}.weight_shape"
    tensors.check(size, (2,), "I64", "I32")
    rows, columns = tensors.get(size).tolist()
    words, bits = f"{name}.weight_packed", scheme.bits
    found = tensors.shape(words)
    if rows < 1 or columns < 1 or found not in {(rows, width(columns, bits)) for width in (packed_words, _loose_words)}:
        raise FileFormatError(
            f"tensor {words!r} has shape {list(found)}, which does not hold the [{rows}, {columns}] {bits}-bit weights "
            f"that {size!r} tells of",
            where=tensors.where,
            remedy=REMEDY,
        )
    tensors.check(words, found, "I32")

    def codes() -> Tensor:
        return _lowered(_unpack(tensors.get(words), bits, columns), bits)

    return _layer(tensors, name, scheme, (rows, columns), (words, size), codes)


def _unpacked(tensors: Tensors, name: str, scheme: Scheme) -> PackedLayer:
    weight = f"{name}.weight"
    shape = tensors.matrix(weight)
    tensors.check(weight, shape, "I8")
    # Such a file spends a byte on every code, whatever its bits are.
    eight = Scheme(scheme.targets, 8, scheme.symmetric, scheme.strategy, scheme.group_size, scheme.int8_activations)
    return _layer(tensors, name, eight, shape, (weight,), partial(tensors.get, weight))


def _layer(
    tensors: Tensors, name: str, scheme: Scheme, shape: tuple[int, int], parts: tuple[str, ...], codes: Any
) -> PackedLayer:
    rows, columns = shape
    group = scheme.group_size if scheme.strategy == "group" else columns
    groups = -(-columns // group)
    scale, zero, order = (f"{name}.weight_{part}" for part in ("scale", "zero_point", "g_idx"))
    whole = scheme.strategy == "tensor"
    tensors.check(scale, (1,) if whole else (rows, groups), *FLOATS)
    if not scheme.symmetric or tensors.has(zero):
        _check_zeros(tensors, zero, scheme, rows, groups)
    group_of_I = tensors.order(order, columns, group, groups)
    names = (scale, *parts, *(part for part in (zero, order) if tensors.has(part)))

    def read() -> Codes:
        scales_OG = tensors.get(scale).reshape(-1, groups).expand(rows, groups)
        zeros_OG = _zeros(tensors, zero, scheme, rows, groups) if tensors.has(zero) else None
        return Codes(codes(), scales_OG, zeros_OG, group_of_I)

    return PackedLayer(scheme.bits, group, scheme.symmetric, shape, names, read)


def _check_zeros(tensors: Tensors, name: str, scheme: Scheme, rows: int, groups: int) -> None:
    found = tensors.shape(name)
    if scheme.strategy == "tensor":
        tensors.check(name, (1,), "I8")
    elif tensors.folder.tensors[name].dtype == "I32":
        loose = (_loose_words(rows, scheme.bits), groups)
        tensors.check(name, loose if found == loose else (packed_words(rows, scheme.bits), groups), "I32")
    else:
        tensors.check(name, (rows, groups), "I8", "I32")


def _zeros(tensors: Tensors, name: str, scheme: Scheme, rows: int, groups: int) -> Tensor:
    stored = tensors.get(name)
    if stored.dtype == torch.int8:
        return stored.reshape(-1, groups).expand(rows, groups)
    return _lowered(_unpack(stored.T.contiguous(), scheme.bits, rows).T.contiguous(), scheme.bits)


def _lowered(numbers: Tensor, bits: int) -> Tensor:
    return (numbers - (1 << bits - 1)).view(torch.int8)  # below zero, bytes wrap around as int8 does


def _loose_words(columns: int, bits: int) -> int:
    """Old versions of the library put only whole numbers into a word: ten of 3 bits."""
    return -(-columns // (32 // bits))


def _unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    if words.shape[1] == packed_words(columns, bits):
        return unpack_bits(words, bits, columns)
    shifts = torch.arange(0, 32 - bits + 1, bits)
    numbers = words[:, :, None] >> shifts & (1 << bits) - 1
    return numbers.to(torch.uint8).flatten(1)[:, :columns]
