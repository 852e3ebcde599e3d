"""A model that is never whole in fp32: its weights stay where the file holds them, and one block at a time is opened.

What calibrates goes through the blocks as hidden states (`Flow`); what a linear layer reads on the way is summed up as
`Inputs`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, Final, Self

import torch
from torch import Tensor, nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear
from craton.errors import CheckpointError
from craton.modalities.text import Tokenizer
from craton.models import (
    AnyModel,
    CausalLM,
    Classifier,
    DualEncoder,
    Encoder,
    ImageClassifier,
    ImageClassifierConfig,
    Seq2Seq,
    VisionConfig,
    VisionTransformer,
)
from craton.trunk import Linear, Trunk, replace_linears
from craton.trunk.block import Block
from craton.trunk.cross_attention import Context, ContextView
from craton.trunk.layout import Layout
from craton.trunk.trunk import sequence_layout

PLAIN: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BATCH_TOKENS: Final = 4096  # that go through a block at once
NOT_COMPRESSED: Final = ("router", "shared_gate")  # of experts: small, and they decide
HEAD: Final = "head"
# Of each kind of model, the trunks whose blocks are walked through, in order.
TOWERS: Final[tuple[tuple[type[nn.Module], tuple[str, ...]], ...]] = (
    (CausalLM, ("trunk",)),
    (Encoder, ("trunk",)),
    (Classifier, ("backbone.trunk",)),
    (VisionTransformer, ("trunk",)),
    (ImageClassifier, ("backbone.trunk",)),
    (DualEncoder, ("vision.trunk", "text.trunk")),
    (Seq2Seq, ("encoder", "decoder")),
)


@dataclass(frozen=True)
class Tower:
    """A stack of blocks that is walked through by itself. name: of its trunk in the model ("vision.trunk"). first: how
    many blocks the towers before it have."""

    name: str
    trunk: Trunk
    first: int

    def block_name(self, number: int) -> str:
        """The name in the model of its block of this number."""
        return f"{self.name}.layers.{number}"


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
        """The model around the trunk of a model of text."""
        return backbone(self.model)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """What is walked through. Of a model that chats about pictures the language model alone: what it sees with is a
        small part, and text calibrates nothing of it."""
        return towers(self.model)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model that only sees."""
        return tokenizer_of(self.checkpoint)

    @property
    def blocks(self) -> int:
        """Of all towers."""
        return sum(len(tower.trunk.layers) for tower in self.towers)


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer | None:
    """None for a model that only sees."""
    sees = isinstance(checkpoint.config, VisionConfig | ImageClassifierConfig)
    return None if sees else checkpoint.tokenizer()


def open_source(checkpoint: Checkpoint) -> Source:
    """The model of a checkpoint, ready to be compressed. Raises CheckpointError for what has no trunk of ours."""
    kinds = tuple(sorted(checkpoint.quantized_kinds()))
    stored = PLAIN.get(checkpoint.stored_kind())
    model = checkpoint.load(stored or torch.float32, packed=True)
    if not _tower_names(model):
        raise CheckpointError(
            f"a {type(model).__name__} cannot be compressed",
            where=str(checkpoint.path),
            remedy="take a language model, an encoder or classifier of texts or pictures, or a speech model",
        )
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
    if isinstance(model, CausalLM | Seq2Seq) and model.config.tied:
        model.head.weight = model.embedding.weight
    for module in model.modules():
        if isinstance(module, CausalLM | Encoder | VisionTransformer):
            module.compute_dtype = torch.float32
    return Source(checkpoint, model.requires_grad_(False).eval(), dtype, kinds)


def _tower_names(model: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in TOWERS if isinstance(model, kind)), ())


def towers(model: nn.Module) -> tuple[Tower, ...]:
    """See `Source.towers`."""
    found: list[Tower] = []
    first = 0
    for name in _tower_names(model):
        trunk = model.get_submodule(name)
        assert isinstance(trunk, Trunk)
        found.append(Tower(name, trunk, first))
        first += len(trunk.layers)
    return tuple(found)


def backbone(model: AnyModel) -> CausalLM | Encoder:
    """The model around the trunk of a model of text."""
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


@dataclass(frozen=True)
class _Batch:
    """What goes through a block at once. rows: in the hidden states. given: of the trunk's call, by name. context_CSW:
    what cross-attention reads."""

    rows: slice
    given: dict[str, Any]
    context_CSW: Tensor | None

    def layout(self, block: Block, number: int) -> Layout:
        view = self.given.get("context")
        if block.cross_attention is not None and view is not None:
            assert self.context_CSW is not None
            # Keys and values are the block's own, whose matrices are changed as all others are.
            view = ContextView(Context([block.cross_attention.read(self.context_CSW)] * (number + 1)), view.runs)
        given = self.given
        return Layout(
            given["positions_T"], given.get("segments_T"), None, torch.float32, given.get("row"), context=view
        )


class Flow:
    """The hidden states of sequences on their way through the blocks of a tower: [tokens, width] in fp32."""

    @torch.no_grad()
    def __init__(
        self, trunk: Trunk, passes: Sequence[Callable[[], object]], contexts: Sequence[Tensor] | None = None
    ) -> None:
        """passes: calls of the model, each of which runs the trunk once; what stands before its first block is taken.
        contexts: what cross-attention reads in each of them."""
        with _only_front(trunk) as calls:
            for run in passes:
                run()
        self._batches: list[_Batch] = []
        start = 0
        for (part_TD, given), context_CSW in zip(calls, contexts or repeat(None), strict=False):
            self._batches.append(_Batch(slice(start, start + len(part_TD)), given, context_CSW))
            start += len(part_TD)
        self.hidden_TD = torch.cat([part_TD for part_TD, _ in calls])

    def copy(self) -> Self:
        """The same hidden states, to go another way."""
        other = copy.copy(self)
        other.hidden_TD = self.hidden_TD.clone()
        return other

    def pass_through(self, block: Block, number: int) -> Iterator[tuple[slice, Tensor]]:
        """The block's outputs for each batch of sequences, with the rows that they belong to."""
        for batch in self._batches:
            with torch.no_grad():
                out_TD = block(self.hidden_TD[batch.rows], batch.layout(block, number), number)
            yield batch.rows, out_TD

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


class Stream(Flow):
    """The hidden states of windows of text: [windows * window, width] in fp32."""

    def __init__(self, model: CausalLM | Encoder, ids_NT: Tensor) -> None:
        self.count, self.window = ids_NT.shape
        read = model.hidden if isinstance(model, CausalLM) else model
        together = max(1, BATCH_TOKENS // self.window)
        super().__init__(
            model.trunk,
            [
                partial(read, part.flatten(), *sequence_layout([self.window] * len(part)))
                for part in ids_NT.split(together)
            ],
        )


@contextmanager
def _only_front(trunk: Trunk) -> Iterator[list[tuple[Tensor, dict[str, Any]]]]:
    """While it is open, the trunk gives what its first block would read; gives that of each call, fp32, with what the
    call was given."""
    layers, norm = trunk.layers, trunk.final_norm
    trunk.layers, trunk.final_norm = nn.ModuleList(), None
    order = list(inspect.signature(trunk.forward).parameters)
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any], out_TD: Tensor) -> None:
        calls.append((out_TD.float(), dict(zip(order, args, strict=False)) | given))

    handle = trunk.register_forward_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()
        trunk.layers, trunk.final_norm = layers, norm


def plain_linear(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """A linear layer around given weights."""
    rows, columns = weight_OI.shape
    linear = Linear(columns, rows, bias=bias_O is not None, device="meta")
    linear.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        linear.bias = nn.Parameter(bias_O, requires_grad=False)
    return linear
