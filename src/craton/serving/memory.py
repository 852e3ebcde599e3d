"""How much memory a loaded model takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn

from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear
from craton.inference.images import ImageModel
from craton.inference.linears import PackedEmbedding, PackedLinear
from craton.inference.model import Model
from craton.models import CausalLM
from craton.store import find


def held_bytes(model: Model | ImageModel) -> int:
    """The bytes of a model's weights and of the keys and values that its engine keeps."""
    tensors = {id(tensor): tensor.numel() * tensor.element_size() for tensor in _tensors(model.module)}
    quantized = {
        id(part.quantized): part.quantized.blocks.nbytes
        for part in model.module.modules()
        if isinstance(part, QuantizedLinear | QuantizedEmbedding)
    }
    cache = model.engine.used_bytes if isinstance(model, Model) and isinstance(model.module, CausalLM) else 0
    return sum(tensors.values()) + sum(quantized.values()) + cache


def stored_bytes(source: str) -> int:
    """About what a model that was never loaded here will take: the bytes of its files of weights. Raises what `find`
    raises."""
    # Imported here: only a server with a budget asks, and the others start sooner.
    from craton.compression.job import weight_bytes

    return weight_bytes(find(source).path)


def shown(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.3g} GB"


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for part in module.modules():
        # A kernel's own form of a weight is an attribute and no parameter.
        for value in chain(part.parameters(recurse=False), part.buffers(recurse=False), vars(part).values()):
            if isinstance(value, Tensor):
                yield value
        if isinstance(part, PackedLinear | PackedEmbedding):
            yield part.packed.data
