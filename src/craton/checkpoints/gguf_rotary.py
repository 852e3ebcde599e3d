"""Rotary positions in GGUF: its metadata and its tensors of factors, to and from the `rope_parameters` of config.json.

GGUF knows linear scaling and YaRN by name. What else stretches frequencies is a tensor with a divisor for each
rotated pair: one for Llama 3's scaling, and one for short and one for long sequences for LongRoPE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from craton.checkpoints.families.family import Keys, yarn_magnitude
from craton.checkpoints.gguf import TypedValue, f32, string, u32
from craton.errors import CheckpointError
from craton.trunk import RotaryConfig, RotaryScaling
from craton.trunk.positions import inverse_frequencies

ALWAYS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
LLAMA3_CONTEXT = 8192  # before stretching, of all Llama 3 models; files do not say it
THETA = 10000.0

Factors = Mapping[str, npt.NDArray[np.float32]]


def read_rope(keys: Keys, prefix: str, dims: int, context: int, factors: Factors) -> dict[str, Any]:
    """`rope_parameters` of config.json.

    keys: the metadata, with "ARCHITECTURE.rope" as `prefix`. dims: of each head, how many numbers are rotated. context:
    of the stretched model. factors: the tensors of divisors that the file holds.
    """
    theta = keys.get(f"{prefix}.freq_base", float, THETA)
    original = keys.get(f"{prefix}.scaling.original_context_length", int, 0)
    kind = keys.get(f"{prefix}.scaling.type", str, "linear")
    factor = keys.get(f"{prefix}.scaling.factor", float, 0.0) or keys.get(f"{prefix}.scale_linear", float, 0.0)
    values: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    _check_factors(factors, dims, keys.where)
    if LONG in factors:
        return values | {
            "rope_type": "longrope",
            "original_max_position_embeddings": original or context,
            "attention_factor": keys.get(f"{prefix}.scaling.attn_factor", float, 1.0),
            "long_factor": shortest(factors[LONG]),
            "short_factor": shortest(factors[SHORT]),
        }
    if ALWAYS in factors and (kind == "none" or factor in (0.0, 1.0)):
        return values | _divided(factors[ALWAYS], dims, theta, original or LLAMA3_CONTEXT, context)
    if ALWAYS in factors:
        raise CheckpointError(f"rotary factors in {ALWAYS} and {kind} rope scaling at once", where=keys.where)
    if kind == "linear" and factor not in (0.0, 1.0):
        return values | {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and factor > 1.0:
        values |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original or context}
        return values | _yarn(keys, prefix, factor)
    if kind in ("none", "linear", "yarn"):
        return values
    raise CheckpointError(
        "rope scaling 'longrope' without its tensors of factors"
        if kind == "longrope"
        else f"unknown rope scaling {kind!r}",
        where=f"{keys.where}: key '{prefix}.scaling.type'",
        remedy="known: none, linear, yarn, longrope",
    )


def write_rope(rotary: RotaryConfig) -> tuple[dict[str, TypedValue], dict[str, npt.NDArray[np.float32]]]:
    """The metadata (after the architecture's name) and the tensors of factors for `rotary`."""
    metadata = {"rope.dimension_count": u32(rotary.dims), "rope.freq_base": f32(rotary.theta)}
    scaling = rotary.scaling
    if scaling is None:
        return metadata, {}
    if scaling.original_context is not None:
        metadata["rope.scaling.original_context_length"] = u32(scaling.original_context)
    if scaling.kind == "llama3" or (scaling.kind == "longrope" and scaling.short_factors == scaling.long_factors):
        return metadata, {ALWAYS: _divisors(rotary)}
    metadata["rope.scaling.type"] = string(scaling.kind)
    if scaling.kind == "longrope":
        metadata["rope.scaling.attn_factor"] = f32(scaling.attention_factor)
        return metadata, {
            LONG: np.asarray(scaling.long_factors, np.float32),
            SHORT: np.asarray(scaling.short_factors, np.float32),
        }
    metadata["rope.scaling.factor"] = f32(scaling.factor)
    if scaling.kind == "yarn":
        metadata |= {
            # GGUF multiplies this with YaRN's own magnitude; config.json's factor is the product.
            "rope.scaling.attn_factor": f32(scaling.attention_factor / yarn_magnitude(scaling.factor)),
            "rope.scaling.yarn_beta_fast": f32(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": f32(scaling.beta_slow),
        }
    return metadata, {}


def shortest(values: Iterable[np.float32]) -> list[float]:
    """Each fp32 number as the shortest decimal that it is the nearest to: 0.1 and not 0.10000000149."""
    return [float(str(np.float32(value))) for value in values]


def _check_factors(factors: Factors, dims: int, where: str) -> None:
    if set(factors) not in (set(), {ALWAYS}, {LONG, SHORT}):
        raise CheckpointError(f"rotary factors in {', '.join(sorted(factors))} alone", where=where)
    for name, tensor in factors.items():
        if tensor.shape != (dims // 2,) or not (np.isfinite(tensor) & (tensor > 0)).all():
            raise CheckpointError(f"tensor {name!r} must hold {dims // 2} positive rotary factors", where=where)


def _yarn(keys: Keys, prefix: str, factor: float) -> dict[str, Any]:
    # The magnitude of q.k: given whole, or as a multiple of YaRN's own, or by DeepSeek's two multipliers (the upper
    # one is 1 in every file).
    whole = keys.get(f"{prefix}.scaling.yarn_attn_factor", float, 0.0)
    multiplier = keys.get(f"{prefix}.scaling.yarn_log_multiplier", float, 0.0)
    magnitude = yarn_magnitude(factor) / (yarn_magnitude(factor, multiplier) if multiplier else 1.0)
    return {
        "attention_factor": whole or magnitude * keys.get(f"{prefix}.scaling.attn_factor", float, 1.0),
        "beta_fast": keys.get(f"{prefix}.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": keys.get(f"{prefix}.scaling.yarn_beta_slow", float, 1.0),
    }


def _divided(divisors: npt.NDArray[np.float32], dims: int, theta: float, original: int, context: int) -> dict[str, Any]:
    # Files hold what Llama 3's scaling does to each frequency, not its settings. These are recognised by trying the
    # ones that all such models have; anything else is kept as it is, as LongRoPE that is the same for every length.
    settings: dict[str, Any] = {
        "factor": round(float(divisors.max()), 3),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    llama3 = RotaryScaling(kind="llama3", original_context=original, **settings)
    if np.allclose(
        _divisors(RotaryConfig(dims=dims, theta=theta, interleaved=False, scaling=llama3)), divisors, rtol=1e-4
    ):
        return {"rope_type": "llama3", "original_max_position_embeddings": original, **settings}
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": context,
        "attention_factor": 1.0,
        "long_factor": shortest(divisors),
        "short_factor": shortest(divisors),
    }


def _divisors(rotary: RotaryConfig) -> npt.NDArray[np.float32]:
    plain = inverse_frequencies(rotary.model_copy(update={"scaling": None}))
    divisors: npt.NDArray[np.float32] = (plain / inverse_frequencies(rotary)).numpy()
    return divisors
