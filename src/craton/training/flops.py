"""Arithmetic of a model for each token, for estimates and for the share of the machine's peak that training reaches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from craton.models.masked_lm import MaskedLM
from craton.trunk.attention import Attention, LatentAttention
from craton.trunk.feedforward import Experts


@dataclass(frozen=True)
class TokenFlops:
    """Floating-point operations for each token. training: forward and backward; nothing computed twice is counted."""

    forward: float
    training: float


def token_flops(model: nn.Module, length: int) -> TokenFlops:
    """FLOPs for each token of sequences of `length`, by the usual convention (PaLM, Chowdhery 2022, appendix B).

    A trained parameter of a matrix costs 2 in the forward pass and 4 in the backward pass; a frozen one (quantised, or
    beneath an adapter) 2 and 2, since the gradient only passes through. Attention costs 4 * heads * head size * length
    forward and 8 back in each layer, at most a window's worth; causal masks halve nothing. Head included, looking up
    embeddings not; of routed experts those that a token reaches.
    """
    trained = frozen = 0.0
    for count, trains in _matrices(model):
        if trains:
            trained += count
        else:
            frozen += count
    scores = 0
    for module in model.modules():
        if isinstance(module, Attention | LatentAttention):
            config = module.config
            keys = min(config.window or length, length)
            scores += config.heads * (config.head_size + (config.value_size or config.head_size)) * keys
    return TokenFlops(2 * (trained + frozen) + 2 * scores, 6 * trained + 4 * frozen + 6 * scores)


def _matrices(module: nn.Module) -> Iterator[tuple[float, bool]]:
    # (parameters that a token is multiplied with, whether they are trained) of each matrix.
    if isinstance(module, nn.Embedding):
        return
    matrices: list[Tensor] = [weight for weight in module.parameters(recurse=False) if weight.dim() == 2]
    if isinstance(module, MaskedLM):
        matrices.append(module.encoder.embedding.weight)  # which is its head as well
    for weight in matrices:
        yield weight.numel(), weight.requires_grad
    if not matrices and _is_linear(module) and not any(_is_linear(child) for child in module.children()):
        yield int(module.in_features) * int(module.out_features), False  # type: ignore[arg-type]  # packed weights
    for name, child in module.named_children():
        reached = 1.0
        if isinstance(module, Experts) and name == "experts":
            reached = module.config.per_token / module.config.count
        for count, trains in _matrices(child):
            yield reached * count, trains


def _is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")
