"""Fresh weights: the same for a seed on every device and in every number of processes."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor, nn

from craton.models.causal_lm import CausalLM
from craton.models.dual_encoder import Similarity
from craton.models.segmenter import FourierPositions, PromptTokens
from craton.trunk import Trunk
from craton.trunk.block import LayerScale
from craton.trunk.feedforward import Experts
from craton.trunk.norms import Norm

# Of logits over hidden states of unit scale: small enough for a fresh model's loss to be ln(vocab).
LOGIT_STD: Final = 0.4


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Overwrite every parameter of a model.

    Matrices are normal with deviation 1/sqrt(inputs) (LeCun 1998), so that a layer keeps its input's scale at any
    width; those that write to the residual stream are divided by the root of the number of writers (GPT-2, Radford
    2019, section 2.3). Embeddings and the head have 0.4/sqrt(width), which is GPT-2's 0.02 at a width of 400; what
    stands beside sines and cosines has 1. Norms are the identity, biases zero. A convolution is the matrix that it
    multiplies each window with.

    Each parameter's numbers come from (seed, its name) alone and are drawn on the CPU in fp32, so they depend on no
    device, dtype, order or rank; of a sharded parameter (DTensor) each rank takes its part of the whole.

    Raises TypeError for a parameter of a module that it does not know.
    """
    writers = sum(2 * len(module.layers) for module in model.modules() if isinstance(module, Trunk)) or 1
    # A tied weight is met once, under the name of the embedding.
    for name, parameter in model.named_parameters():
        owner_name, _, kind = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        if isinstance(owner, Norm):
            value = torch.full(parameter.shape, 1.0 - owner.config.offset if kind == "weight" else 0.0)
        elif isinstance(owner, Similarity):
            value = torch.tensor(owner.initial(kind, owner.bias is not None))
        elif isinstance(owner, LayerScale):
            value = torch.full(parameter.shape, owner.initial)
        elif kind == "bias" or (isinstance(owner, Experts) and kind == "router_bias"):
            value = torch.zeros(parameter.shape)
        elif isinstance(owner, PromptTokens | FourierPositions):
            value = torch.randn(parameter.shape, generator=_generator(seed, name))
        elif isinstance(owner, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
            # A transposed convolution has its inputs first, and here each of its outputs is made of one place.
            std = (len(parameter) if isinstance(owner, nn.ConvTranspose2d) else parameter[0].numel()) ** -0.5
            if isinstance(owner, nn.Embedding) or (isinstance(model, CausalLM) and owner is model.head):
                std *= LOGIT_STD
            elif owner_name.endswith((".attention.o", ".down")):
                std *= writers**-0.5
            value = std * torch.randn(parameter.shape, generator=_generator(seed, name))
        else:
            raise TypeError(f"no initialisation for {name!r} of {type(owner).__name__}")
        parameter.copy_(placed_like(value, parameter))


def placed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, which every rank has as a whole, where `parameter` lies and in its dtype: this rank's part of it if the
    parameter is sharded. Nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
