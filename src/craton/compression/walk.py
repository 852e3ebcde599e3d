"""The walk through a model, block by block: what is made of a block is kept on the disk before the next one is opened,
so that an interrupted walk goes on behind the last whole block and ends with the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.compression.blocks import Flow, Inputs, Source, Stream, Tower, in_fp32
from craton.store.cards import duration
from craton.trunk.block import Block

ROWS_KEY: Final = "rows"
FORMS_KEY: Final = "forms"


@dataclass
class Changes:
    """What was made of a block. quantized: linear layers, and plain: other tensors, by their names in the model.
    rows: a fact sheet of each matrix, for the report."""

    quantized: dict[str, IntWeight] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Keep it in a file, which is there whole or not at all."""
        tensors = {f"plain/{name}": tensor for name, tensor in self.plain.items()}
        forms = {}
        for name, weight in self.quantized.items():
            forms[name] = (weight.bits, weight.group)
            tensors |= {f"codes/{name}": weight.codes_OI, f"scales/{name}": weight.scales_OG}
            if weight.zeros_OG is not None:
                tensors[f"zeros/{name}"] = weight.zeros_OG
        if not tensors:  # every layer of the block is kept; a file needs something
            tensors["nothing"] = torch.zeros(1)
        write_safetensors(path, tensors, {ROWS_KEY: json.dumps(self.rows), FORMS_KEY: json.dumps(forms)})

    @classmethod
    def read(cls, path: Path) -> Changes:
        """What `write` kept, mapped from the file."""
        file = SafetensorsFile.open(path)
        quantized = {}
        for name, (bits, group) in json.loads(file.metadata[FORMS_KEY]).items():
            zeros = file.tensor(f"zeros/{name}") if f"zeros/{name}" in file.tensors else None
            codes, scales = file.tensor(f"codes/{name}"), file.tensor(f"scales/{name}")
            quantized[name] = IntWeight(bits, group, codes, scales, zeros)
        plain = {name.removeprefix("plain/"): file.tensor(name) for name in file.tensors if name.startswith("plain/")}
        return cls(quantized, plain, json.loads(file.metadata[ROWS_KEY]))


Work = Callable[[str, Block, dict[str, Inputs]], Changes]
"""What is done to a block, fp32 and the worker's own: its name in the model, the block, what its linear layers read."""

Refine = Callable[[str, int, Block, Changes, dict[str, Inputs], Stream, Stream], None]
"""Changes the changes of a block for the better: its name, its number, the block as it was rounded, its changes, what
its linear layers read, what the block reads, and what the unchanged model has behind it."""


def walk(
    source: Source,
    folder: Path,
    work: Work,
    calibration: Flow | None,
    followers: Sequence[Flow],
    *,
    tower: Tower | None = None,
    names_of: Callable[[Block], list[str]],
    gram: bool,
    int8_inputs: bool,
    on_progress: Callable[[str], None],
    refine: Refine | None = None,
) -> None:
    """Work on each block of a tower in order, with what its linear layers read once the blocks before it are changed.

    calibration: what is observed (none: nothing is). followers: other hidden states that go through the changed blocks.
    tower: none is the model's first. int8_inputs: of quantised layers, on the way, as they will be. refine: has the
    last word on a block of text; it needs what is observed. Changes are kept in `folder`.
    """
    tower = tower or source.towers[0]
    wanted = calibration.copy() if calibration is not None and refine is not None else None
    layers = tower.trunk.layers
    begun: list[float] = []  # when each block of this process was begun

    def say(number: int, doing: str) -> None:
        left = ""
        if len(begun) > 1:
            seconds = (begun[-1] - begun[0]) / (len(begun) - 1)
            left = f", {duration(seconds * (len(layers) - number))} left"
        on_progress(f"block {tower.first + number + 1} of {source.blocks}: {doing}{left}")

    for number, stored in enumerate(layers):
        assert isinstance(stored, Block)
        name, path = tower.block_name(number), block_path(folder, tower.first + number)
        if wanted is not None:
            wanted.advance(in_fp32(stored), number)
        if not path.exists():
            begun.append(time.monotonic())
            block = in_fp32(stored)
            inputs: dict[str, Inputs] = {}
            if calibration is not None:
                say(number, f"reading {len(calibration.hidden_TD):,} tokens")
                inputs = calibration.observe(block, number, names_of(block), gram=gram)
            say(number, "solving")
            with torch.no_grad():
                changes = work(name, block, inputs)
                if isinstance(calibration, Stream) and isinstance(wanted, Stream) and refine is not None:
                    say(number, "tuning")
                    refine(name, number, block, changes, inputs, calibration, wanted)
                changes.write(path)
        else:
            say(number, "done before")
        changes = Changes.read(path)
        block = in_fp32(stored, source.dtype)  # packed weights that are kept are saved as such numbers
        put(changes, name, block)
        if int8_inputs:
            round_inputs(block, [full.removeprefix(f"{name}.") for full in changes.quantized])
        streams = followers if calibration is None else (calibration, *followers)
        for stream in streams:
            stream.advance(block, number)


def block_path(folder: Path, number: int) -> Path:
    """Where the changes of a block are kept."""
    return folder / f"{number:05}.safetensors"


def all_changes(folder: Path, blocks: int) -> Iterator[Changes]:
    """Of every block, in order."""
    return (Changes.read(block_path(folder, number)) for number in range(blocks))


def put(changes: Changes, name: str, module: nn.Module) -> None:
    """Give the module of this name the changed weights, as fp32 numbers."""
    state = {f"{full}.weight": weight.dequantize() for full, weight in changes.quantized.items()}
    state |= {full: tensor.to(torch.float32, copy=True) for full, tensor in changes.plain.items()}
    inside = {full.removeprefix(f"{name}."): tensor for full, tensor in state.items()}
    module.load_state_dict(inside, strict=False, assign=True)
    module.requires_grad_(False)


def round_inputs(module: nn.Module, names: Sequence[str]) -> None:
    """From now on these linear layers read numbers of 8 bits: each token's by its own largest (dynamic, symmetric)."""

    def rounded(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        [x_TI] = args
        scale_T1 = (x_TI.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-12)
        return ((x_TI / scale_T1).round() * scale_T1,)

    for name in names:
        module.get_submodule(name).register_forward_pre_hook(rounded)


def hold(model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Put plain tensors into the model, mapped as they are."""
    model.load_state_dict(changes, strict=False, assign=True)
    model.requires_grad_(False)
