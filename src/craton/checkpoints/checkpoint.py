"""Opening a published checkpoint: which family it is, whether its tensors are all there, and the model made of them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from craton.checkpoints.ctranslate2 import FILE_NAME as CTRANSLATE2_FILE
from craton.checkpoints.ctranslate2 import is_ctranslate2, open_ctranslate2
from craton.checkpoints.families import family_of, masked_lm_family
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.finite import is_finite
from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.gguf_model import open_gguf_model, read_gguf_pooling
from craton.checkpoints.names import Entry
from craton.checkpoints.packed_source import open_packed
from craton.checkpoints.pooling import read_pooling
from craton.checkpoints.repack import repack, repacked_as
from craton.checkpoints.safetensors import TensorFolder, open_weights
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear, QuantizedTensor, Weight, WeightSource
from craton.errors import CheckpointError, FileFormatError, UsageError
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.models import AnyModel, CausalLMConfig, ModelConfig, PoolingConfig, TextModelConfig, build
from craton.trunk import replace_linears

PACKING_KEYS = ("quantization_config", "compression_config")  # of config.json; the second in older files
SHOWN = 5  # names listed in an error before "and N more"


class SafetensorsSource:
    """The weights of a safetensors file or folder."""

    def __init__(self, folder: TensorFolder) -> None:
        self._folder = folder
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in folder.tensors.items()}
        self.kinds: Mapping[str, str] = {name: info.dtype for name, info in folder.tensors.items()}

    def weight(self, name: str) -> Weight:
        """The named tensor, mapped from the file."""
        return self._folder.tensor(name)

    def release(self) -> None:
        """See `WeightSource.release`."""
        for file in self._folder.files:
            file.release()


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint, opened and understood but not loaded.

    hf: its config.json (made from the metadata for GGUF) without what it says of packed weights, which `source` knows.
    config: the same in our terms. metadata: GGUF's, or empty. pooling: what a sentence encoder's files say, if they say
    anything. int8_activations: whether the inputs of packed layers are meant to be rounded to 8 bits, token by token.
    """

    path: Path
    hf: Mapping[str, Any]
    family: Family
    config: ModelConfig
    source: WeightSource
    metadata: Mapping[str, Any]
    pooling: PoolingConfig | None
    int8_activations: bool = False

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Open a folder (Hugging Face's layout or CTranslate2's), a .safetensors file with its config, or a .gguf file.

        Raises FileFormatError for files that are damaged or refused, CheckpointError for an unknown architecture.
        """
        path = Path(path)
        if (path / "adapter_config.json").is_file():
            raise CheckpointError(
                "this is an adapter, which needs its base model",
                where=str(path),
                remedy=f"merge it into a model of its own: craton merge {path} --name NAME",
            )
        metadata: Mapping[str, Any] = {}
        source: WeightSource
        int8_activations = False
        if path.suffix == ".gguf":
            hf, source, metadata = open_gguf_model(path)
            where, pooling = str(path), read_gguf_pooling(metadata)
        elif is_ctranslate2(path):
            hf, source = open_ctranslate2(path)
            where, pooling = str(path / CTRANSLATE2_FILE), None
        else:
            weights = open_weights(path)
            folder = path if path.is_dir() else path.parent
            hf, pooling = read_json(folder / "config.json"), read_pooling(folder)
            where = str(folder / "config.json")
            packing = [hf.pop(key) for key in PACKING_KEYS if hf.get(key) is not None]
            if packing:
                source, int8_activations = open_packed(weights, packing[0], where)
            else:
                source = SafetensorsSource(weights)
        family = family_of(hf, where)
        config = family.config(Keys(hf, where, frozenset(source.shapes)))
        return cls(path, hf, family, config, source, metadata, pooling, int8_activations)

    def as_masked_lm(self) -> Checkpoint:
        """A masked language model's files read with the head that an encoder leaves in them.

        Raises CheckpointError for a checkpoint that has none.
        """
        family, architecture = masked_lm_family(self.family), self.hf["architectures"][0]
        if architecture not in family.architectures:
            raise CheckpointError(
                f"{architecture} has no masked-language-model head",
                where=str(self.path),
                remedy=f"take a checkpoint that is published as {family.architectures[0]}",
            )
        config = family.config(Keys(self.hf, str(self.folder / "config.json"), frozenset(self.source.shapes)))
        return replace(self, family=family, config=config)

    @property
    def text_config(self) -> TextModelConfig:
        """`config` of a model that reads or writes text. Raises UsageError for one that sees."""
        if not isinstance(self.config, TextModelConfig):
            raise UsageError(
                f"{self.hf['architectures'][0]} sees pictures, and this is for models of text",
                where=str(self.path),
                remedy="use craton classify, search, features, embed or segment, or take a language model",
            )
        return self.config

    @property
    def folder(self) -> Path:
        """Where the files that travel with the weights lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def quantized_kinds(self) -> frozenset[str]:
        """The block formats of its matrices ("Q4_0", ...); empty for a checkpoint of plain numbers."""
        return frozenset(kind for kind in self.source.kinds.values() if kind.startswith("Q"))

    def packed_kinds(self) -> frozenset[str]:
        """The block formats of its matrices where it is loaded `packed`."""
        kinds = repacked_as(self.source.kinds, self.source.shapes)
        return frozenset(kinds[kind].name if kind in kinds else kind for kind in self.quantized_kinds())

    def plain_ends(self) -> bool:
        """Whether a language model's embedding or head, the matrices with a row for each token, are plain numbers."""
        if not isinstance(self.config, CausalLMConfig):
            return False
        ends = [name for name, shape in self.source.shapes.items() if len(shape) == 2 and shape[0] == self.config.vocab]
        return any(not self.source.kinds[name].startswith("Q") for name in ends)

    def stored_kind(self) -> str:
        """The format that holds most of its numbers."""
        sizes: Counter[str] = Counter()
        for name, kind in self.source.kinds.items():
            sizes[kind] += math.prod(self.source.shapes[name])
        return sizes.most_common(1)[0][0]

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own tokeniser and chat template."""
        if self.path.suffix == ".gguf":
            return tokenizer_from_gguf(dict(self.metadata))
        return Tokenizer.from_folder(self.folder)

    def load(self, dtype: torch.dtype, *, packed: bool = False) -> AnyModel:
        """The model with its weights in `dtype`; with `packed`, block-quantised matrices stay so.

        They are as the file holds them, or in the nearest format that has a kernel where that costs next to nothing
        (see `repack`).

        Raises CheckpointError naming missing, surplus or misshapen tensors, and tensors that hold NaN or infinity.
        """
        entries = self.family.entries(self.config)
        names = self._names()
        self._check_names(entries, names)
        model = self._skeleton()
        self._check_shapes(entries, names, model)
        forms = repacked_as(self.source.kinds, self.source.shapes) if packed else None
        quantized: dict[str, QuantizedTensor] = {}
        state: dict[str, Tensor] = {}
        for entry in entries:
            weights = self._converted(entry, names, forms)
            for name, weight in zip(entry.ours, weights, strict=True):
                if isinstance(weight, QuantizedTensor):
                    quantized[name] = weight
                else:
                    state[name] = weight.to(torch.float32 if entry.fp32 else dtype)
        if getattr(self.config, "tied", False) and "head.weight" not in quantized | state:
            source: dict[str, Any] = quantized if "embedding.weight" in quantized else state
            source["head.weight"] = source["embedding.weight"]
        _place_quantized(model, quantized, state, dtype)
        model.load_state_dict(state, assign=True)
        if getattr(self.config, "tied", False) and not quantized.get("head.weight"):
            model.head.weight = model.embedding.weight  # type: ignore[union-attr]
        self.source.release()
        return model.requires_grad_(False).eval()

    def _skeleton(self) -> AnyModel:
        # The modules without memory and without initial weights.
        try:
            with torch.device("meta"), _Uninitialised():
                return build(self.config)
        except (RuntimeError, TypeError):  # which torch raises where a tensor's size overflows, with a native trace
            raise CheckpointError(
                "the config makes no model: some tensor's size is beyond 64 bits", where=str(self.path)
            ) from None

    def _names(self) -> dict[str, str]:
        # By its name in the entries, each tensor's name in the file.
        names: dict[str, str] = {}
        for name in self.source.shapes:
            first = names.setdefault(self.family.current_name(name), name)
            if first != name:
                raise CheckpointError(
                    f"{first!r} and {name!r} are two names of one tensor",
                    where=str(self.path),
                    remedy="two checkpoints are mixed in this place; fetch one of them again",
                )
        return names

    def _check_names(self, entries: list[Entry], names: Mapping[str, str]) -> None:
        wanted = {name for entry in entries for name in entry.theirs}
        missing = sorted(wanted - set(names))
        if missing:
            raise CheckpointError(
                f"{len(missing)} tensors are missing: {_some(missing)}",
                where=str(self.path),
                remedy="the download is incomplete, or config.json belongs to another model",
            )
        surplus = sorted(names[name] for name in set(names) - wanted if not self._ignorable(name))
        if surplus:
            raise CheckpointError(
                f"{len(surplus)} tensors have no place in {self.hf['architectures'][0]}: {_some(surplus)}",
                where=str(self.path),
                remedy="config.json belongs to another model, or the checkpoint has a part that is not known here",
            )

    def _check_shapes(self, entries: list[Entry], names: Mapping[str, str], model: AnyModel) -> None:
        ours = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
        for entry in entries:
            for name, tensor in zip(entry.theirs, entry.save([ours[name] for name in entry.ours]), strict=True):
                shape = self.source.shapes[names[name]]
                if tuple(shape) != tuple(tensor.shape):
                    raise CheckpointError(
                        f"tensor {names[name]!r} has shape {list(shape)}, the config asks for {list(tensor.shape)}",
                        where=str(self.path),
                        remedy="config.json belongs to another model, or the weights do",
                    )

    def _ignorable(self, name: str) -> bool:
        tied_head = getattr(self.config, "tied", False) and name == "lm_head.weight"
        return tied_head or any(re.fullmatch(pattern, name) for pattern in self.family.ignored)

    def _converted(self, entry: Entry, names: Mapping[str, str], forms: Mapping[str, GGMLType] | None) -> list[Weight]:
        # forms: see `repacked_as`; None if everything is to be unpacked.
        weights = []
        for name in entry.theirs:
            weight = self.source.weight(names[name])
            if isinstance(weight, QuantizedTensor):
                if forms is None or not entry.by_rows or len(weight.shape) != 2:
                    weight = weight.dequantize()
                elif weight.kind.name in forms:
                    weight = repack(weight, forms[weight.kind.name])
            if not is_finite(weight):
                raise CheckpointError(
                    f"tensor {names[name]!r} holds NaN or infinite values",
                    where=str(self.path),
                    remedy="the checkpoint is damaged or its training diverged; fetch it again",
                )
            weights.append(weight)
        return list(entry.load(weights))  # type: ignore[arg-type]


class _Uninitialised(TorchFunctionMode):
    """Modules are made without filling their weights (which, for an embedding, would import torch's compiler)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a checkpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no {path.name}", where=str(path.parent), remedy="point at a folder in Hugging Face layout"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path.name} is not valid JSON: {error}", where=str(path)) from None
    except OSError as error:
        raise FileFormatError(f"{path.name} cannot be read: {error.strerror}", where=str(path)) from None
    if not isinstance(value, dict):
        raise FileFormatError(f"{path.name} must hold a JSON object", where=str(path))
    return value


def _place_quantized(
    model: nn.Module, quantized: dict[str, QuantizedTensor], state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    # A module whose weight stays quantised is replaced by one that holds it; its bias moves along.
    def make(name: str, module: nn.Module) -> nn.Module:
        weight = quantized[f"{name}.weight"]
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(weight, dtype)
        return QuantizedLinear(weight, state.get(f"{name}.bias"))

    replace_linears(model, lambda name, _: f"{name}.weight" in quantized, make)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
