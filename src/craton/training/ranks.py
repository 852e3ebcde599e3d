"""The processes of one run: who this one is, and what all of them know together. One process needs no torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from craton.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """data_rank of data_world: which share of each step's examples this process takes. mesh: None for one process."""

    device: torch.device
    rank: int = 0
    world: int = 1
    data_rank: int = 0
    data_world: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def sums(self, values: Sequence[float]) -> list[float]:
        """Each value summed over the data-parallel ranks, in fp64."""
        if self.mesh is None:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, group=self.mesh["data"].get_group())
        return [float(value) for value in tensor.tolist()]

    def agreed(self, value: float) -> float:
        """The mean of what every rank says, the same on all of them: for what they must decide alike."""
        if self.mesh is None:
            return value
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor) / self.world

    def share(self, text: str) -> str:
        """The first rank's `text`, on every rank. All texts must be of one length in ASCII, such as a run's id."""
        if self.mesh is None:
            return text
        letters = torch.tensor(list(text.encode("ascii")), dtype=torch.uint8, device=self.device)
        dist.broadcast(letters, src=0)
        return bytes(letters.tolist()).decode("ascii")

    def wait(self) -> None:
        """Until every rank is here."""
        if self.mesh is not None:
            dist.barrier()


@contextmanager
def joined(tensor_parallel: int = 1) -> Iterator[Ranks]:
    """The ranks of this run, from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK), or a single process.

    gloo on CPUs, nccl on GPUs. Raises UsageError where the ranks cannot be cut into groups of `tensor_parallel`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % tensor_parallel:
        raise UsageError(
            f"{world} processes cannot be cut into groups of {tensor_parallel}",
            where="setting tensor_parallel",
            remedy=f"torchrun --nproc-per-node {tensor_parallel} -m craton.cli ...",
        )
    gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if world == 1:
        yield Ranks(device)
        return
    if gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpu else "gloo")
    try:
        shape = (world // tensor_parallel, tensor_parallel)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        yield Ranks(device, dist.get_rank(), world, mesh["data"].get_local_rank(), shape[0], mesh)
        # The first to leave takes gloo's connections down under the others, which then abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()
