"""GPTQ's and AWQ's own layouts of 4-bit checkpoints (AutoGPTQ, GPTQModel, AutoAWQ): `qweight`, `qzeros` and `scales`.

Both hold matrices as [in, out]. GPTQ (arXiv 2210.17323) packs along the inputs and may have them in another order than
their groups (`g_idx`); AWQ (arXiv 2306.00978) packs along the outputs, each eight of them interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from craton.checkpoints.bit_packing import packed_words, unpack_bits
from craton.checkpoints.families.family import Keys
from craton.checkpoints.packed_layers import BITS, FLOATS, Codes, PackedLayer, Tensors
from craton.errors import CheckpointError

AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where the outputs 0 to 7 lie in their word


def read_gptq(tensors: Tensors, config: Mapping[str, Any], where: str) -> tuple[dict[str, PackedLayer], bool]:
    """The packed layers of a GPTQ checkpoint; its inputs are never rounded."""
    keys = Keys(config, where)
    keys.refuse("bits", *BITS)
    keys.refuse("checkpoint_format", "gptq", "gptq_v2")
    keys.refuse("dynamic", {})
    bits = keys.need("bits", int)
    # The first version of the format holds zeros less one.
    less = 0 if keys.get("checkpoint_format", str, "gptq") == "gptq_v2" else 1

    def layer(name: str) -> PackedLayer:
        words, scale, zero, order = (f"{name}.{part}" for part in ("qweight", "scales", "qzeros", "g_idx"))
        packed, rows = tensors.matrix(words)
        columns = packed * 32 // bits
        group, groups = _groups(keys, columns)
        tensors.check(scale, (groups, rows), *FLOATS)
        tensors.check(words, (packed_words(columns, bits), rows), "I32")
        tensors.check(zero, (groups, packed_words(rows, bits)), "I32")
        group_of_I = tensors.order(order, columns, group, groups)
        names = (scale, words, zero, *([order] if tensors.has(order) else []))

        def read() -> Codes:
            codes_OI = unpack_bits(tensors.get(words).T.contiguous(), bits, columns)
            zeros_GO = unpack_bits(tensors.get(zero), bits, rows).int() + less & (1 << bits) - 1
            return Codes(_signed(codes_OI, bits), tensors.get(scale).T, _signed(zeros_GO.T, bits), group_of_I)

        return PackedLayer(bits, group, keys.get("sym", bool, True), (rows, columns), names, read)

    return {name: layer(name) for name in tensors.names(".qweight")}, False


def read_awq(tensors: Tensors, config: Mapping[str, Any], where: str) -> tuple[dict[str, PackedLayer], bool]:
    """The packed layers of an AWQ checkpoint; its inputs are never rounded."""
    keys = Keys(config, where)
    keys.refuse("bits", 4)
    if keys.get("version", str, "gemm").lower() != "gemm":
        raise CheckpointError(
            f"AWQ's layout {keys.values['version']!r} is not read, only 'gemm'", where=f"{where}: key 'version'"
        )

    def layer(name: str) -> PackedLayer:
        words, scale, zero = (f"{name}.{part}" for part in ("qweight", "scales", "qzeros"))
        columns, packed = tensors.matrix(words)
        rows = packed * 8
        group, groups = _groups(keys, columns)
        tensors.check(words, (columns, packed), "I32")
        tensors.check(scale, (groups, rows), *FLOATS)
        if keys.get("zero_point", bool, True) or tensors.has(zero):
            tensors.check(zero, (groups, packed), "I32")
        names = (scale, words, *([zero] if tensors.has(zero) else []))

        def unpacked(name: str) -> Tensor:
            numbers = unpack_bits(tensors.get(name), 4, rows)
            return _signed(numbers.unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1).T, 4)

        def read() -> Codes:
            zeros_OG = unpacked(zero) if tensors.has(zero) else None
            return Codes(unpacked(words), tensors.get(scale).T, zeros_OG)

        return PackedLayer(4, group, not tensors.has(zero), (rows, columns), names, read)

    return {name: layer(name) for name in tensors.names(".qweight")}, False


def _groups(keys: Keys, columns: int) -> tuple[int, int]:
    """The inputs of a group, and how many groups there are."""
    size = keys.get("group_size", int, keys.get("q_group_size", int, -1))
    if size == 0 or size < -1:
        raise CheckpointError(f"groups of {size} inputs", where=keys.where)
    group = columns if size == -1 else size
    return group, -(-columns // group)


def _signed(numbers: Tensor, bits: int) -> Tensor:
    return (numbers.to(torch.uint8).contiguous() - (1 << bits - 1)).view(torch.int8)  # bytes wrap around as int8 does
