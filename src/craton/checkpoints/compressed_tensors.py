"""Quantised models out, as folders in the layout of the `compressed-tensors` library, which vLLM and transformers open.

A quantised linear layer `X` is stored as `X.weight_packed` (int32, see `bit_packing`; a code has 2^(bits - 1) on top),
`X.weight_scale` (one for each group of inputs), `X.weight_shape` and, where it has zeros, `X.weight_zero_point` (packed
along the outputs); or, if activations are to be 8 bits as well, as int8 codes `X.weight` with `X.weight_scale`.
config.json says which layers have how many bits. `compressed_tensors_reader` reads these files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from craton.checkpoints.bit_packing import pack_bits
from craton.checkpoints.families.family import Family
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.names import Entry
from craton.checkpoints.save import HF_DTYPES, plain_tensors, write_folder
from craton.checkpoints.weights import QuantizedEmbedding
from craton.errors import CheckpointError
from craton.modalities.text import Tokenizer
from craton.models import AnyModel, PoolingConfig

# Linear layers that the files of some families leave out, since they are the embedding again.
TIED_HEADS = ["lm_head", "re:.*predictions.decoder", "re:lm_head.decoder", "proj_out"]
AS_GGUF = "write a GGUF file, or leave them as they are"


def save_quantized(
    model: AnyModel,
    family: Family,
    folder: str | Path,
    quantized: Mapping[str, IntWeight],
    *,
    tokenizer: Tokenizer | None = None,
    pooling: PoolingConfig | None = None,
    activations: Literal["int8"] | None = None,
) -> Path:
    """Write `model` to `folder`, the weights of the modules in `quantized` as integers and all others as they are.

    quantized: by our names ("trunk.layers.0.attention.q"). Everything else is as in `save_checkpoint`.

    The weights that are in `quantized` are not read from the model and may lie on the meta device. activations: says in
    the file that the inputs of these layers are to be rounded to int8, each token by its own largest value.

    Raises CheckpointError for a layer that the layout has no place for (an embedding, a tied head, GPT-2's turned
    matrices), for layers that share one matrix in the file and differ in form, and for a width that is not whole
    groups; StoreError if the folder cannot be written.
    """
    modules = dict(model.named_modules())
    for name in quantized:
        if isinstance(modules.get(name), nn.Embedding | QuantizedEmbedding):
            raise CheckpointError(
                f"{name!r} is an embedding, and readers of this layout expect those as plain numbers", remedy=AS_GGUF
            )
    ours = model.state_dict(keep_vars=False)
    weights = {f"{name}.weight": weight for name, weight in quantized.items()}
    plain: dict[str, Tensor] = {}
    packed: dict[str, IntWeight] = {}
    for entry in family.entries(model.config):
        if not weights.keys() & set(entry.ours):
            plain |= plain_tensors(entry, ours)
            continue
        for theirs, weight in zip(entry.theirs, _joined(entry, weights), strict=True):
            packed[theirs.removesuffix(".weight")] = weight
        for name in entry.ours:
            del weights[name]
    if weights:
        raise CheckpointError(
            f"{next(iter(weights))!r} has no place of its own in {family.architectures[0]}",
            remedy="a tied head is the embedding's matrix and cannot be quantised alone; leave it as it is",
        )
    linears = {f"{name}.weight" for name, module in modules.items() if isinstance(module, nn.Linear)}
    ignored = [
        entry.theirs[0].removesuffix(".weight")
        for entry in family.entries(model.config)
        if entry.ours[0] in linears and entry.theirs[0] in plain
    ] + TIED_HEADS
    config = family.write_config(model.config)
    config["dtype"] = HF_DTYPES[next(iter(plain.values())).dtype]
    config["quantization_config"] = _config(packed, ignored, activations)
    tensors = dict(plain)
    for name, weight in packed.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in _tensors(weight, activations).items()}
    return write_folder(Path(folder), tensors, config, tokenizer=tokenizer, pooling=pooling)


def _joined(entry: Entry, weights: Mapping[str, IntWeight]) -> list[IntWeight]:
    """Theirs of ours: whatever `entry` does to rows is done to codes, scales and zeros alike."""
    if not entry.by_rows:
        raise CheckpointError(
            f"{entry.theirs[0]!r} is stored with inputs and outputs exchanged, which compressed-tensors cannot say",
            remedy=AS_GGUF,
        )
    forms = {
        name: (weights[name].bits, weights[name].group, weights[name].zeros_OG is None) if name in weights else None
        for name in entry.ours
    }
    if len(set(forms.values())) > 1:
        said = "; ".join(f"{name} {_said(form)}" for name, form in forms.items())
        raise CheckpointError(
            f"layers that share the matrix {entry.theirs[0]!r} differ: {said}",
            remedy="quantise them alike: the same bits, group and symmetry",
        )
    parts = [weights[name] for name in entry.ours]

    def save(part: Callable[[IntWeight], Tensor | None]) -> Sequence[Tensor | None]:
        tensors = [part(weight) for weight in parts]
        present = [tensor for tensor in tensors if tensor is not None]
        return entry.save(present) if present else [None] * len(entry.theirs)

    triples = zip(save(lambda w: w.codes_OI), save(lambda w: w.scales_OG), save(lambda w: w.zeros_OG), strict=True)
    return [
        IntWeight(parts[0].bits, parts[0].group, codes, scales, zeros)  # type: ignore[arg-type]
        for codes, scales, zeros in triples
    ]


def _said(form: tuple[int, int, bool] | None) -> str:
    if form is None:
        return "is not quantised"
    bits, group, symmetric = form
    return f"has {bits} bits in {'symmetric' if symmetric else 'asymmetric'} groups of {group}"


def _tensors(weight: IntWeight, activations: str | None) -> dict[str, Tensor]:
    rows, columns = weight.shape
    if columns > weight.group and columns % weight.group:
        raise CheckpointError(
            f"rows of {columns} weights are not whole groups of {weight.group}, which compressed-tensors asks for",
            remedy=f"choose a group that divides {columns}, or write a GGUF file",
        )
    tensors = {"weight_scale": weight.scales_OG.cpu()}
    codes_OI, zeros_OG = weight.codes_OI.cpu(), weight.zeros_OG
    if _format(weight, activations) == "int-quantized":
        tensors["weight"] = codes_OI
        if zeros_OG is not None:
            tensors["weight_zero_point"] = zeros_OG.cpu()
        return tensors
    tensors["weight_packed"] = pack_bits(_raised(codes_OI, weight.bits), weight.bits)
    tensors["weight_shape"] = torch.tensor([rows, columns])
    if zeros_OG is not None:
        tensors["weight_zero_point"] = pack_bits(_raised(zeros_OG.cpu().T, weight.bits), weight.bits).T.contiguous()
    return tensors


def _raised(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)


def _format(weight: IntWeight, activations: str | None) -> str:
    return "int-quantized" if activations == "int8" and weight.bits == 8 else "pack-quantized"


def _config(packed: Mapping[str, IntWeight], ignored: Iterable[str], activations: str | None) -> dict[str, Any]:
    """`quantization_config`: one group of layers for each form; other linear layers are named as ignored."""
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in packed.items():
        scheme = _scheme(weight, activations)
        group = groups.setdefault(str(scheme), {"targets": [], **scheme})
        group["targets"].append(name)
    formats = {group["format"] for group in groups.values()}
    if len(groups) == 1:
        next(iter(groups.values()))["targets"] = ["Linear"]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {f"group_{n}": group for n, group in enumerate(groups.values())},
        "ignore": sorted(set(ignored) - set(packed)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _scheme(weight: IntWeight, activations: str | None) -> dict[str, Any]:
    whole = weight.group >= weight.shape[1]
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "weights": {
            "num_bits": weight.bits,
            "type": "int",
            "symmetric": weight.zeros_OG is None,
            "strategy": "channel" if whole else "group",
            "group_size": None if whole else weight.group,
            "dynamic": False,
        },
        "input_activations": inputs if activations else None,
        "output_activations": None,
        "format": _format(weight, activations),
    }
