"""A model that is never whole in fp32: its weights stay where the file holds them, and one block at a time is opened.

What calibrates goes through the blocks as hidden states (`Stream`); what a linear layer reads on the way is summed up
as `Inputs`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear
from craton.errors import CheckpointError
from craton.models import AnyModel, CausalLM, Classifier, Encoder
from craton.trunk import Linear, replace_linears
from craton.trunk.block import Block
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BATCH_TOKENS: Final = 4096  # that go through a block at once
NOT_COMPRESSED: Final = ("router", "shared_gate")  # of experts: small, and they decide
HEAD: Final = "head"


@dataclass(frozen=True)
class Source:
    """A model to compress. model: its weights as the file holds them, mapped; only what a pass needs is ever in fp32.

    dtype: of its plain numbers, in which they are saved again. kinds: of the quantised weights it came with.
    """

    checkpoint: Checkpoint
    model: AnyModel
    dtype: torch.dtype
    kinds: tuple[str, ...]

    @property
    def backbone(self) -> CausalLM | Encoder:
        """The model around the trunk."""
        return backbone(self.model)

    @property
    def prefix(self) -> str:
        """What stands before the names of the backbone's tensors."""
        return "backbone." if isinstance(self.model, Classifier) else ""


def open_source(checkpoint: Checkpoint) -> Source:
    """The model of a checkpoint, ready to be compressed. Raises CheckpointError for what has no trunk of ours."""
    kinds = tuple(sorted(checkpoint.quantized_kinds()))
    stored = PLAIN.get(checkpoint.stored_kind())
    model = checkpoint.load(stored or torch.float32, packed=True)
    if not isinstance(model, CausalLM | Encoder | Classifier):
        raise CheckpointError("this kind of model cannot be compressed", where=str(checkpoint.path))
    dtype = stored or torch.bfloat16
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Block))

    def make(name: str, module: nn.Module) -> nn.Module:
        assert isinstance(module, QuantizedLinear | QuantizedEmbedding)
        weight = module.quantized.dequantize(dtype)
        if isinstance(module, QuantizedEmbedding):
            return nn.Embedding.from_pretrained(weight)
        return plain_linear(weight, module.bias)

    def outside(name: str, module: nn.Module) -> bool:
        return isinstance(module, QuantizedLinear | QuantizedEmbedding) and not name.startswith(inside)

    replace_linears(model, outside, make)
    if isinstance(model, CausalLM) and model.config.tied:
        model.head.weight = model.embedding.weight
    backbone(model).compute_dtype = torch.float32
    return Source(checkpoint, model.requires_grad_(False).eval(), dtype, kinds)


def backbone(model: AnyModel) -> CausalLM | Encoder:
    """The model around the trunk."""
    found = model.backbone if isinstance(model, Classifier) else model
    assert isinstance(found, CausalLM | Encoder)
    return found


def in_fp32(block: Block, unpacked: torch.dtype = torch.float32) -> Block:
    """A copy of a block of its own, its weights as fp32 numbers. unpacked: what packed weights are rounded to first."""
    with torch.device("meta"):
        fresh = Block(block.config, block.width)
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in block.state_dict().items()}
    for name, module in block.named_modules():
        if isinstance(module, QuantizedLinear):
            state[f"{name}.weight"] = module.quantized.dequantize(unpacked).float()
    fresh.load_state_dict(state, assign=True)
    return fresh.requires_grad_(False).eval()


def linear_names(block: nn.Module) -> list[str]:
    """The linear layers of a block that are compressed, by their names in it."""
    return [
        name
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in NOT_COMPRESSED
    ]


def weight_of(block: nn.Module, name: str) -> Tensor:
    """The weight of a linear layer."""
    linear = block.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()


class Inputs:
    """What a linear layer read: sums over tokens of x, of fp32 [in]-vectors.

    tokens: how many there were.
    """

    def __init__(self, width: int, gram: bool) -> None:
        self.tokens = 0
        self._gram_II = torch.zeros(width, width) if gram else None
        self._square_I = torch.zeros(width)
        self._magnitude_I = torch.zeros(width)

    def add(self, x_TI: Tensor) -> None:
        """Take in the inputs of some tokens."""
        x_TI = x_TI.reshape(-1, x_TI.shape[-1]).float()
        self.tokens += len(x_TI)
        if self._gram_II is not None:
            self._gram_II.addmm_(x_TI.T, x_TI)
        self._square_I += x_TI.square().sum(0)
        self._magnitude_I += x_TI.abs().sum(0)

    def divided(self, scales_I: Tensor) -> Inputs:
        """The same of x / scales."""
        other = Inputs(len(scales_I), gram=False)
        other.tokens = self.tokens
        if self._gram_II is not None:
            other._gram_II = self._gram_II / scales_I / scales_I[:, None]
        other._square_I, other._magnitude_I = self._square_I / scales_I.square(), self._magnitude_I / scales_I.abs()
        return other

    @property
    def gram(self) -> Tensor:
        """The mean of x x^T, [in, in]: half the Hessian of the layer's squared error. Only if it was asked for."""
        assert self._gram_II is not None, "ask for it when the inputs are observed"
        return self._gram_II / max(1, self.tokens)

    @property
    def square(self) -> Tensor:
        """The mean of x^2, [in]."""
        return self._square_I / max(1, self.tokens)

    @property
    def magnitude(self) -> Tensor:
        """The mean of |x|, [in]."""
        return self._magnitude_I / max(1, self.tokens)


@contextmanager
def watching(module: nn.Module, names: Collection[str], gram: bool) -> Iterator[dict[str, Inputs]]:
    """While it is open, the inputs of these linear layers; layers that read the same tensor share one `Inputs`."""
    found: dict[str, Inputs] = {}
    seen: list[tuple[Tensor, str]] = []  # of one pass; they are kept alive so that none is taken for another

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            [x_TI] = args
            leader = next((other for x, other in seen if x is x_TI), None)
            if leader is not None:
                found[name] = found[leader]
                return
            seen.append((x_TI, name))
            found.setdefault(name, Inputs(x_TI.shape[-1], gram)).add(x_TI)

        return note

    handles = [module.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    handles.append(module.register_forward_hook(lambda *_: seen.clear()))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Stream:
    """The hidden states of windows on their way through the blocks: [windows * window, width] in fp32."""

    @torch.no_grad()
    def __init__(self, model: CausalLM | Encoder, ids_NT: Tensor) -> None:
        self.count, self.window = ids_NT.shape
        read = model.hidden if isinstance(model, CausalLM) else model
        with _only_front(model):
            parts = [read(ids, *self._layout(len(ids) // self.window)) for ids in ids_NT.flatten().split(self._rows)]
        self.hidden_TD = torch.cat(parts)

    def copy(self) -> Stream:
        """The same hidden states, to go another way."""
        other = copy.copy(self)
        other.hidden_TD = self.hidden_TD.clone()
        return other

    def pass_through(self, block: Block, number: int) -> Iterator[tuple[slice, Tensor]]:
        """The block's outputs for each batch of windows, with the rows that they belong to."""
        for start in range(0, len(self.hidden_TD), self._rows):
            rows = slice(start, min(start + self._rows, len(self.hidden_TD)))
            x_TD = self.hidden_TD[rows]
            layout = Layout(*self._layout(len(x_TD) // self.window), None, torch.float32)
            with torch.no_grad():
                out_TD = block(x_TD, layout, number)
            yield rows, out_TD

    def advance(self, block: Block, number: int) -> None:
        """Replace the hidden states by what the block makes of them."""
        for rows, out_TD in self.pass_through(block, number):
            self.hidden_TD[rows] = out_TD

    def observe(self, block: Block, number: int, names: Collection[str], *, gram: bool) -> dict[str, Inputs]:
        """What these linear layers of the block read; the hidden states stay as they are. A layer that no token reached
        (an expert) is absent."""
        with watching(block, names, gram) as found:
            for _ in self.pass_through(block, number):
                pass
        return found

    @property
    def _rows(self) -> int:
        return max(1, BATCH_TOKENS // self.window) * self.window

    def _layout(self, count: int) -> tuple[Tensor, Tensor]:
        return sequence_layout([self.window] * count)


@contextmanager
def _only_front(model: CausalLM | Encoder) -> Iterator[None]:
    """While it is open, the model gives what its first block would read."""
    trunk = model.trunk
    layers, norm = trunk.layers, trunk.final_norm
    trunk.layers, trunk.final_norm = nn.ModuleList(), None
    try:
        yield
    finally:
        trunk.layers, trunk.final_norm = layers, norm


def plain_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """A linear layer around given weights."""
    rows, columns = weight_OI.shape
    linear = Linear(columns, rows, bias=bias_O is not None, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O, requires_grad=False)
    return linear
