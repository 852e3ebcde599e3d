"""The balancing bias: what a step does, that it evens a skewed router out, and that ranks agree on it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from math import log

import pytest
import torch
import torch.nn.functional as F

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.save import save_checkpoint
from craton.models import build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import experts_config, family_of_fresh
from craton.pretraining.sizing import SizeOverrides, size
from craton.training.experts import balance_step, forget_load
from craton.trunk import ExpertsConfig, FeedForwardConfig
from craton.trunk.feedforward import Experts

WIDTH = 8
EXPERT = FeedForwardConfig(hidden=12, activation="silu", gated=True)


def experts(bias=True, **switches):
    torch.manual_seed(0)
    return Experts(ExpertsConfig(count=4, per_token=1, expert=EXPERT, score="sigmoid", bias=bias, **switches), WIDTH)


def test_one_step_moves_each_bias_by_the_rate_towards_the_mean():
    layer = experts()
    layer.load_E = torch.tensor([10, 2, 0, 4])
    metrics = balance_step(torch.nn.ModuleList([layer]), 0.01)
    torch.testing.assert_close(layer.router_bias, torch.tensor([-0.01, 0.01, 0.01, 0.0]), check_device=False)
    assert layer.load_E is None
    assert float(metrics["experts/max_load"]) == 10 / 4
    assert float(metrics["experts/min_load"]) == 0.0
    shares = [10 / 16, 2 / 16, 4 / 16]
    assert float(metrics["experts/entropy"]) == pytest.approx(-sum(s * log(s) for s in shares) / log(4))


def test_worst_of_all_layers_and_mean_entropy():
    layers = torch.nn.ModuleList([experts(), experts()])
    layers[0].load_E, layers[1].load_E = torch.tensor([3, 3, 3, 3]), torch.tensor([8, 0, 0, 0])
    metrics = balance_step(layers)
    assert [float(metrics[f"experts/{name}"]) for name in ("max_load", "min_load", "entropy")] == [4.0, 0.0, 0.5]
    assert not layers[0].router_bias.any()


def test_a_router_without_a_bias_is_only_observed():
    layer = experts(bias=False)
    layer.load_E = torch.tensor([1, 1, 1, 5])
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert float(balance_step(layer)["experts/max_load"]) == 2.5
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_what_was_counted_outside_of_a_step_is_forgotten():
    layer = experts().train()
    layer(torch.randn(9, WIDTH))
    forget_load(torch.nn.Sequential(layer))
    assert balance_step(layer) == {}


def test_nothing_to_say_without_experts_or_without_tokens():
    assert balance_step(torch.nn.Linear(2, 2)) == {}
    assert balance_step(experts()) == {}


@pytest.mark.parametrize("per_token", [1, 2])
def test_a_skewed_router_is_evened_out_while_it_learns_and_no_loss_is_added(per_token):
    """Tokens that all lie in one direction go to one expert; the bias spreads them, by nothing else than the choice."""
    layer = experts().train()
    layer.config = layer.config.model_copy(update={"per_token": per_token})
    generator = torch.Generator().manual_seed(1)
    direction = F.normalize(layer.router.weight.detach()[2], dim=0)
    target = torch.randn(WIDTH, WIDTH, generator=generator)
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    history = []
    for _ in range(400):
        x = torch.randn(256, WIDTH, generator=generator) + 4 * direction
        loss = F.mse_loss(layer(x), x @ target)
        optimiser.zero_grad()
        loss.backward()
        assert layer.router_bias.grad is None
        optimiser.step()
        history.append({name: float(value) for name, value in balance_step(layer, 0.01).items()})
    assert history[0]["experts/max_load"] > 1.8
    recent = history[-50:]
    assert sum(step["experts/max_load"] for step in recent) / 50 < 1.4
    assert sum(step["experts/min_load"] for step in recent) / 50 > 0.6
    assert sum(step["experts/entropy"] for step in recent) / 50 > 0.98


def test_a_checkpoint_keeps_the_bias_in_full_precision(tmp_path):
    plan = size("1m", vocab=300, context=64, overrides=SizeOverrides(width=64, layers=2))
    model = build(experts_config(plan, 300, 64))
    initialise(model, 0)
    model.train()
    for seed in range(3):
        model(torch.randint(300, (200,), generator=torch.Generator().manual_seed(seed)), torch.arange(200))
        balance_step(model)
    bias = model.trunk.layers[1].feedforward.router_bias
    assert bias.any()
    save_checkpoint(model, family_of_fresh(model.config), tmp_path)
    again = Checkpoint.open(tmp_path).load(torch.bfloat16).trunk.layers[1].feedforward.router_bias
    assert again.dtype == torch.float32
    assert torch.equal(again, bias)


TWO_RANKS = """
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from craton.models import build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import experts_config
from craton.pretraining.sizing import SizeOverrides, size
from craton.training.experts import balance_step

dist.init_process_group("gloo")
rank = dist.get_rank()
plan = size("1m", vocab=300, context=64, overrides=SizeOverrides(width=64, layers=3))
config = experts_config(plan, 300, 64)
alone, sharded = build(config), build(config)
initialise(alone, 5)
for layer in sharded.trunk.layers:
    fully_shard(layer)
fully_shard(sharded)
initialise(sharded, 5)
ids, positions = torch.randint(300, (64,), generator=torch.Generator().manual_seed(rank)), torch.arange(64)
for model in (alone, sharded):
    model.train()
    model(ids, positions).sum().backward()
    metrics = balance_step(model, 0.01)
for (name, whole), (_, part) in zip(alone.named_parameters(), sharded.named_parameters(), strict=True):
    assert torch.equal(whole, part.full_tensor()), name
bias = torch.stack([layer.feedforward.router_bias for layer in alone.trunk.layers[1:]])
others = [torch.empty_like(bias) for _ in range(2)]
dist.all_gather(others, bias)
assert torch.equal(others[0], others[1]) and bias.any()
# A rank that had no tokens takes part all the same.
if rank == 0:
    alone(ids, positions)
assert balance_step(alone).keys() == metrics.keys()
dist.barrier()  # the first to leave takes the connections of the other down
dist.destroy_process_group()
os._exit(0)  # as the command line does, see craton.cli.main
"""


@pytest.mark.slow
def test_two_ranks_agree_and_shards_are_parts_of_the_whole():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS], env={**shared, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
