"""Parameter groups and the optimisers over them: AdamW (arXiv 1711.05101) and Muon (Jordan 2024), both torch's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from craton.training.settings import TrainingSettings


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are updated alike. weight_decay: of the group."""

    name: str
    parameters: dict[str, nn.Parameter]
    weight_decay: float

    @property
    def numel(self) -> int:
        """Numbers in the group."""
        return sum(parameter.numel() for parameter in self.parameters.values())


def parameter_groups(model: nn.Module, settings: TrainingSettings) -> list[ParameterGroup]:
    """Every trained parameter in exactly one group: matrices and kernels of convolutions (which decay), embeddings,
    vectors (which do not).

    A head that is tied to its embedding is one parameter and counts as an embedding.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "kernels": {}, "embeddings": {}, "vectors": {}}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_shape = {0: "vectors", 1: "vectors", 2: "matrices"}.get(parameter.dim(), "kernels")
            kind = "embeddings" if id(parameter) in embeddings else by_shape
            groups[kind][name] = parameter
    decay = {"matrices": settings.weight_decay, "kernels": settings.weight_decay}
    found = [ParameterGroup(name, members, decay.get(name, 0.0)) for name, members in groups.items() if members]
    grouped = sum(len(group.parameters) for group in found)
    trained = sum(parameter.requires_grad for parameter in model.parameters())
    assert grouped == trained, f"{grouped} of {trained} parameters are in a group"
    return found


def free_weights(model: nn.Module) -> None:
    """Let everything be trained, but for the router biases: load balancing moves those without a gradient."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("router_bias"))


class Optimisers:
    """The optimisers of one run as one thing. Weights and state are fp32 masters; the model casts as it computes."""

    def __init__(self, groups: list[ParameterGroup], settings: TrainingSettings) -> None:
        self.groups, self._settings = groups, settings
        adam: list[dict[str, Any]] = []
        muon: list[dict[str, Any]] = []
        for group in groups:
            entry = {"params": list(group.parameters.values()), "weight_decay": group.weight_decay, "name": group.name}
            # Muon's rule is one of matrices; the head and embeddings stay with AdamW, as its author recommends.
            (muon if settings.optimiser == "muon" and group.name == "matrices" else adam).append(entry)
        self.members: dict[str, torch.optim.Optimizer] = {}
        if adam:
            betas = (settings.beta1, settings.beta2)
            self.members["adamw"] = torch.optim.AdamW(adam, settings.learning_rate, betas, fused=True)
        if muon:
            # Updates of AdamW's size (Liu 2025, arXiv 2502.16982), so that one learning rate serves both.
            self.members["muon"] = torch.optim.Muon(
                muon, settings.learning_rate, nesterov=True, adjust_lr_fn="match_rms_adamw"
            )

    def step(self, share: float) -> None:
        """Update all parameters at `share` of the highest learning rate, and forget their gradients."""
        for optimiser in self.members.values():
            for group in optimiser.param_groups:
                group["lr"] = self._settings.learning_rate * share
            optimiser.step()
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for optimiser in self.members.values():
            optimiser.zero_grad(set_to_none=True)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of all groups."""
        for group in self.groups:
            yield from group.parameters.items()

    def gradients(self) -> list[Tensor]:
        """The gradients that there are."""
        return [parameter.grad for _, parameter in self.parameters() if parameter.grad is not None]

    def state(self) -> dict[str, Tensor]:
        """The state as tensors: "parameter.quantity" (such as "trunk.layers.0.attention.q.weight.exp_avg")."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters():
            for optimiser in self.members.values():
                state = optimiser.state.get(parameter, {})
                tensors |= {f"{name}.{key}": value for key, value in state.items() if isinstance(value, Tensor)}
        return tensors

    def initialise_state(self) -> None:
        """Make the state's tensors without a step, so that a saved state has somewhere to go."""
        for _, parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimiser in self.members.values():
            rates = [group["lr"] for group in optimiser.param_groups]
            decays = [group["weight_decay"] for group in optimiser.param_groups]
            for group in optimiser.param_groups:
                group["lr"], group["weight_decay"] = 0.0, 0.0
            optimiser.step()
            for group, rate, decay in zip(optimiser.param_groups, rates, decays, strict=True):
                group["lr"], group["weight_decay"] = rate, decay
        self.zero_grad()


def describe(groups: Iterable[ParameterGroup]) -> str:
    """The groups in one line, for people."""
    return ", ".join(f"{g.name}: {g.numel:,} in {len(g.parameters)} (decay {g.weight_decay:g})" for g in groups)
