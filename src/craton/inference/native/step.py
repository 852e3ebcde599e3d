"""A whole decode step in one call: embedding, every layer over the cache, head. What cannot be so has a reason."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from craton.errors import UsageError
from craton.inference.linears import PackedEmbedding, PackedLinear
from craton.inference.native import library as native
from craton.inference.native import packed, structures
from craton.models import CausalLM
from craton.trunk import FeedForwardConfig, KVCache, LayerConfig, NormConfig, RotaryConfig
from craton.trunk.attention import Attention
from craton.trunk.block import Block, BranchNorms
from craton.trunk.config import NormPlace
from craton.trunk.feedforward import FeedForward
from craton.trunk.norms import Norm
from craton.trunk.positions import inverse_frequencies

MOST_ROWS = 256  # of one call: kMostRows
LARGEST_HEAD = 256  # kLargestHead
ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")  # craton_activation
PLACES: tuple[NormPlace, ...] = ("input", "output", "residual")
CACHE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # craton_type


class Unsupported(Exception):
    """A model that the step cannot run; the text says why."""


class NativeStep:
    """One token for each of a few rows, by the kernels alone; torch's way through the model gives the same within the
    rounding of 8-bit activations.

    A row's numbers depend neither on the rows beside it, nor on threads, nor on the instruction set.
    """

    def __init__(self, model: CausalLM) -> None:
        """Raises Unsupported for a model that the step cannot run (see `build`)."""
        self._kept: list[Tensor] = []  # what the pointers below lead to
        config = model.config
        if config.trunk.positions is not None or config.trunk.input_norm is not None:
            raise Unsupported("the trunk adds learned positions or norms its input")
        rotaries: list[RotaryConfig] = []
        for layer in config.trunk.layers:
            if layer.attention.rotary is not None and layer.attention.rotary not in rotaries:
                rotaries.append(layer.attention.rotary)
        self._rotaries = (structures.Rotary * max(1, len(rotaries)))(*(self._rotary(rotary) for rotary in rotaries))
        blocks: list[Block] = list(model.trunk.layers)  # type: ignore[arg-type]
        self._layers = (structures.Layer * max(1, len(blocks)))(*(self._layer(b, rotaries) for b in blocks))
        embedding, table = self._embedding(model.embedding)
        self._model = structures.Model(
            layers=self._layers,
            rotaries=self._rotaries,
            layer_count=len(blocks),
            rotary_count=len(rotaries),
            embedding=embedding,
            embedding_table=table,
            embedding_scale=config.embedding_scale or 1.0,
            final_norm=self._norm(model.trunk.final_norm),
            head=self._projection(model.head, "the head"),
            logit_softcap=config.logit_softcap or 0.0,
            parts=model.head.parts,  # the head is a PackedLinear, and all of them have the same
        )
        self._vocab = config.vocab
        self._cache = structures.Cache()
        self._seen: Tensor | None = None  # the first layer's keys when the cache's pointers were taken
        self._pointers: list[ctypes.Array[ctypes.c_void_p]] = []

    def __call__(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        cache: KVCache,
        threads: int,
        *,
        parts: int | None = None,
        logits: int | None = None,
    ) -> Tensor:
        """fp32 logits [logits, vocab] that follow the last `logits` of the rows (default: all): token ids[i] at
        positions[i] of cache slot slots[i].

        Keys and values go to the cache, whose lengths then end with the last of the rows. Several rows of one slot are
        several tokens of one sequence: each sees those before it. parts: the arithmetic of the layers' products (see
        `native.linear`), by default the model's own.

        Raises UsageError for a row outside the vocabulary or the cache.
        """
        cache.reserve(max(positions, default=0) + 1)
        self._take(cache)
        wanted = len(ids) if logits is None else logits
        logits_BV = torch.empty(wanted, self._vocab)
        silent = len(ids) - wanted
        for first in range(0, len(ids), MOST_ROWS):
            part = slice(first, first + MOST_ROWS)
            answered = slice(max(0, first - silent), max(0, first + MOST_ROWS - silent))
            self._run(
                ids[part],
                positions[part],
                slots[part],
                logits_BV[answered],
                self._model.parts if parts is None else parts,
                threads,
            )
        for position, slot in zip(positions, slots, strict=True):
            cache.lengths[slot] = position + 1
        return logits_BV

    def _run(
        self,
        ids: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        logits_BV: Tensor,
        parts: int,
        threads: int,
    ) -> None:
        numbers = ctypes.c_int64 * len(ids)
        arrays = [numbers(*column) for column in (ids, positions, slots)]
        rows = structures.StepRows(*map(ctypes.addressof, arrays), len(ids), len(logits_BV), parts)
        status = native.library().craton_step(
            ctypes.byref(self._model), ctypes.byref(self._cache), ctypes.byref(rows), logits_BV.data_ptr(), threads
        )
        if status == native.NO_MEMORY:
            raise MemoryError("no memory for a step of the model")
        if status != native.OK:
            raise UsageError(
                f"a step of ids {list(ids)} at positions {list(positions)} of slots {list(slots)} does not fit "
                f"a vocabulary of {self._vocab} and a cache of {self._cache.slots} slots"
            )

    def _take(self, cache: KVCache) -> None:
        # A cache that grows has new tensors.
        if cache.keys and cache.keys[0] is self._seen:
            return
        pointers = ctypes.c_void_p * max(1, len(cache.keys))
        self._pointers = [pointers(*(t.data_ptr() for t in tensors)) for tensors in (cache.keys, cache.values)]
        self._seen = cache.keys[0] if cache.keys else None
        slots, _, capacity, _ = cache.keys[0].shape if cache.keys else (len(cache.lengths), 0, 0, 0)
        type_ = CACHE_TYPES[cache.keys[0].dtype] if cache.keys else 0
        keys, values = self._pointers
        self._cache = structures.Cache(keys, values, slots, capacity, len(cache.keys), type_)

    def _keep(self, tensor: Tensor) -> int:
        """The address of these numbers as fp32, which then stay where they are."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _weight(self, weight: packed.PackedWeight) -> native.Weight:
        self._kept.append(weight.data)
        return native.Weight(weight.data.data_ptr(), weight.n, weight.k, packed.FORMATS[weight.kind])

    def _projection(self, linear: nn.Module, name: str) -> structures.Projection:
        if type(linear) is not PackedLinear:
            raise Unsupported(f"{name} is a {type(linear).__name__} and has no packed weight")
        bias = None if linear.bias is None else self._keep(linear.bias)
        return structures.Projection(self._weight(linear.packed), bias)

    def _embedding(self, embedding: nn.Module) -> tuple[native.Weight, int | None]:
        if type(embedding) is PackedEmbedding:
            return self._weight(embedding.packed), None
        if type(embedding) is not nn.Embedding or embedding.embedding_dim % packed.GROUP:
            raise Unsupported(f"the embedding is a {type(embedding).__name__} that cannot be looked up")
        vocab, width = embedding.weight.shape
        return native.Weight(None, vocab, width, packed.FORMATS["Q8_0"]), self._keep(embedding.weight)

    def _norm(self, norm: nn.Module | None) -> structures.Norm:
        if norm is None:
            return structures.Norm()
        assert isinstance(norm, Norm)
        self._check_norm(norm.config)
        return structures.Norm(self._keep(norm.weight.float() + norm.config.offset), norm.config.eps)

    def _check_norm(self, config: NormConfig) -> None:
        if config.kind != "rms":
            raise Unsupported("its norms are LayerNorms")

    def _rotary(self, config: RotaryConfig) -> structures.Rotary:
        if config.scaling is not None and config.scaling.kind == "longrope":
            raise Unsupported("its rotary frequencies change with the length of the text (LongRoPE)")
        factor = config.scaling.attention_factor if config.scaling is not None else 1.0
        return structures.Rotary(self._keep(inverse_frequencies(config)), config.dims, config.interleaved, factor)

    def _layer(self, block: Block, rotaries: list[RotaryConfig]) -> structures.Layer:
        config: LayerConfig = block.config
        attention, forward = block.attention, block.feedforward
        if config.parallel:
            raise Unsupported("its attention and feed-forward run side by side")
        if type(attention) is not Attention or config.attention.latent is not None:
            raise Unsupported(f"its attention is {type(attention).__name__}")
        if type(forward) is not FeedForward or not isinstance(config.feedforward, FeedForwardConfig):
            raise Unsupported(f"its feed-forward is {type(forward).__name__}")
        layer = structures.Layer()
        self._fill_attention(layer, attention, rotaries)
        self._fill_feedforward(layer, forward, config.feedforward)
        for norms, module in (
            (layer.attention_norms, block.attention_norm),
            (layer.feedforward_norms, block.feedforward_norm),
        ):
            for i, place in enumerate(PLACES):
                norms[i] = self._place(module, place)
        return layer

    def _place(self, norms: BranchNorms, place: NormPlace) -> structures.Norm:
        return self._norm(norms[place]) if place in norms else structures.Norm()

    def _fill_attention(self, layer: structures.Layer, attention: Attention, rotaries: list[RotaryConfig]) -> None:
        config = attention.config
        if config.mask != "causal":
            raise Unsupported("its attention is not causal")
        if config.value_size not in (None, config.head_size):
            raise Unsupported("its value heads differ in size from its key heads")
        if config.head_size % 16 or config.head_size > LARGEST_HEAD:
            raise Unsupported(f"its heads have {config.head_size} numbers, not a multiple of 16 up to {LARGEST_HEAD}")
        parts = [attention.fused] if attention.fused is not None else [attention.q, attention.k, attention.v]
        for i, part in enumerate(parts):
            layer.qkv[i] = self._projection(part, "a projection of its attention")
        layer.o = self._projection(attention.o, "a projection of its attention")
        layer.q_norm, layer.k_norm = self._norm(attention.q_norm), self._norm(attention.k_norm)
        layer.norm_over_width = config.qk_norm_over == "width"
        layer.heads, layer.kv_heads, layer.head_size = config.heads, config.kv_heads, config.head_size
        layer.window, layer.softcap = config.window or 0, config.softcap or 0.0
        layer.scale = config.scale or config.head_size**-0.5
        layer.rotary = -1 if config.rotary is None else rotaries.index(config.rotary)

    def _fill_feedforward(self, layer: structures.Layer, forward: FeedForward, config: FeedForwardConfig) -> None:
        layer.activation = ACTIVATIONS.index(config.activation)
        layer.down = self._projection(forward.down, "a feed-forward layer")
        if forward.fused is None:
            layer.up = self._projection(forward.up, "a feed-forward layer")
            if forward.gate is not None:
                layer.gate = self._projection(forward.gate, "a feed-forward layer")
            return
        # One packed matrix holds the rows of both; the gate's are whole strips of it, so the second half is one too.
        both, hidden = self._projection(forward.fused, "a feed-forward layer"), config.hidden
        kind = native.library().craton_packed_bytes
        half = kind(both.weight.format, hidden, both.weight.columns)
        for name, first in (("gate", 0), ("up", 1)):
            weight = native.Weight(both.weight.data + first * half, hidden, both.weight.columns, both.weight.format)
            bias = None if both.bias is None else both.bias + first * hidden * 4
            setattr(layer, name, structures.Projection(weight, bias))


def build(model: CausalLM) -> tuple[NativeStep | None, str]:
    """The step of this model and "", or None and the reason in one clause: then torch does the same work."""
    if not native.available():
        return None, native.reason()
    try:
        return NativeStep(model), ""
    except Unsupported as reason:
        return None, str(reason)
