"""Sharding a model over ranks: FSDP2 (Zhao 2023, arXiv 2304.11277) for memory, tensor parallelism within layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from craton.errors import UsageError
from craton.training.ranks import Ranks
from craton.trunk.attention import Attention
from craton.trunk.block import Block
from craton.trunk.feedforward import Experts, FeedForward


def parallelise(step: nn.Module, model: nn.Module, ranks: Ranks, dtype: torch.dtype) -> None:
    """Shard `model`, which `step` calls, over the mesh of `ranks`, in place. Nothing happens for one process.

    Tensor parallelism first, inside each block (Shoeybi 2019, arXiv 1909.08053); then FSDP2 over the data axis, block
    by block. Weights are gathered in `dtype` (with experts: in fp32). Gradients are summed, never averaged, in fp32:
    the loop divides once, by the targets of the whole step.
    """
    if ranks.mesh is None:
        return
    if ranks.mesh["tensor"].size() > 1:
        for name, module in model.named_modules():
            if isinstance(module, Block):
                _split_block(name, module, ranks)
    # A router decides by small differences: beside experts, weights travel as they are.
    gathered = None if any(isinstance(module, Experts) for module in model.modules()) else dtype
    policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
    data = ranks.mesh["data"]
    for module in [m for m in model.modules() if isinstance(m, Block)]:
        fully_shard(module, mesh=data, mp_policy=policy)
    fully_shard(step, mesh=data, mp_policy=policy)
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def reshard(step: nn.Module) -> None:
    """Let go of what a pass without gradients has gathered and still holds, so that parameters are shards again."""
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def unshard(model: nn.Module) -> None:
    """Make every parameter whole again, on every rank, to be saved. The model cannot compute any more."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                whole = nn.Parameter(parameter.full_tensor().cpu(), requires_grad=parameter.requires_grad)
                module.register_parameter(name, whole)


def _split_block(name: str, block: Block, ranks: Ranks) -> None:
    assert ranks.mesh is not None
    mesh = ranks.mesh["tensor"]
    attention, feedforward = block.attention, block.feedforward
    if not isinstance(attention, Attention) or not isinstance(feedforward, FeedForward):
        raise UsageError(
            "tensor parallelism knows plain attention and dense feed-forwards",
            where=name,
            remedy="leave tensor_parallel at 1: FSDP shards every kind of layer",
        )
    config = attention.config
    if config.kv_heads % mesh.size() or (config.qk_norm is not None and config.qk_norm_over == "width"):
        raise UsageError(
            f"{config.kv_heads} key-value heads cannot be shared out to {mesh.size()} ranks",
            where=name,
            remedy="choose a tensor_parallel that divides the number of key-value heads",
        )
    plan: dict[str, ParallelStyle] = {
        **{f"attention.{part}": ColwiseParallel() for part in ("q", "k", "v")},
        "attention.o": RowwiseParallel(),
        "feedforward.up": ColwiseParallel(),
        "feedforward.down": RowwiseParallel(),
    }
    if feedforward.gate is not None:
        plan["feedforward.gate"] = ColwiseParallel()
    parallelize_module(block, mesh, plan)
