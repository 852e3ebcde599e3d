"""Feed-forward layers: dense, gated, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.trunk.config import Activation, ExpertsConfig, FeedForwardConfig

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where gated. x[T, width] -> [T, width]."""

    def __init__(self, config: FeedForwardConfig, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(width, config.hidden, bias=config.bias) if config.gated else None
        self.up = nn.Linear(width, config.hidden, bias=config.bias)
        self.down = nn.Linear(config.hidden, width, bias=config.bias)
        self.fused: nn.Module | None = None  # gate and up as one product, where the engine has joined them

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fused is not None:
            gate_TF, up_TF = self.fused(x_TD).chunk(2, -1)
            hidden_TF = self.activation(gate_TF) * up_TF
        elif self.gate is not None:
            hidden_TF = self.activation(self.gate(x_TD)) * self.up(x_TD)
        else:
            hidden_TF = self.activation(self.up(x_TD))
        out_TD: Tensor = self.down(hidden_TF)
        return out_TD


class Experts(nn.Module):
    """Dropless mixture of experts: every token reaches all of its chosen experts. x[T, width] -> [T, width]."""

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(width, config.count, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(config.count), requires_grad=False) if config.bias else None
        self.experts = nn.ModuleList(FeedForward(config.expert, width) for _ in range(config.count))
        self.shared = FeedForward(config.shared, width) if config.shared is not None else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if config.shared_gate else None

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TA, chosen_TA = self.route(x_TD)
        out_TD = torch.zeros_like(x_TD)
        for expert in torch.unique(chosen_TA).tolist():
            rows, place = (chosen_TA == expert).nonzero(as_tuple=True)
            expert_out = self.experts[expert](x_TD[rows]) * weights_TA[rows, place, None]
            out_TD.index_add_(0, rows, expert_out.to(out_TD.dtype))
        if self.shared is None:
            return out_TD
        shared_TD: Tensor = self.shared(x_TD)
        if self.shared_gate is not None:
            shared_TD = shared_TD * self.shared_gate(x_TD).sigmoid()
        return out_TD + shared_TD

    def route(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's expert weights and expert numbers, [T, per_token] both; computed in fp32."""
        config = self.config
        # The router decides by small differences, so it runs in fp32 whatever the model's dtype.
        logits_TE = F.linear(x_TD.float(), self.router.weight.float())
        scores_TE = logits_TE.softmax(-1) if config.score == "softmax" else logits_TE.sigmoid()
        choice_TE = scores_TE if self.router_bias is None else scores_TE + self.router_bias.float()
        if config.groups > 1:
            choice_TE = self._keep_best_groups(choice_TE)
        chosen_TA = choice_TE.topk(config.per_token, -1).indices
        weights_TA = scores_TE.gather(-1, chosen_TA)
        if config.normalise:
            weights_TA = weights_TA / (weights_TA.sum(-1, keepdim=True) + 1e-20)
        return weights_TA * config.scale, chosen_TA

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        grouped = choice_TE.view(len(choice_TE), self.config.groups, -1)
        strength = grouped.topk(2, -1).values.sum(-1) if self.config.bias else grouped.amax(-1)
        best = strength.topk(self.config.groups_per_token, -1).indices
        keep = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~keep[..., None], float("-inf")).flatten(1)
