"""Feed-forward layers: dense, gated, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.trunk.config import Activation, ExpertsConfig, FeedForwardConfig
from craton.trunk.linear import Linear

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: x * (1.702 * x).sigmoid(),
    "relu": F.relu,
    "silu": F.silu,
}


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(activation(gate(x)) * up(x)) where gated. x[T, width] -> [T, width]."""

    def __init__(self, config: FeedForwardConfig, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = Linear(width, config.hidden, bias=config.bias) if config.gated else None
        self.up = Linear(width, config.hidden, bias=config.bias)
        self.down = Linear(config.hidden, width, bias=config.bias)
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
    """Dropless mixture of experts: every token reaches all of its chosen experts. x[T, width] -> [T, width].

    load_E: in training, how many tokens each expert was given since it was last set to None; no part of the state.
    """

    def __init__(self, config: ExpertsConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = Linear(width, config.count, bias=False)
        self.router_bias = nn.Parameter(torch.zeros(config.count), requires_grad=False) if config.bias else None
        self.experts = nn.ModuleList(FeedForward(config.expert, width) for _ in range(config.count))
        self.shared = FeedForward(config.shared, width) if config.shared is not None else None
        self.shared_gate = Linear(width, 1, bias=False) if config.shared_gate else None
        self.load_E: Tensor | None = None

    def forward(self, x_TD: Tensor) -> Tensor:
        out_TD = self._routed(x_TD, *self.route(x_TD))
        if self.shared is None:
            return out_TD
        shared_TD: Tensor = self.shared(x_TD)
        if self.shared_gate is not None:
            shared_TD = shared_TD * self.shared_gate(x_TD).sigmoid()
        return out_TD + shared_TD

    def _routed(self, x_TD: Tensor, weights_TA: Tensor, chosen_TA: Tensor) -> Tensor:
        # Rows (a token for one of its experts) sorted by expert, so that each expert reads one slice. The sort is
        # stable: the order in which a token's experts are added up is always the same.
        expert_R = chosen_TA.flatten()
        row_R = expert_R.argsort(stable=True)
        token_R = row_R // self.config.per_token
        count_E = torch.bincount(expert_R, minlength=self.config.count)
        if self.training:
            self.load_E = count_E if self.load_E is None else self.load_E + count_E
        parts = x_TD.index_select(0, token_R).split(count_E.tolist())
        # Where gradients are taken, an expert without tokens runs as well and gets a gradient of zeros, because sharded
        # training needs the same gradients to exist on every rank.
        everywhere = torch.is_grad_enabled()
        outs = [expert(part) for expert, part in zip(self.experts, parts, strict=True) if everywhere or len(part)]
        weighted_RD = torch.cat(outs) * weights_TA.flatten()[row_R, None].to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add_(0, token_R, weighted_RD)

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
