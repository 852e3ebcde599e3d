"""A GGUF file as a checkpoint: its metadata as a config.json, its tensors under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch

from craton.checkpoints.families.decoder import layer_count
from craton.checkpoints.families.family import Keys, write_rotated
from craton.checkpoints.finite import SCALES_AT
from craton.checkpoints.gguf import GGMLType, GGUFFile, dequantize
from craton.checkpoints.gguf_architectures import ARCHITECTURES
from craton.checkpoints.gguf_changes import Change
from craton.checkpoints.gguf_rotary import Factors, read_rope, shortest
from craton.checkpoints.gguf_table import Architecture, Shapes
from craton.checkpoints.weights import QuantizedTensor, Weight
from craton.errors import CheckpointError, did_you_mean
from craton.models import PoolingConfig

V = TypeVar("V")
D = TypeVar("D")

MAX_EXPERTS = 4096
PLAIN = {GGMLType.F32: torch.float32, GGMLType.F16: torch.float16, GGMLType.BF16: torch.bfloat16}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"

# Settings that change a model's output and that no architecture here has, with the values that change nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "embedding_scale": (0.0, 1.0),
    "expert_weights_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
}

# The numbers of `pooling_type`; 0 is none, 4 a reranker's.
POOLING_MODES: Mapping[int, Literal["mean", "cls", "last"]] = {1: "mean", 2: "cls", 3: "last"}


class Metadata(Keys):
    """The metadata, read key by key. Numbers come as the shortest decimals that their file has the nearest value of."""

    def get(self, key: str, kind: type[V], default: D) -> V | D:
        """The value of `key`; a list in which every layer has the same value counts as that value."""
        value = self.values.get(key)
        if isinstance(value, list):
            if not value or value.count(value[0]) != len(value):
                raise CheckpointError(
                    f"{key!r} differs from layer to layer, which is not supported",
                    where=f"{self.where}: key {key!r}",
                )
            value = value[0]
        if isinstance(value, float):
            (value,) = shortest([np.float32(value)])
        return Keys({key: value}, self.where).get(key, kind, default)


@dataclass(frozen=True)
class Place:
    """Where the file holds one of Hugging Face's tensors: a whole tensor or one expert of a stack, and changed how."""

    inside: str
    expert: int | None
    change: Change | None


class GGUFSource:
    """The weights of a GGUF file under Hugging Face's names."""

    def __init__(self, file: GGUFFile, architecture: Architecture, hf: Mapping[str, Any]) -> None:
        self._file, self._hf = file, hf
        self._places: dict[str, Place] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        kinds: dict[str, str] = {}
        for inside, info in file.tensors.items():
            if inside in architecture.rope_factors:
                continue
            # A tensor that the architecture does not have keeps its name, to be refused by it.
            theirs, stacked = architecture.from_file(inside) or (inside, False)
            change, shape = architecture.change_of(theirs), info.shape
            if stacked:
                experts = hf[architecture.expert_count or ""]
                if len(shape) != 3 or shape[0] != experts or experts > MAX_EXPERTS:
                    raise CheckpointError(
                        f"tensor {inside!r} has shape {list(shape)}, which is not a stack of {experts} experts",
                        where=str(file.path),
                    )
                shape = shape[1:]
            for expert in range(info.shape[0]) if stacked else [None]:
                name = theirs.replace("{e}", str(expert))
                self._places[name] = Place(inside, expert, change)
                shapes[name] = change.shape(shape) if change else shape
                kinds[name] = info.type.name
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.kinds: Mapping[str, str] = kinds

    def weight(self, name: str) -> Weight:
        """The named tensor; what is in a block format stays so, unless it must be turned or is not a matrix."""
        place = self._places[name]
        info, blocks = self._file.tensors[place.inside], self._file.blocks(place.inside)
        shape = info.shape
        if place.expert is not None:
            shape = shape[1:]
            blocks = blocks[place.expert * shape[0] : (place.expert + 1) * shape[0]]
        if info.type in SCALES_AT and len(shape) == 2:
            weight: Weight = QuantizedTensor(info.type, blocks, shape)
        elif info.type in PLAIN:
            # As it is stored: a detour by float32 would take twice or thrice its memory.
            weight = torch.from_numpy(blocks.copy()).view(PLAIN[info.type]).view(shape)
            self.release()
        else:
            weight = torch.from_numpy(dequantize(blocks, info.type)).view(shape)
        return place.change.restore(weight, self._hf) if place.change else weight

    def release(self) -> None:
        """See `WeightSource.release`."""
        self._file.release()


def open_gguf_model(path: Path) -> tuple[dict[str, Any], GGUFSource, Mapping[str, Any]]:
    """Its config in Hugging Face's terms, its weights under Hugging Face's names, and its metadata.

    Raises FileFormatError for a damaged file, CheckpointError for an architecture or a setting that is not known.
    """
    file = GGUFFile.open(path)
    metadata = Metadata(file.metadata, f"{path}: metadata")
    parts = metadata.get("split.count", int, 1)
    if parts > 1:
        raise CheckpointError(
            f"this file is one of {parts} that hold the model together",
            where=str(path),
            remedy="join them first, with `llama-gguf-split --merge`",
        )
    architecture = find_architecture(metadata)
    factors = {name: file.array(name) for name in architecture.rope_factors if name in file.tensors}
    shapes = {name: info.shape for name, info in file.tensors.items()}
    hf = read_config(metadata, architecture, shapes, factors)
    return hf, GGUFSource(file, architecture, hf), metadata.values


def find_architecture(metadata: Metadata) -> Architecture:
    """What `general.architecture` and the number of experts name."""
    name = metadata.need("general.architecture", str)
    known = {architecture.name for architecture in ARCHITECTURES}
    if name not in known:
        near = did_you_mean(name, known)
        raise CheckpointError(
            f"unknown architecture {name!r}" + (f", did you mean {near}?" if near else ""),
            where=f"{metadata.where}: key 'general.architecture'",
            remedy=f"known architectures: {', '.join(sorted(known))}",
        )
    experts = metadata.get(f"{name}.expert_count", int, 0)
    for architecture in ARCHITECTURES:
        if architecture.name == name and bool(architecture.expert_count) == bool(experts):
            return architecture
    raise CheckpointError(
        f"architecture {name!r} with {experts} experts is not supported",
        where=f"{metadata.where}: key '{name}.expert_count'",
    )


def read_config(metadata: Metadata, architecture: Architecture, shapes: Shapes, factors: Factors) -> dict[str, Any]:
    """The config.json that `metadata` and the tensors' `shapes` amount to. factors: see `read_rope`."""
    prefix = architecture.name
    _refuse_settings(metadata, architecture)
    layer_count(metadata, f"{prefix}.block_count")
    if len(shapes.get(EMBEDDING, ())) != 2:
        raise CheckpointError(f"there is no matrix {EMBEDDING!r}", where=metadata.where.removesuffix(": metadata"))
    hf: dict[str, Any] = {
        "architectures": [architecture.hf_architectures[0]],
        "model_type": architecture.model_type,
        "vocab_size": shapes[EMBEDDING][0],
        "tie_word_embeddings": HEAD not in shapes,
    }
    for key in architecture.keys:
        name = f"{prefix}.{key.inside}"
        if key.required or metadata.has(name):
            hf[key.theirs] = metadata.need(name, key.kind)
    if architecture.rotary:
        heads = hf["num_attention_heads"]
        hf = {"num_key_value_heads": heads, "head_dim": hf["hidden_size"] // max(heads, 1)} | hf
        hf |= _read_rotary(metadata, architecture, hf, factors)
    return hf | architecture.conventions(hf, shapes)


def read_gguf_pooling(metadata: Mapping[str, Any]) -> PoolingConfig | None:
    """How a sentence encoder's file says that it is to be read; None where it does not."""
    number = Metadata(metadata, "metadata").get(f"{metadata['general.architecture']}.pooling_type", int, 0)
    return PoolingConfig(mode=POOLING_MODES[number]) if number in POOLING_MODES else None


def _refuse_settings(metadata: Metadata, architecture: Architecture) -> None:
    understood = {key.inside for key in architecture.keys}
    neutral = NEUTRAL | {key: (value,) for key, value in architecture.fixed.items()}
    for key, values in neutral.items():
        if key not in understood:
            metadata.refuse(f"{architecture.name}.{key}", *values)
    # One head size for keys and values.
    sizes = [f"{architecture.name}.attention.{part}_length" for part in ("key", "value")]
    if all(map(metadata.has, sizes)):
        metadata.refuse(sizes[1], metadata.values[sizes[0]])


def _read_rotary(
    metadata: Metadata, architecture: Architecture, hf: Mapping[str, Any], factors: Factors
) -> dict[str, Any]:
    prefix = f"{architecture.name}.rope"
    size, context = hf["head_dim"], hf["max_position_embeddings"]
    if size <= 0:
        return {}  # the family refuses such sizes, in its own words
    dims = metadata.get(f"{prefix}.dimension_count", int, size)
    rope = read_rope(metadata, prefix, dims, context, factors)
    if architecture.model_type == "gemma3_text":
        # Sliding layers have their own base and are never stretched.
        local = metadata.get(f"{prefix}.freq_base_swa", float, 10000.0)
        return {
            "rope_parameters": {
                "full_attention": rope,
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            }
        }
    share = {"partial_rotary_factor": write_rotated(dims, size)}
    return {"rope_parameters": rope | share, **share}
