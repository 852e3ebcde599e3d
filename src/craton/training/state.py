"""A run's state on disk: everything that the next step depends on, written whole or not at all.

A checkpoint is a folder `step-00000120`: state.json, the trained weights, the optimiser's state and each rank's random
numbers as safetensors. The data's order is a function of the seed and the step, so it needs no file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from craton.checkpoints.disk import disk_errors, replace_file, sync_folder
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.errors import TrainingError
from craton.training.optimisers import Optimisers
from craton.training.ranks import Ranks

FORMAT: Final = 1
_NAME: Final = re.compile(r"step-(\d{8})")


@dataclass
class Progress:
    """Where a run stands. step: updates made. best: the lowest evaluated loss and the step that had it."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """This process's random number generators."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def training_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trained parameters, and what moves without a gradient: the router biases that balance
    loads, and a `teacher` that follows the model."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or name.endswith("router_bias") or name.startswith("teacher.")
    }


def save_state(
    folder: Path,
    model: nn.Module,
    optimisers: Optimisers,
    progress: Progress,
    random: Mapping[str, Tensor],
    ranks: Ranks,
) -> Path:
    """Write a checkpoint into `folder` and return its own folder. Called by every rank.

    Built under another name and renamed when every byte is on the disk: what is called step-N is whole. Raises
    StoreError if the disk is full or not writable; what was there before is left alone.
    """
    final = folder / f"step-{progress.step:08}"
    part = folder / f".{final.name}.part"
    with disk_errors(f"write the checkpoint {final.name}", folder):
        if ranks.is_first:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        ranks.wait()
        try:
            _write_tensors(part / "trained", training_tensors(model), ranks)
            _write_tensors(part / "optimiser", optimisers.state(), ranks)
            write_safetensors(part / f"random-{ranks.rank}.safetensors", dict(random))
            ranks.wait()
            if ranks.is_first:
                state = {"format": FORMAT, "world": ranks.world, **asdict(progress)}
                replace_file(part / "state.json", json.dumps(state, indent=2).encode())
                if final.exists():  # the same step again, after a resume
                    shutil.rmtree(final)
                os.rename(part, final)
                sync_folder(folder)
            ranks.wait()
        finally:
            if ranks.is_first:
                shutil.rmtree(part, ignore_errors=True)
    return final


def load_state(checkpoint: Path, model: nn.Module, optimisers: Optimisers, ranks: Ranks) -> Progress:
    """Put a checkpoint back into `model`, `optimisers` and the random number generators; where the run then stands.

    Raises TrainingError if the checkpoint belongs to another model or to another number of processes.
    """
    state = _read_state(checkpoint)
    if state.pop("world") != ranks.world:
        raise TrainingError(
            f"this checkpoint was written by another number of processes than {ranks.world}",
            where=str(checkpoint),
            remedy="resume with as many processes as before: each has random numbers of its own",
        )
    optimisers.initialise_state()
    with torch.no_grad():
        _read_tensors(checkpoint / "trained", training_tensors(model), ranks)
        _read_tensors(checkpoint / "optimiser", optimisers.state(), ranks)
    random = SafetensorsFile.open(checkpoint / f"random-{ranks.rank}.safetensors")
    set_random_state({name: random.tensor(name).clone() for name in random.tensors}, ranks.device)
    return Progress(**state)


def load_weights(checkpoint: Path, model: nn.Module, ranks: Ranks) -> None:
    """Put only a checkpoint's weights into `model`."""
    with torch.no_grad():
        _read_tensors(checkpoint / "trained", training_tensors(model), ranks)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every whole checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match and (path / "state.json").is_file())


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best one, and what a killed run left half written."""
    whole = checkpoints(folder)
    for step, path in whole[:-keep_last]:
        if step != best_step:
            shutil.rmtree(path, ignore_errors=True)
    for leftover in folder.glob(".step-*.part"):
        shutil.rmtree(leftover, ignore_errors=True)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "state.json"
    try:
        state: dict[str, Any] = json.loads(path.read_bytes())
        version = state.pop("format")
    except (OSError, ValueError, KeyError) as error:
        raise TrainingError(f"the checkpoint cannot be read: {error}", where=str(path)) from None
    if version != FORMAT:
        raise TrainingError(f"a checkpoint of format {version}; this Craton reads {FORMAT}", where=str(path))
    return state


def _write_tensors(target: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    if ranks.mesh is None:
        write_safetensors(target.with_suffix(".safetensors"), {name: t.detach() for name, t in tensors.items()})
    else:
        writer = HuggingFaceStorageWriter(str(target), save_distributed=True)
        state_dict_saver.save(dict(tensors), storage_writer=writer)


def _read_tensors(source: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    # Into the tensors that are there, so that the optimiser goes on with the parameters that it knows.
    if ranks.mesh is not None:
        state_dict_loader.load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(source)))
        return
    file = SafetensorsFile.open(source.with_suffix(".safetensors"))
    different = sorted(set(file.tensors) ^ set(tensors))
    different += [n for n in tensors if n in file.tensors and tuple(file.tensors[n].shape) != tuple(tensors[n].shape)]
    if different:
        raise TrainingError(
            f"the checkpoint does not fit this model: {different[0]!r} and {len(different) - 1} more differ",
            where=str(file.path),
            remedy="resume a run with the settings that it was started with",
        )
    for name, tensor in tensors.items():
        tensor.copy_(file.tensor(name))
