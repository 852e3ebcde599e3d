"""safetensors checkpoints whose linear layers are packed integers: which layouts are known, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from craton.checkpoints.compressed_tensors_reader import read_compressed_tensors
from craton.checkpoints.gptq import read_awq, read_gptq
from craton.checkpoints.int_blocks import as_weight, block_kind
from craton.checkpoints.packed_layers import REMEDY, PackedLayer, Tensors
from craton.checkpoints.safetensors import TensorFolder
from craton.checkpoints.weights import Weight
from craton.errors import CheckpointError, FileFormatError

READERS = {"compressed-tensors": read_compressed_tensors, "gptq": read_gptq, "awq": read_awq}


class PackedSource:
    """The weights of such a checkpoint (see `WeightSource`): a layer X is the one tensor "X.weight".

    A layer is given as GGML's blocks (Q4_0, Q4_1 or Q8_0) where it can be, and else as float32 numbers; `kinds` then
    names what its scales are stored as. See `as_weight` for what is rounded.
    """

    def __init__(self, folder: TensorFolder, layers: Mapping[str, PackedLayer]) -> None:
        self._folder, self._layers = folder, {f"{name}.weight": layer for name, layer in layers.items()}
        taken = {part for layer in layers.values() for part in layer.parts}
        plain = {name: info for name, info in folder.tensors.items() if name not in taken}
        shapes: dict[str, tuple[int, ...]] = {name: info.shape for name, info in plain.items()}
        kinds = {name: info.dtype for name, info in plain.items()}
        for name, layer in self._layers.items():
            shapes[name] = layer.shape
            kind = block_kind(layer.bits, layer.symmetric, layer.group, layer.shape[1])
            kinds[name] = kind.name if kind else folder.tensors[layer.parts[0]].dtype
        self.shapes: Mapping[str, tuple[int, ...]] = shapes
        self.kinds: Mapping[str, str] = kinds

    def weight(self, name: str) -> Weight:
        """The named tensor."""
        if name not in self._layers:
            return self._folder.tensor(name)
        layer = self._layers[name]
        codes = layer.read()
        if not codes.scales_OG.isfinite().all():
            raise FileFormatError(
                f"tensor {layer.parts[0]!r} holds NaN or infinite values", where=self.where, remedy=REMEDY
            )
        return as_weight(layer.bits, layer.group, codes.codes_OI, codes.scales_OG, codes.zeros_OG, codes.group_of_I)

    def release(self) -> None:
        """See `WeightSource.release`."""
        for file in self._folder.files:
            file.release()

    @property
    def where(self) -> str:
        """The files, for messages."""
        return str(self._folder.files[0].path)


def open_packed(folder: TensorFolder, config: Any, where: str) -> tuple[PackedSource, bool]:
    """The weights that a config.json's `quantization_config` describes, and whether inputs are to be rounded to int8.

    Raises CheckpointError for a layout that is not known, FileFormatError for tensors that contradict it.
    """
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method not in READERS:
        raise CheckpointError(
            f"the weights are packed in a format that is not read here: {method or config!r}",
            where=f"{where}: key 'quantization_config'",
            remedy="fetch the checkpoint before its quantisation, or a GGUF file of it; "
            f"packed safetensors are read as {', '.join(READERS)}",
        )
    layers, int8_activations = READERS[method](Tensors(folder), config, f"{where}: key 'quantization_config'")
    return PackedSource(folder, layers), int8_activations
