"""Cross-attention: the rows of one sequence attend to the vectors of another, whose keys and values are made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.trunk.config import CrossAttentionConfig
from craton.trunk.linear import Linear


class Context:
    """C contexts of S vectors each, as every layer attends to them: its keys [C, G, S, K] and values [C, G, S, K]."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.layers = layers

    def view(self, contexts: Sequence[int], *, record: bool = False) -> ContextView:
        """Which context each row of a flat batch sees: the rows that see the same one stand together. record: keep the
        scores (see `ContextView`)."""
        runs: list[Run] = []
        for context, rows in ((number, len(list(run))) for number, run in groupby(contexts)):
            last = runs[-1] if runs else None
            if last is not None and last.rows == rows and last.first + last.count == context:
                runs[-1] = Run(last.first, last.count + 1, rows)
            else:
                runs.append(Run(context, 1, rows))
        return ContextView(self, runs, [] if record else None)


@dataclass(frozen=True)
class Run:
    """`count` contexts from number `first` on, each seen by the next `rows` rows."""

    first: int
    count: int
    rows: int


@dataclass
class ContextView:
    """The contexts that one pass sees. scores: where they are kept, q.k scaled (before the softmax) of every layer and
    run, in this order, fp32 [count, H, rows, S]; they say where a decoder looked."""

    context: Context
    runs: Sequence[Run]
    scores: list[Tensor] | None = field(default=None)


class CrossAttention(nn.Module):
    """x[T, width] -> [T, width], attending to a context."""

    def __init__(self, config: CrossAttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        q_size, kv_size = config.heads * config.head_size, config.kv_heads * config.head_size
        self.q = Linear(width, q_size, bias="q" in config.bias)
        self.k = Linear(config.context_width, kv_size, bias="k" in config.bias)
        self.v = Linear(config.context_width, kv_size, bias="v" in config.bias)
        self.o = Linear(q_size, width, bias="o" in config.bias)

    def read(self, context_CSW: Tensor, keyed_CSW: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [C, G, S, K] of the contexts. keyed_CSW: what keys are made of, where that is another (the
        same with its places added)."""
        shape, config = context_CSW.shape[:2], self.config
        keyed_CSW = context_CSW if keyed_CSW is None else keyed_CSW
        k_CGSK, v_CGSK = (
            part(flat).view(*shape, config.kv_heads, config.head_size).transpose(1, 2).contiguous()
            for part, flat in ((self.k, keyed_CSW.flatten(0, 1)), (self.v, context_CSW.flatten(0, 1)))
        )
        return k_CGSK, v_CGSK

    def attend_to(self, x_TD: Tensor, context_CSW: Tensor, keyed_CSW: Tensor | None = None) -> Tensor:
        """The same without a context made before: each of C contexts is seen by T / C rows, one after another."""
        count = len(context_CSW)
        run = Run(0, count, len(x_TD) // count)
        return self(x_TD, ContextView(Context([self.read(context_CSW, keyed_CSW)]), [run]), 0)

    def forward(self, x_TD: Tensor, view: ContextView, layer: int) -> Tensor:
        q_TX = self.q(x_TD)
        sizes = [run.count * run.rows for run in view.runs]
        outs = [self._attend(q, run, view, layer) for q, run in zip(q_TX.split(sizes), view.runs, strict=True)]
        out_TD: Tensor = self.o(torch.cat(outs) if len(outs) > 1 else outs[0])
        return out_TD

    def _attend(self, q_RX: Tensor, run: Run, view: ContextView, layer: int) -> Tensor:
        config = self.config
        k_CGSK, v_CGSK = (t.narrow(0, run.first, run.count) for t in view.context.layers[layer])
        q_CHnK = q_RX.view(run.count, run.rows, config.heads, config.head_size).transpose(1, 2)
        if view.scores is not None:
            repeated_CHSK = k_CGSK.repeat_interleave(config.heads // config.kv_heads, 1)
            view.scores.append((q_CHnK @ repeated_CHSK.transpose(-1, -2)).float() * config.head_size**-0.5)
        out_CHnK = F.scaled_dot_product_attention(q_CHnK, k_CGSK, v_CGSK, enable_gqa=config.heads != config.kv_heads)
        return out_CHnK.transpose(1, 2).reshape(len(q_RX), -1)
