"""Attention over flat tokens: multi-head, grouped-query and multi-head latent."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.trunk.config import AttentionConfig
from craton.trunk.layout import Group, Layout, View
from craton.trunk.linear import Linear
from craton.trunk.norms import Norm

# Training on a CPU: up to about so many queries, torch's fp32 attention goes backwards up to five times faster than its
# bfloat16 one and is the more exact (docs/log.md). Longer sequences have a kernel of their own.
SHORT = 192


class Attention(nn.Module):
    """Grouped-query attention (Ainslie 2023, arXiv 2305.13245). x[T, width] -> [T, width]."""

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        self.config = config
        value_size = config.value_size or config.head_size
        q_size, k_size, v_size = (
            config.heads * config.head_size,
            config.kv_heads * config.head_size,
            config.kv_heads * value_size,
        )
        self.q = Linear(width, q_size, bias="q" in config.bias)
        self.k = Linear(width, k_size, bias="k" in config.bias)
        self.v = Linear(width, v_size, bias="v" in config.bias)
        self.o = Linear(config.heads * value_size, width, bias="o" in config.bias)
        if config.qk_norm is not None:
            over_head = config.qk_norm_over == "head"
            self.q_norm: Norm | None = Norm(config.qk_norm, config.head_size if over_head else q_size)
            self.k_norm: Norm | None = Norm(config.qk_norm, config.head_size if over_head else k_size)
        else:
            self.q_norm = self.k_norm = None
        self._q_size, self._k_size = q_size, k_size
        self.fused: nn.Module | None = None  # q, k and v as one product, where the engine has joined them

    def forward(self, x_TD: Tensor, layout: Layout, layer: int) -> Tensor:
        q_THK, k_TGK, v_TGV = self.project(x_TD, layout)
        out_TD: Tensor = self.o(attend(self.config, q_THK, k_TGK, v_TGV, layout, layer))
        return out_TD

    def project(self, x_TD: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, K], keys [T, G, K] and values [T, G, V], normed and rotated."""
        config = self.config
        rows, heads, groups, size = len(x_TD), config.heads, config.kv_heads, config.head_size
        rotary = layout.rotary(config.rotary) if config.rotary is not None else None
        if self.fused is not None and self.q_norm is None:
            # Queries and keys lie side by side, so one rotation serves both.
            joined_TX = self.fused(x_TD)
            qk_TX, v_TX = joined_TX.tensor_split((self._q_size + self._k_size,), -1)
            qk_THK = qk_TX.view(rows, heads + groups, size)
            qk_THK = rotary.apply(qk_THK) if rotary is not None else qk_THK
            q_THK, k_TGK = qk_THK.tensor_split((heads,), 1)
            return q_THK, k_TGK, v_TX.view(rows, groups, -1)
        if self.fused is not None:
            q_TX, k_TX, v_TX = self.fused(x_TD).tensor_split((self._q_size, self._q_size + self._k_size), -1)
        else:
            q_TX, k_TX, v_TX = self.q(x_TD), self.k(x_TD), self.v(x_TD)
        over_width = config.qk_norm_over == "width"
        if self.q_norm is not None and self.k_norm is not None and over_width:
            q_TX, k_TX = self.q_norm(q_TX), self.k_norm(k_TX)
        # As many heads as the projections give: under tensor parallelism each rank has its share of them.
        q_THK, k_TGK = q_TX.view(rows, -1, size), k_TX.view(rows, -1, size)
        if self.q_norm is not None and self.k_norm is not None and not over_width:
            q_THK, k_TGK = self.q_norm(q_THK), self.k_norm(k_TGK)
        if rotary is not None:
            q_THK, k_TGK = rotary.apply(q_THK), rotary.apply(k_TGK)
        return q_THK, k_TGK, v_TX.view(rows, k_TGK.shape[1], -1)


class LatentAttention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), keys and values expanded. x[T, width] -> same.

    Each head is [position-free | rotary]; the cache holds the expanded heads, so it shares the cache and the kernels
    of `Attention`.
    """

    def __init__(self, config: AttentionConfig, width: int) -> None:
        super().__init__()
        assert config.latent is not None
        self.config, self.latent = config, config.latent
        value_size = config.value_size or config.head_size
        latent, q_size = config.latent, config.heads * config.head_size
        bias = "k" in config.bias
        self.free_size = config.head_size - latent.rotary_size
        if latent.q_rank is None:
            self.q = Linear(width, q_size, bias=False)
        else:
            self.q_down = Linear(width, latent.q_rank, bias="q" in config.bias)
            self.q_norm = Norm(latent.norm, latent.q_rank)
            self.q_up = Linear(latent.q_rank, q_size, bias=False)
        self.kv_down = Linear(width, latent.kv_rank + latent.rotary_size, bias=bias)
        self.kv_norm = Norm(latent.norm, latent.kv_rank)
        self.kv_up = Linear(latent.kv_rank, config.heads * (self.free_size + value_size), bias=False)
        self.o = Linear(config.heads * value_size, width, bias="o" in config.bias)

    def forward(self, x_TD: Tensor, layout: Layout, layer: int) -> Tensor:
        config, latent, rows = self.config, self.latent, len(x_TD)
        assert config.rotary is not None
        rotary = layout.rotary(config.rotary)
        q_TX = self.q(x_TD) if latent.q_rank is None else self.q_up(self.q_norm(self.q_down(x_TD)))
        q_free_THK, q_rotary_THK = q_TX.view(rows, config.heads, -1).tensor_split((self.free_size,), -1)
        q_THK = torch.cat((q_free_THK, rotary.apply(q_rotary_THK)), -1)
        latent_TR, k_rotary_TK = self.kv_down(x_TD).tensor_split((latent.kv_rank,), -1)
        kv_THX = self.kv_up(self.kv_norm(latent_TR)).view(rows, config.heads, -1)
        k_free_THK, v_THV = kv_THX.tensor_split((self.free_size,), -1)
        k_rotary_THK = rotary.apply(k_rotary_TK[:, None]).expand(-1, config.heads, -1)
        k_THK = torch.cat((k_free_THK, k_rotary_THK), -1)
        out_TD: Tensor = self.o(attend(config, q_THK, k_THK, v_THV, layout, layer))
        return out_TD


def attend(config: AttentionConfig, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, layout: Layout, layer: int) -> Tensor:
    """softmax(q.k) v within each segment; keys and values go through the cache if the layout has one. [T, H * V]."""
    if len(layout.groups) == 1:
        return _attend_group(config, q_THK, k_TGK, v_TGV, layout.groups[0], layout, layer)
    # Split once: the gradient of a slice is as large as what it was cut from, that of a split is one concatenation.
    sizes = [group.count * group.size for group in layout.groups]
    parts = zip(q_THK.split(sizes), k_TGK.split(sizes), v_TGV.split(sizes), layout.groups, strict=True)
    return torch.cat([_attend_group(config, q, k, v, group, layout, layer) for q, k, v, group in parts])


def _attend_group(
    config: AttentionConfig, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, group: Group, layout: Layout, layer: int
) -> Tensor:
    count, size, view = group.count, group.size, group.view(config)
    (_, heads, k_size), (_, groups, v_size) = q_THK.shape, v_TGV.shape
    k_BGnK = k_TGK.reshape(count, size, groups, k_size).transpose(1, 2)
    v_BGnV = v_TGV.reshape(count, size, groups, v_size).transpose(1, 2)
    if layout.cache is not None:
        assert group.slots is not None
        layout.cache.write(layer, group.slots, group.starts, k_BGnK, v_BGnV)
        # A cache may keep fewer bits than the queries have, and what is read is what it keeps.
        length = view.last - view.first
        k_BGnK, v_BGnV = layout.cache.read(layer, group.slots, view.first, length, q_THK.dtype)
    if size == 1:
        # One query per sequence: the query heads that share a key head become rows, so no key is ever repeated.
        q_BGRK = q_THK.reshape(count, groups, heads // groups, k_size)
        return _softmax_attention(config, q_BGRK, k_BGnK, v_BGnV, view).reshape(count, heads * v_size)
    q_BHnK = q_THK.reshape(count, size, heads, k_size).transpose(1, 2)
    out_BHnV = _softmax_attention(config, q_BHnK, k_BGnK, v_BGnV, view)
    return out_BHnV.transpose(1, 2).reshape(count * size, heads * v_size)


def _softmax_attention(config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, view: View) -> Tensor:
    if config.softcap is None:
        grouped, dtype = q.shape[1] != k.shape[1], q.dtype
        if q.requires_grad and q.device.type == "cpu":
            if q.shape[2] <= SHORT:
                q, k, v = q.float(), k.float(), v.float()
            elif config.mask == "causal" and dtype == torch.bfloat16:
                # Only training needs it, and it brings torch's compiler: seconds that no other command should wait.
                from craton.trunk.cpu_attention import causal_attention

                return causal_attention(q, k, v, config.scale or config.head_size**-0.5, view.mask)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=view.mask, is_causal=view.causal, scale=config.scale, enable_gqa=grouped
        ).to(dtype)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(-1, -2)).float() * (config.scale or config.head_size**-0.5)
    scores = torch.tanh(scores / config.softcap) * config.softcap
    if view.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    elif view.mask is not None:
        scores = scores.masked_fill(~view.mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v
