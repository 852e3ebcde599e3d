"""What a family file provides, and the checked reading of a `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, nextafter, sqrt
from typing import Any, TypeVar

from pydantic import ValidationError

from craton.checkpoints.names import Entry
from craton.errors import CheckpointError
from craton.models import ModelConfig
from craton.trunk import RotaryConfig, RotaryScaling

V = TypeVar("V")
D = TypeVar("D")


class Keys:
    """A `config.json` (Hugging Face layout) read key by key; a missing key or wrong type is an error that names it.

    tensors: the names in the weight files, for the few switches that only they tell.
    """

    def __init__(self, values: Mapping[str, Any], where: str, tensors: frozenset[str] = frozenset()) -> None:
        self.values, self.where, self.tensors = values, where, tensors

    def need(self, key: str, kind: type[V]) -> V:
        """The value of `key`, which must be there."""
        if self.values.get(key) is None:
            raise CheckpointError(f"the config lacks {key!r}", where=self.where)
        value = self.get(key, kind, None)
        assert value is not None
        return value

    def get(self, key: str, kind: type[V], default: D) -> V | D:
        """The value of `key`, or `default` where it is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(
                f"{key!r} must be of type {kind.__name__}, not {value!r}", where=f"{self.where}: key {key!r}"
            )
        return value

    def count(self, key: str) -> int:
        """The value of `key`, which must be there, as a number of things: 1 or more."""
        value = self.need(key, int)
        if value < 1:
            raise CheckpointError(f"{key!r} must be at least 1, not {value}", where=f"{self.where}: key {key!r}")
        return value

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self.values.get(key) is not None

    def defaulting(self, **defaults: Any) -> Keys:
        """The same keys, `defaults` standing in for those that are absent; one that is null stays null."""
        return Keys({**defaults, **self.values}, self.where, self.tensors)

    def refuse(self, key: str, *allowed: Any) -> None:
        """Refuse the config where `key` is present with a value other than `allowed` (something we do not do)."""
        if self.has(key) and self.values[key] not in allowed:
            raise CheckpointError(
                f"{key} = {self.values[key]!r} is not supported (supported: {', '.join(map(repr, allowed))})",
                where=f"{self.where}: key {key!r}",
            )


@dataclass(frozen=True)
class Family:
    """One published family.

    read_config / write_config: between its config.json and ours. entries: its tensor names, for one config.
    ignored: regular expressions of tensors that published files carry and nobody needs (old rotary buffers).
    renames: (regular expression, replacement) pairs that turn the older names of tensors into those of `entries`.
    modules: such pairs from the path of a tensor's module in the files to its path in transformers' classes, where that
    is another, as PEFT's files name it.
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Keys], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], list[Entry]]
    ignored: tuple[str, ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    modules: tuple[tuple[str, str], ...] = ()

    def current_name(self, name: str) -> str:
        """The name in `entries` of a tensor that files may hold under an older one."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def config(self, keys: Keys) -> ModelConfig:
        """`read_config`, where values of the right type that make no model (0 heads, factor -1) are refused as well."""
        try:
            return self.read_config(keys)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            what = f"the config makes no model: {error.title} {field}: {first['msg']} (got {first['input']!r})"
            raise CheckpointError(what, where=keys.where) from None
        except (ArithmeticError, ValueError) as error:
            raise CheckpointError(f"the config makes no model: {error}", where=keys.where) from None


def rotary_keys(keys: Keys, layer_type: str | None = None) -> Keys:
    """`rope_parameters` (transformers 5; of `layer_type` where layers differ), or `rope_scaling` (before)."""
    key = "rope_parameters" if keys.get("rope_parameters", dict, None) else "rope_scaling"
    values: dict[str, Any] = keys.get(key, dict, {})
    if layer_type is not None and isinstance(values.get(layer_type), dict):
        values = values[layer_type]
    return Keys(values, f"{keys.where}: key {key!r}")


def read_rotary(keys: Keys, dims: int, *, layer_type: str | None = None, interleaved: bool = False) -> RotaryConfig:
    """The rotary settings, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    parameters = rotary_keys(keys, layer_type)
    return RotaryConfig(
        dims=dims,
        theta=parameters.get("rope_theta", float, keys.get("rope_theta", float, 10000.0)),
        interleaved=interleaved,
        scaling=_read_scaling(parameters, keys, dims),
    )


def _read_scaling(scaling: Keys, keys: Keys, dims: int) -> RotaryScaling | None:
    kind = scaling.get("rope_type", str, scaling.get("type", str, "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=scaling.need("factor", float))
    context = keys.need("max_position_embeddings", int)
    # A config that names it at its top level (Phi-3) means that one; where nothing is said it is the whole context.
    inner = scaling.get("original_max_position_embeddings", int, context)
    original = keys.get("original_max_position_embeddings", int, inner)
    if original < 2:
        raise CheckpointError(f"a context of {original} tokens cannot be the original one", where=scaling.where)
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3",
            factor=scaling.need("factor", float),
            original_context=original,
            low_freq_factor=scaling.need("low_freq_factor", float),
            high_freq_factor=scaling.need("high_freq_factor", float),
        )
    factor = scaling.get("factor", float, context / original)
    if kind == "yarn":
        return RotaryScaling(
            kind="yarn",
            factor=factor,
            original_context=original,
            attention_factor=scaling.get("attention_factor", float, _yarn_attention_factor(scaling, factor)),
            beta_fast=scaling.get("beta_fast", float, 32.0),
            beta_slow=scaling.get("beta_slow", float, 1.0),
            truncate=scaling.get("truncate", bool, True),
        )
    if kind in ("longrope", "su"):  # "su" in the first configs of Phi-3
        stretch = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
        return RotaryScaling(
            kind="longrope",
            factor=factor,
            original_context=original,
            attention_factor=scaling.get("attention_factor", float, stretch),
            short_factors=_read_factors(scaling, "short_factor", dims),
            long_factors=_read_factors(scaling, "long_factor", dims),
        )
    raise CheckpointError(
        f"unknown rope scaling {kind!r}",
        where=f"{scaling.where}: key 'rope_type'",
        remedy="known: default, linear, llama3, yarn, longrope",
    )


def _read_factors(scaling: Keys, key: str, dims: int) -> tuple[float, ...]:
    factors = scaling.need(key, list)
    if len(factors) != dims // 2:
        raise CheckpointError(
            f"{key!r} must hold one factor for each of the {dims // 2} rotated pairs, not {len(factors)}",
            where=scaling.where,
        )
    return tuple(factors)


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's length-dependent temperature: 0.1 m ln(s) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(scaling: Keys, factor: float) -> float:
    mscale, all_dim = scaling.get("mscale", float, 0.0), scaling.get("mscale_all_dim", float, 0.0)
    if mscale and all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return yarn_magnitude(factor)


def read_rotated(keys: Keys, size: int) -> int:
    """How many numbers of each head of `size` are rotated: `partial_rotary_factor` of them, all if it is absent."""
    share = rotary_keys(keys).get("partial_rotary_factor", float, keys.get("partial_rotary_factor", float, 1.0))
    rotated = int(size * share)
    if not 0 < rotated <= size or rotated % 2:
        raise CheckpointError(
            f"{share:g} of a head of {size} is not a number of pairs to rotate",
            where=f"{keys.where}: keys 'partial_rotary_factor', 'head_dim'",
        )
    return rotated


def write_rotated(rotated: int, size: int) -> float:
    """The inverse of `read_rotated`: a share that gives `rotated` again when it is multiplied and cut off."""
    share = rotated / size
    return share if int(size * share) == rotated else nextafter(share, 1.0)


def write_rotary(rotary: RotaryConfig) -> dict[str, Any]:
    """The inverse of `read_rotary`: the value of `rope_parameters`."""
    values: dict[str, Any] = {"rope_theta": rotary.theta, "rope_type": "default"}
    scaling = rotary.scaling
    if scaling is None:
        return values
    values |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.original_context is not None:
        values["original_max_position_embeddings"] = scaling.original_context
    if scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
    if scaling.kind == "longrope":
        values |= {"short_factor": list(scaling.short_factors), "long_factor": list(scaling.long_factors)}
    if scaling.kind in ("yarn", "longrope"):
        values["attention_factor"] = scaling.attention_factor
    return values
