"""CTranslate2's `model.bin` of a Whisper model, read under Hugging Face's names: what faster-whisper's users have.

The format (CTranslate2's model specification, binary versions 4 to 6), little-endian: u32 version; the specification's
name; u32 its revision; u32 number of variables; for each its name, u8 rank, u32 sizes, u8 type, u32 bytes, data; u32
number of aliases; for each two names. A name is a u16 length, and text that ends with a zero byte. Matrices of 8 bits
carry a `_scale` for each row, by which they were multiplied. No number in the file is believed before it is checked.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import Tensor

from craton.checkpoints.disk import release_pages
from craton.checkpoints.safetensors_header import PICKLE_REMEDY
from craton.checkpoints.weights import Weight
from craton.errors import CheckpointError, FileFormatError

FILE_NAME: Final = "model.bin"
VERSIONS: Final = range(4, 7)
MAX_VARIABLES: Final = 100_000
MAX_RANK: Final = 8
# Types by their number: (the name, numpy's type).
TYPES: Final = (("F32", "<f4"), ("I8", "i1"), ("I16", "<i2"), ("I32", "<i4"), ("F16", "<f2"), ("BF16", "<u2"))
ACTIVATIONS: Final = ("relu", "gelu_new", "silu", "gelu")  # by their number
FUSED: Final = ("q_proj", "k_proj", "v_proj")

# CTranslate2's name -> Hugging Face's: patterns that are tried in this order, on the whole name without its kind.
NAMES: Final = (
    (r"(encoder|decoder)/position_encodings/encodings", r"\1.embed_positions.weight"),
    (r"decoder/embeddings/weight", r"decoder.embed_tokens.weight"),
    (r"encoder/(conv\d)/(weight|bias)", r"encoder.\1.\2"),
    (r"(encoder|decoder)/layer_norm/(.*)", r"\1.layer_norm.\2"),
    (r"(\w+)/layer_(\d+)/self_attention/layer_norm/(.*)", r"\1.layers.\2.self_attn_layer_norm.\3"),
    (r"(\w+)/layer_(\d+)/attention/layer_norm/(.*)", r"\1.layers.\2.encoder_attn_layer_norm.\3"),
    (r"(\w+)/layer_(\d+)/ffn/layer_norm/(.*)", r"\1.layers.\2.final_layer_norm.\3"),
    (r"(\w+)/layer_(\d+)/ffn/linear_0/(.*)", r"\1.layers.\2.fc1.\3"),
    (r"(\w+)/layer_(\d+)/ffn/linear_1/(.*)", r"\1.layers.\2.fc2.\3"),
    (r"(\w+)/layer_(\d+)/self_attention/linear_0/(.*)", r"\1.layers.\2.self_attn.0,1,2.\3"),
    (r"(\w+)/layer_(\d+)/self_attention/linear_1/(.*)", r"\1.layers.\2.self_attn.out_proj.\3"),
    (r"(\w+)/layer_(\d+)/attention/linear_0/(.*)", r"\1.layers.\2.encoder_attn.q_proj.\3"),
    (r"(\w+)/layer_(\d+)/attention/linear_1/(.*)", r"\1.layers.\2.encoder_attn.1,2.\3"),
    (r"(\w+)/layer_(\d+)/attention/linear_2/(.*)", r"\1.layers.\2.encoder_attn.out_proj.\3"),
)
NORM_PARTS: Final = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Variable:
    """One tensor in the file: where its bytes begin, its sizes and the number of its type."""

    start: int
    shape: tuple[int, ...]
    type: int


class VariableFile:
    """A `model.bin`, checked. variables: by name, aliases included."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, 0
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise FileFormatError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from None
        except ValueError:
            raise FileFormatError(f"{path.name} is empty", where=str(path)) from None
        self._refuse_others()
        version = self._number(4)
        if version not in VERSIONS:
            self._refuse(f"binary version {version}, where {VERSIONS.start} to {VERSIONS.stop - 1} are read")
        self.specification = self._name()
        self._number(4)
        self.variables: dict[str, Variable] = {}
        for _ in range(self._count("variables")):
            self._read_variable()
        for _ in range(self._count("aliases")):
            alias, name = self._name(), self._name()
            if name not in self.variables:
                self._refuse(f"{alias!r} is another name of {name!r}, which is not there")
            self.variables[alias] = self.variables[name]

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """A variable as it is stored: a view of the file."""
        variable = self.variables[name]
        kind = np.dtype(TYPES[variable.type][1])
        flat = np.frombuffer(self.data, kind, math.prod(variable.shape), variable.start)
        return flat.reshape(variable.shape)

    def scalar(self, name: str, default: int) -> int:
        """A setting that is stored as a variable of one number."""
        if name not in self.variables:
            return default
        return int(self.array(name).reshape(-1)[0])

    def _refuse_others(self) -> None:
        head = self.data[:4]
        if head[:1] == b"\x80" or head == b"PK\x03\x04":
            raise FileFormatError(
                f"{self.path.name} is a pickle, not a CTranslate2 model",
                where=str(self.path),
                remedy=PICKLE_REMEDY,
            )

    def _read_variable(self) -> None:
        name, start = self._name(), self._at
        rank = self._number(1)
        if rank > MAX_RANK:
            self._refuse(f"{name!r} has {rank} dimensions, where {MAX_RANK} are allowed", start)
        shape = tuple(self._number(4) for _ in range(rank))
        type = self._number(1)
        if type >= len(TYPES):
            self._refuse(f"{name!r} is of type {type}, which is not known", start)
        size = self._number(4)
        wanted = math.prod(shape) * np.dtype(TYPES[type][1]).itemsize
        if size != wanted:
            self._refuse(f"{name!r} of sizes {list(shape)} should have {wanted} bytes and says {size}", start)
        if name in self.variables:
            self._refuse(f"{name!r} is there twice", start)
        begin = self._at
        self._skip(size)
        self.variables[name] = Variable(begin, shape, type)

    def _count(self, what: str) -> int:
        count = self._number(4)
        if count > MAX_VARIABLES:
            self._refuse(f"{count} {what}, where {MAX_VARIABLES} are allowed")
        return count

    def _number(self, size: int) -> int:
        start = self._at
        self._skip(size)
        return int.from_bytes(self.data[start : self._at], "little")

    def _name(self) -> str:
        start, size = self._at, self._number(2)
        self._skip(size)
        try:
            return self.data[self._at - size : self._at].rstrip(b"\0").decode("utf-8")
        except UnicodeDecodeError:
            self._refuse("a name that is not UTF-8", start)

    def _skip(self, size: int) -> None:
        if size > len(self.data) - self._at:
            self._refuse(f"the file ends too early: {size} bytes should follow, {len(self.data) - self._at} do")
        self._at += size

    def _refuse(self, what: str, at: int | None = None) -> NoReturn:
        raise FileFormatError(
            what,
            where=f"{self.path}, byte {self._at if at is None else at}",
            remedy="the file is damaged, incomplete or not a CTranslate2 model: fetch it again",
        )


@dataclass(frozen=True)
class _Part:
    # Rows [first, last) of a variable (all of them, where last is None).
    name: str
    first: int = 0
    last: int | None = None


class CTranslate2Source:
    """A `WeightSource` over a `model.bin`, under Hugging Face's names of Whisper's tensors."""

    def __init__(self, file: VariableFile) -> None:
        self._file, self._parts = file, dict(_named_parts(file))
        variables = file.variables
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: (variables[p.name].shape if p.last is None else (p.last - p.first, *variables[p.name].shape[1:]))
            for name, p in self._parts.items()
        }
        self.kinds: Mapping[str, str] = {n: TYPES[variables[p.name].type][0] for n, p in self._parts.items()}

    def weight(self, name: str) -> Weight:
        """The named tensor as numbers; 8-bit rows are divided by their scales."""
        part = self._parts[name]
        rows = slice(part.first, part.last)
        kind = self.kinds[name]
        tensor = torch.from_numpy(self._file.array(part.name)[rows].copy())
        if kind == "BF16":
            return tensor.view(torch.bfloat16)
        if kind != "I8":
            return tensor
        scale = torch.from_numpy(self._file.array(f"{part.name}_scale").copy()).float()
        scale = scale[rows] if scale.dim() else scale
        return _divided(tensor, scale)

    def release(self) -> None:
        """See `WeightSource.release`."""
        release_pages(self._file.data)


def _divided(tensor: Tensor, scale: Tensor) -> Tensor:
    return tensor.float() / scale.reshape(-1, *[1] * (tensor.dim() - 1) if scale.dim() else [])


def is_ctranslate2(path: Path) -> bool:
    """Whether a folder holds a CTranslate2 model and no other weights."""
    return (path / FILE_NAME).is_file() and not any(path.glob("*.safetensors"))


def open_ctranslate2(folder: Path) -> tuple[dict[str, Any], CTranslate2Source]:
    """The config in Hugging Face's words, and the weights, of the Whisper model in `folder`.

    Raises FileFormatError for a file that is damaged or is none, CheckpointError for another kind of model.
    """
    file = VariableFile(folder / FILE_NAME)
    if file.specification != "WhisperSpec":
        raise CheckpointError(
            f"a CTranslate2 model of kind {file.specification!r}",
            where=str(file.path),
            remedy="of CTranslate2's models only Whisper's are read; take this one in safetensors or GGUF",
        )
    source = CTranslate2Source(file)
    return _config(file, source), source


def _config(file: VariableFile, source: CTranslate2Source) -> dict[str, Any]:
    # The file says little of its own; most follows from the shapes of its tensors.
    def shape(name: str, rank: int) -> tuple[int, ...]:
        found = source.shapes.get(f"model.{name}", ())
        if len(found) != rank:
            raise CheckpointError(
                f"{name} is not there with {rank} dimensions", where=str(file.path), remedy="fetch the model again"
            )
        return found

    def layers(side: str) -> int:
        numbers = [re.match(rf"model\.{side}\.layers\.(\d+)\.fc1\.weight", name) for name in source.shapes]
        return 1 + max((int(match[1]) for match in numbers if match), default=-1)

    vocab, width = shape("decoder.embed_tokens.weight", 2)
    number = file.scalar("decoder/activation", ACTIVATIONS.index("gelu"))
    if not 0 <= number < len(ACTIVATIONS) or not file.scalar("decoder/pre_norm", 1):
        raise CheckpointError(
            f"a Whisper model with activation {number} or with norms at the end of its branches",
            where=str(file.path),
            remedy="take a model that was converted from OpenAI's or Hugging Face's",
        )
    config: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocab,
        "d_model": width,
        "num_mel_bins": shape("encoder.conv1.weight", 3)[1],
        "max_source_positions": shape("encoder.embed_positions.weight", 2)[0],
        "max_target_positions": shape("decoder.embed_positions.weight", 2)[0],
        "scale_embedding": bool(file.scalar("decoder/scale_embeddings", 0)),
        "activation_function": ACTIVATIONS[number],
        "tie_word_embeddings": True,
    }
    for side in ("encoder", "decoder"):
        config |= {
            f"{side}_layers": layers(side),
            f"{side}_attention_heads": file.scalar(f"{side}/num_heads", 0),
            f"{side}_ffn_dim": shape(f"{side}.layers.0.fc1.weight", 2)[0],
        }
    return config


def _named_parts(file: VariableFile) -> list[tuple[str, _Part]]:
    found: list[tuple[str, _Part]] = []
    for name, variable in file.variables.items():
        if name.endswith("_scale") or name == "decoder/projection/weight":
            continue
        for pattern, replacement in NAMES:
            if match := re.fullmatch(pattern, name):
                found += _split(name, variable, match.expand(replacement))
                break
    return found


def _split(name: str, variable: Variable, theirs: str) -> list[tuple[str, _Part]]:
    # Fused projections, written "0,1,2" (query, key, value) or "1,2", become their parts.
    *front, last = theirs.split(".")
    last = NORM_PARTS.get(last, last)
    if not re.fullmatch(r"[\d,]+", front[-1]) or "," not in front[-1]:
        return [(".".join(("model", *front, last)), _Part(name))]
    parts = [FUSED[int(number)] for number in front[-1].split(",")]
    rows = (variable.shape[0] if variable.shape else 0) // len(parts)
    return [
        (".".join(("model", *front[:-1], part, last)), _Part(name, i * rows, (i + 1) * rows))
        for i, part in enumerate(parts)
        if not (part == "k_proj" and last == "bias")  # zeros: Whisper's keys have none
    ]
