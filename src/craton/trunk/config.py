"""Every switch of the trunk. A published family is a value of `TrunkConfig`, never a subclass of a module."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from craton.config import Settings

Activation = Literal["gelu", "gelu_tanh", "gelu_quick", "relu", "silu"]
NormPlace = Literal["input", "output", "residual"]
Projection = Literal["q", "k", "v", "o"]


class NormConfig(Settings):
    """LayerNorm (Ba 2016) or RMSNorm (Zhang & Sennrich 2019); statistics are always taken in fp32."""

    kind: Literal["layer", "rms"]
    eps: PositiveFloat = 1e-5
    bias: bool = Field(default=False, description="LayerNorm only: add a learned bias")
    offset: float = Field(default=0.0, description="RMSNorm only: the scale is offset + weight")


class RotaryScaling(Settings):
    """How rotary frequencies are stretched beyond the context of pretraining.

    linear: positions / factor. llama3: the long wavelengths only. yarn: Peng 2023 (arXiv 2309.00071).
    longrope: Ding 2024 (arXiv 2402.13753), one factor per frequency, one list for short and one for long sequences.
    """

    kind: Literal["linear", "llama3", "yarn", "longrope"]
    factor: PositiveFloat = 1.0
    original_context: PositiveInt | None = None
    attention_factor: PositiveFloat = Field(default=1.0, description="multiplies cos and sin, hence q.k by its square")
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = Field(default=True, description="yarn: round the correction range to whole dimensions")
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


class RotaryConfig(Settings):
    """Rotary position embedding (Su 2021) on the first `dims` of each head.

    axes: how many numbers say where a token is: 1 in a text, 2 in a picture. Each has an equal share of the pairs,
    the first axis the first of them (DINOv3, arXiv 2508.10104).
    """

    dims: PositiveInt = Field(multiple_of=2)
    theta: PositiveFloat = 10000.0
    interleaved: bool = Field(default=False, description="pairs are (0,1),(2,3).. instead of (0,d/2),(1,d/2+1)..")
    axes: PositiveInt = 1
    scaling: RotaryScaling | None = None


class LatentConfig(Settings):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from a small latent.

    The last `rotary` dims of each query and key head carry the position; the key's are shared by all heads.
    """

    q_rank: PositiveInt | None
    kv_rank: PositiveInt
    rotary_size: PositiveInt
    norm: NormConfig


class AttentionConfig(Settings):
    """One attention layer. `heads` query heads share `kv_heads` key and value heads (grouped-query attention)."""

    heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    value_size: PositiveInt | None = Field(
        default=None, description="size of a value head where it differs from head_size"
    )
    mask: Literal["causal", "full"] = "causal"
    bias: tuple[Projection, ...] = ()
    qk_norm: NormConfig | None = None
    qk_norm_over: Literal["head", "width"] = "head"
    scale: PositiveFloat | None = Field(default=None, description="of q.k; 1/sqrt(head_size) unless given")
    softcap: PositiveFloat | None = Field(default=None, description="scores become cap * tanh(scores / cap)")
    window: PositiveInt | None = Field(
        default=None,
        description="causal: keys at most window - 1 back; full: keys at most window // 2 away on either side",
    )
    rotary: RotaryConfig | None = None
    latent: LatentConfig | None = None


class CrossAttentionConfig(Settings):
    """Attention to the vectors of something else (Vaswani 2017): a decoder's to its encoder's. All of them are seen.

    `heads` query heads share `kv_heads` key and value heads, which are made of vectors of `context_width` numbers.
    """

    heads: PositiveInt
    kv_heads: PositiveInt
    head_size: PositiveInt
    context_width: PositiveInt
    bias: tuple[Projection, ...] = ()


class FeedForwardConfig(Settings):
    """up -> activation -> down; gated: activation(gate) * up -> down (SwiGLU, GeGLU; Shazeer 2020)."""

    hidden: PositiveInt
    activation: Activation
    gated: bool = False
    bias: bool = False


class ExpertsConfig(Settings):
    """Mixture of experts: each token goes to `per_token` of `count` feed-forwards, weighted by the router's score.

    groups: the experts are split into groups and only the best `groups_per_token` groups compete (DeepSeek). A
    group's score is its best expert, or with `bias` (loss-free balancing, arXiv 2408.15664) the sum of its best two.
    """

    count: PositiveInt
    per_token: PositiveInt
    expert: FeedForwardConfig
    shared: FeedForwardConfig | None = Field(default=None, description="a feed-forward that every token passes as well")
    shared_gate: bool = Field(
        default=False, description="each token weighs the shared feed-forward by a learned sigmoid"
    )
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = Field(default=True, description="the chosen weights sum to one")
    scale: float = 1.0
    groups: PositiveInt = 1
    groups_per_token: PositiveInt = 1
    bias: bool = Field(
        default=False, description="a bias that takes part in the choice of experts but not in their weights"
    )


class LayerConfig(Settings):
    """One block: where its norms stand, its attention (and, if any, the one to a context) and its feed-forward.

    A norm may stand at the `input` of a branch (pre-norm), at the branch's `output` before it is added (with `input`:
    sandwich), or on the `residual` stream after it was added (post-norm).
    """

    attention: AttentionConfig
    feedforward: FeedForwardConfig | ExpertsConfig
    norm: NormConfig
    attention_norms: tuple[NormPlace, ...] = ("input",)
    feedforward_norms: tuple[NormPlace, ...] = ("input",)
    cross_attention: CrossAttentionConfig | None = None
    cross_attention_norms: tuple[NormPlace, ...] = ("input",)
    parallel: bool = Field(
        default=False, description="both branches read the same x: x + attention(x) + feedforward(x)"
    )
    layer_scale: PositiveFloat | None = Field(
        default=None,
        description="the output of attention and of the feed-forward is multiplied by a learned vector, which begins "
        "at this (CaiT, arXiv 2103.17239)",
    )


class LearnedPositions(Settings):
    """A learned embedding per position, added at the trunk's input."""

    count: PositiveInt


class TrunkConfig(Settings):
    """The whole trunk: [T, width] in, [T, width] out."""

    width: PositiveInt
    layers: tuple[LayerConfig, ...]
    positions: LearnedPositions | None = None
    input_norm: NormConfig | None = None
    final_norm: NormConfig | None = None
