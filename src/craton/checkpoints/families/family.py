"""What a family file provides, and the checked reading of a `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import Any, TypeVar

from craton.checkpoints.names import Entry
from craton.errors import CheckpointError
from craton.models import ModelConfig
from craton.trunk import RotaryConfig, RotaryScaling

V = TypeVar("V")


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
        return self.get(key, kind, None)  # type: ignore[arg-type]

    def get(self, key: str, kind: type[V], default: V) -> V:
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

    def has(self, key: str) -> bool:
        """Whether `key` is present and not null."""
        return self.values.get(key) is not None

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
    prefixes: what may stand before every name or be missing (BERT files with and without "bert.").
    """

    name: str
    architectures: tuple[str, ...]
    read_config: Callable[[Keys], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    entries: Callable[[ModelConfig], list[Entry]]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()


def read_rotary(keys: Keys, dims: int, *, layer_type: str | None = None, interleaved: bool = False) -> RotaryConfig:
    """The rotary settings, from `rope_parameters` (transformers 5) or from `rope_theta` and `rope_scaling` (before)."""
    parameters = keys.get("rope_parameters", dict, {})
    if layer_type is not None and isinstance(parameters.get(layer_type), dict):
        parameters = parameters[layer_type]
    scaling = parameters or keys.get("rope_scaling", dict, {})
    theta = scaling.get("rope_theta") or keys.get("rope_theta", float, 10000.0)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    where = Keys(scaling, f"{keys.where}: rope scaling")
    return RotaryConfig(
        dims=dims, theta=float(theta), interleaved=interleaved, scaling=_read_scaling(kind, where, keys)
    )


def _read_scaling(kind: str, scaling: Keys, keys: Keys) -> RotaryScaling | None:
    if kind == "default":
        return None
    context = keys.need("max_position_embeddings", int)
    original = scaling.get("original_max_position_embeddings", int, 0) or keys.get(
        "original_max_position_embeddings", int, context
    )
    factor = scaling.get("factor", float, 0.0) or context / original
    if kind == "linear":
        return RotaryScaling(kind="linear", factor=factor)
    if kind == "llama3":
        return RotaryScaling(
            kind="llama3",
            factor=factor,
            original_context=original,
            low_freq_factor=scaling.need("low_freq_factor", float),
            high_freq_factor=scaling.need("high_freq_factor", float),
        )
    if kind == "yarn":
        return RotaryScaling(
            kind="yarn",
            factor=factor,
            original_context=original,
            attention_factor=_yarn_attention_factor(scaling, factor),
            beta_fast=scaling.get("beta_fast", float, 32.0),
            beta_slow=scaling.get("beta_slow", float, 1.0),
            truncate=scaling.get("truncate", bool, True),
        )
    if kind in ("longrope", "su"):
        stretch = sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
        return RotaryScaling(
            kind="longrope",
            factor=factor,
            original_context=original,
            attention_factor=scaling.get("attention_factor", float, stretch),
            short_factors=tuple(scaling.need("short_factor", list)),
            long_factors=tuple(scaling.need("long_factor", list)),
        )
    raise CheckpointError(
        f"unknown rope scaling {kind!r}", where=scaling.where, remedy="known: default, linear, llama3, yarn, longrope"
    )


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's length-dependent temperature: 0.1 m ln(s) + 1 (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(scaling: Keys, factor: float) -> float:
    given = scaling.get("attention_factor", float, 0.0)
    if given:
        return given
    mscale, all_dim = scaling.get("mscale", float, 0.0), scaling.get("mscale_all_dim", float, 0.0)
    if mscale and all_dim:
        return yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    return yarn_magnitude(factor)


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
