"""A model of ours as a GGUF file, which llama.cpp and its relatives open."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.gguf import (
    GGMLType,
    TensorSource,
    TypedValue,
    boolean,
    f32,
    i32,
    quantize,
    string,
    u32,
    write_gguf,
)
from craton.checkpoints.gguf_architectures import ARCHITECTURES
from craton.checkpoints.gguf_model import POOLING_MODES, Metadata, read_config
from craton.checkpoints.gguf_quantized import quantized_tensor
from craton.checkpoints.gguf_rotary import Factors, write_rope
from craton.checkpoints.gguf_table import Architecture
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.names import Entry
from craton.errors import CheckpointError, UnknownName
from craton.modalities.text import Tokenizer, gguf_metadata_from_tokenizer
from craton.modalities.text.gguf_export import GGUF_TYPES
from craton.models import AnyModel, EncoderConfig, ModelConfig, PoolingConfig, TextModelConfig

GGUFKind = Literal["F16", "BF16", "Q8_0", "Q6_K", "Q4_K", "Q4_1", "Q4_0"]

FILE_TYPES: Mapping[str, int] = {  # `general.file_type`, by the kind of most matrices
    "F16": 1,
    "BF16": 32,
    "Q8_0": 7,
    "Q6_K": 18,
    "Q4_K": 14,
    "Q4_1": 3,
    "Q4_0": 2,
}
ENDS = ("token_embd.weight", "output.weight")  # the matrices that suffer most from few bits
END_TYPES = {"Q4_0": GGMLType.Q8_0, "Q4_1": GGMLType.Q8_0, "Q4_K": GGMLType.Q6_K}
# For rows that are not whole blocks, what llama.cpp takes as well.
NARROWER = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q6_K: GGMLType.Q8_0}
ALWAYS_F32 = re.compile(r".*ffn_gate_inp\.weight|position_embd\.weight|token_types\.weight")

WRITERS = {
    "bool": boolean,
    "string": string,
    "uint32": u32,
    "array of float32": f32,
    "array of int32": i32,
    "array of string": string,
}
UNUSED = 5  # the type of a token that no text gives
UNUSED_SCORE = -10000.0


def save_gguf(
    model: AnyModel,
    family: Family,
    tokenizer: Tokenizer,
    path: str | Path,
    kind: GGUFKind = "F16",
    *,
    pooling: PoolingConfig | None = None,
    quantized: Mapping[str, IntWeight] | None = None,
    ends: GGUFKind | None = None,
) -> Path:
    """Write `model` to the file `path`, its matrices as `kind`; vectors, positions and expert routers stay F32.

    The embedding and the head keep more bits: Q8_0 in a file of Q4_0 or Q4_1, Q6_K in one of Q4_K. Rows that are not
    whole blocks of 256 become Q5_0 instead of Q4_K and Q8_0 instead of Q6_K, those that are not of 32 become F16.

    ends: the kind of the embedding and the head, where it is not to follow from `kind`. quantized: by our names of
    modules ("trunk.layers.0.attention.q"), weights that are integers already and go to the file as they are, whatever
    `kind` is: up to 4 bits as Q4_0 or, with zeros, Q4_1, 8 bits as Q8_0 (see `int_blocks`; 8 bits with zeros have no
    type and are rounded again). They are not read from the model and may lie on the meta device. pooling: how a
    sentence encoder is to be read. What the file will say is read back before it is written, so that it never
    describes another model than this one; the file replaces what was there once it is complete.

    Raises CheckpointError for a model, a tokeniser or groups that GGUF cannot describe and for weights that `kind`
    cannot hold (NaN, infinite, too large), UnknownName for another kind, StoreError where the disk refuses.
    """
    if kind not in get_args(GGUFKind):
        raise UnknownName("GGUF kind", kind, get_args(GGUFKind))
    path = Path(path)
    hf = family.write_config(model.config)
    architecture = _architecture(hf["architectures"][0])
    settings = _settings(architecture, hf, pooling)
    rope, factors = _rope(model.config, architecture)
    tensors = _tensors(model, family, architecture, hf, kind, quantized or {}, GGMLType[ends] if ends else None)
    for name, divisors in factors.items():
        blocks = partial(quantize, divisors[None], GGMLType.F32, name=name)
        tensors.append(TensorSource(name, divisors.shape, GGMLType.F32, blocks))
    assert isinstance(model.config, TextModelConfig), "the architectures of GGUF that are known are of texts"
    metadata = {
        "general.architecture": string(architecture.name),
        "general.type": string("model"),
        "general.file_type": u32(_file_type(tensors) if quantized else FILE_TYPES[kind]),
        "general.quantization_version": u32(2),
        **{f"{architecture.name}.{key}": value for key, value in {**settings, **rope}.items()},
    }
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    read_back = read_config(Metadata(_plain(metadata), str(path)), architecture, shapes, factors)
    _check_same(model.config, family_of(read_back, str(path)).config(Keys(read_back, str(path))), architecture)
    write_gguf(path, metadata | _vocabulary(tokenizer, model.config), tensors)
    return path


def _architecture(name: str) -> Architecture:
    for architecture in ARCHITECTURES:
        if name in architecture.hf_architectures:
            return architecture
    known = ", ".join(sorted(name for architecture in ARCHITECTURES for name in architecture.hf_architectures))
    raise CheckpointError(
        f"{name} cannot be written as GGUF",
        remedy=f"save it in the Hugging Face layout; GGUF is written for {known}",
    )


def _settings(
    architecture: Architecture, hf: Mapping[str, Any], pooling: PoolingConfig | None
) -> dict[str, TypedValue]:
    writers = {int: u32, float: f32, bool: boolean}
    settings = {
        key.inside: writers[key.kind](hf[key.theirs]) for key in architecture.keys if hf.get(key.theirs) is not None
    }
    settings |= {key: boolean(value) for key, value in architecture.fixed.items()}
    settings["vocab_size"] = u32(hf["vocab_size"])
    if "attention.key_length" in settings:
        settings["attention.value_length"] = settings["attention.key_length"]
    if pooling is not None:
        settings["pooling_type"] = u32(next(n for n, mode in POOLING_MODES.items() if mode == pooling.mode))
    return settings


def _rope(config: ModelConfig, architecture: Architecture) -> tuple[dict[str, TypedValue], Factors]:
    """The rotary metadata and tensors. Where sliding layers rotate by another base, that is said besides."""
    layers = [layer.attention for layer in config.trunk.layers]
    sliding = [layer.rotary for layer in layers if layer.rotary is not None and layer.window is not None]
    others = [layer.rotary for layer in layers if layer.rotary is not None and layer.window is None]
    if not sliding + others:
        return {}, {}
    main = (others or sliding)[0]
    metadata, factors = write_rope(main)
    if sliding and sliding[0].theta != main.theta:
        metadata["rope.freq_base_swa"] = f32(sliding[0].theta)
    if not set(factors) <= set(architecture.rope_factors):
        raise CheckpointError(
            f"GGUF has no way to say this rope scaling for {architecture.hf_architectures[0]}",
            remedy="save it in the Hugging Face layout",
        )
    return metadata, factors


@dataclass(frozen=True)
class _Part:
    """One of Hugging Face's tensors, as it is made of ours."""

    theirs: str
    entry: Entry
    index: int

    def make(self, ours: Mapping[str, Tensor], architecture: Architecture, hf: Mapping[str, Any]) -> Tensor:
        tensor = self.entry.save([ours[name] for name in self.entry.ours])[self.index]
        change = architecture.change_of(self.theirs)
        return change.store(tensor, hf) if change else tensor


def _tensors(
    model: AnyModel,
    family: Family,
    architecture: Architecture,
    hf: Mapping[str, Any],
    kind: GGUFKind,
    quantized: Mapping[str, IntWeight],
    ends: GGMLType | None,
) -> list[TensorSource]:
    weights = {f"{name}.weight": weight for name, weight in quantized.items()}
    ours = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    ours |= {name: torch.empty(weight.shape, device="meta") for name, weight in weights.items()}
    outlines = {name: tensor.to("meta") for name, tensor in ours.items()}  # for shapes, without any work
    stacks: dict[str, dict[int, _Part]] = {}
    for part in _parts(family.entries(model.config)):
        missing = next((name for name in part.entry.ours if name not in ours), None)
        if missing:
            raise CheckpointError(
                f"{missing!r} has no plain weight to save",
                remedy="load the checkpoint with a floating-point dtype (dtype='float32') and save that",
            )
        place = architecture.in_file(part.theirs)
        if place is not None:
            stacks.setdefault(place[0], {})[place[1] or 0] = part
        elif not any(re.match(pattern, part.theirs) for pattern in architecture.unplaced):
            raise CheckpointError(f"GGUF has no place for tensor {part.theirs!r} of {architecture.hf_architectures[0]}")

    def tensor(inside: str, weights: Mapping[str, Tensor]) -> Tensor:
        parts = [stacks[inside][n].make(weights, architecture, hf) for n in sorted(stacks[inside])]
        return torch.stack(parts) if inside.endswith("_exps.weight") else parts[0]

    def source(inside: str) -> TensorSource:
        shape = tuple(tensor(inside, outlines).shape)
        parts = {name: weights.pop(name, None) for part in stacks[inside].values() for name in part.entry.ours}
        if any(parts.values()):
            return quantized_tensor(inside, shape, parts, partial(tensor, inside))
        type = _type(inside, shape, kind, ends)

        def blocks() -> Any:
            values = tensor(inside, ours).float().cpu().contiguous().numpy()
            return quantize(values.reshape(-1, shape[-1]), type, name=f"tensor {inside!r}")

        return TensorSource(inside, shape, type, blocks)

    sources = [source(inside) for inside in stacks]
    if weights:
        raise CheckpointError(
            f"{next(iter(weights))!r} has no place of its own in a GGUF file of {architecture.hf_architectures[0]}",
            remedy="a tied head is the embedding's matrix: quantise the embedding instead, or leave it as it is",
        )
    return sources


def _parts(entries: list[Entry]) -> Iterator[_Part]:
    for entry in entries:
        for index, theirs in enumerate(entry.theirs):
            yield _Part(theirs, entry, index)


def _type(inside: str, shape: tuple[int, ...], kind: GGUFKind, ends: GGMLType | None) -> GGMLType:
    if len(shape) == 1 or ALWAYS_F32.fullmatch(inside):
        return GGMLType.F32
    type = (ends or END_TYPES.get(kind, GGMLType[kind])) if inside in ENDS else GGMLType[kind]
    if shape[-1] % type.block_size:
        type = NARROWER.get(type, GGMLType.F16)
    return GGMLType.F16 if shape[-1] % type.block_size else type


def _file_type(tensors: list[TensorSource]) -> int:
    """Of a mixture: what most of its numbers are."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.type.name in FILE_TYPES:
            sizes[tensor.type.name] += math.prod(tensor.shape)
    return FILE_TYPES[sizes.most_common(1)[0][0]]


def _vocabulary(tokenizer: Tokenizer, config: TextModelConfig) -> dict[str, TypedValue]:
    """The tokeniser's metadata, with a name for every row of the embedding that has no token."""
    values, size = gguf_metadata_from_tokenizer(tokenizer), config.vocab
    tokens = values["tokenizer.ggml.tokens"]
    if len(tokens) > size:
        raise CheckpointError(
            f"the tokeniser has {len(tokens)} tokens, the model {size}", remedy="export with the model's own tokeniser"
        )
    spare = range(len(tokens), size)
    values["tokenizer.ggml.tokens"] = tokens + [f"[PAD{n}]" for n in spare]
    values["tokenizer.ggml.token_type"] = values["tokenizer.ggml.token_type"] + [UNUSED for _ in spare]
    if "tokenizer.ggml.scores" in values:
        values["tokenizer.ggml.scores"] = values["tokenizer.ggml.scores"] + [UNUSED_SCORE for _ in spare]
    typed = {key: WRITERS[GGUF_TYPES.get(key, "string")](value) for key, value in values.items()}
    if isinstance(config, EncoderConfig):
        typed["tokenizer.ggml.token_type_count"] = u32(config.token_types)
    return typed


def _plain(metadata: Mapping[str, TypedValue]) -> dict[str, Any]:
    return {key: typed.value for key, typed in metadata.items()}


def _check_same(config: ModelConfig, read_back: ModelConfig, architecture: Architecture) -> None:
    if isinstance(config, EncoderConfig):
        config = config.model_copy(update={"pooler": False})
    place = _difference(config.model_dump(), read_back.model_dump())
    if place:
        raise CheckpointError(
            f"GGUF cannot describe this model: files for {architecture.hf_architectures[0]} leave {place} unsaid, and "
            "their readers take another value",
            remedy="save it in the Hugging Face layout",
        )


def _difference(one: Any, other: Any, place: str = "") -> str | None:
    """Where two dumped configs differ by more than fp32 can tell."""
    if isinstance(one, float) and isinstance(other, float):
        return None if math.isclose(one, other, rel_tol=1e-6) else place
    if isinstance(one, tuple | list) and isinstance(other, tuple | list) and len(one) == len(other):
        one, other = dict(enumerate(one)), dict(enumerate(other))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        found = (_difference(one[key], other[key], f"{place}.{key}".lstrip(".")) for key in one)
        return next(filter(None, found), None)
    return None if one == other else place
