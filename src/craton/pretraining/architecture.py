"""A plan as a model: configs of published families, so that other programs open what is trained here."""

from __future__ import annotations

from typing import Final

from pydantic import PositiveInt

from craton.checkpoints.families.deepseek import DEEPSEEK_V3, LATENT_NORM
from craton.checkpoints.families.family import Family
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.families.modernbert import MODERNBERT
from craton.errors import UsageError
from craton.models import CausalLMConfig, EncoderConfig, ModelConfig
from craton.pretraining.sizing import STEP, SizePlan
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    TrunkConfig,
)

RMS_NORM: Final = NormConfig(kind="rms", eps=1e-5)
LAYER_NORM: Final = NormConfig(kind="layer", eps=1e-5)
EXPERT_STEP: Final = 32  # experts are small, so their sizes are rounded more finely than a dense feed-forward's


def causal_config(plan: SizePlan, vocab: int, context: int) -> CausalLMConfig:
    """A Llama: pre-norm, rotary positions, SwiGLU, a tied head and no biases.

    Llama and not Qwen3, whose norms on queries and keys are the only difference and help against divergence at large
    learning rates: every program that runs language models opens Llama, and the norms cost speed.
    """
    attention = AttentionConfig(
        heads=plan.heads, kv_heads=plan.kv_heads, head_size=plan.head_size, rotary=_rotary(plan.head_size, context)
    )
    feedforward = FeedForwardConfig(hidden=plan.hidden, activation="silu", gated=True)
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=RMS_NORM)
    return _causal(plan, vocab, context, (layer,) * plan.layers)


def encoder_config(plan: SizePlan, vocab: int, context: int) -> EncoderConfig:
    """A ModernBERT (Warner 2024, arXiv 2412.13663) for masked-token pretraining, every layer seeing the whole text.

    ModernBERT and not BERT because pre-norm, rotary positions and a gated feed-forward train better. Its windows of 128
    tokens in two of three layers are left out: they pay only on texts of thousands of tokens.
    """
    attention = AttentionConfig(
        heads=plan.heads,
        kv_heads=plan.heads,
        head_size=plan.head_size,
        mask="full",
        rotary=_rotary(plan.head_size, context),
    )
    feedforward = FeedForwardConfig(hidden=plan.hidden, activation="gelu", gated=True)
    layer = LayerConfig(attention=attention, feedforward=feedforward, norm=LAYER_NORM)
    # The embedding is normed already.
    first = layer.model_copy(update={"attention_norms": ()})
    layers = (first, *(layer,) * (plan.layers - 1))
    trunk = TrunkConfig(width=plan.width, layers=layers, input_norm=LAYER_NORM, final_norm=LAYER_NORM)
    return EncoderConfig(vocab=vocab, context=context, trunk=trunk)


def experts_config(
    plan: SizePlan, vocab: int, context: int, *, experts: PositiveInt = 8, per_token: PositiveInt = 2
) -> CausalLMConfig:
    """A DeepSeek-V3 (arXiv 2412.19437) in which a token passes about as much as in the dense model of the same plan.

    The plan's feed-forward is cut into `per_token` routed parts and a shared one; of the routed parts there are
    `experts`, so the model holds more parameters than the plan says. The first layer is dense. This family because it
    alone stores the bias that balances the experts' load without an auxiliary loss; its attention is latent.

    Raises UsageError if a token would go to more experts than there are.
    """
    if not 0 < per_token <= experts:
        raise UsageError(f"a token cannot go to {per_token} of {experts} experts")
    rotated, free = plan.head_size // 2, plan.head_size  # 64 and 128 in DeepSeek's
    attention = AttentionConfig(
        heads=plan.heads,
        kv_heads=plan.heads,
        head_size=free + rotated,
        value_size=plan.head_size,
        rotary=_rotary(rotated, context).model_copy(update={"interleaved": True}),
        latent=LatentConfig(
            q_rank=None,  # as in V2-Lite: it saves memory in large models only
            kv_rank=max(STEP, plan.width // 4),
            rotary_size=rotated,
            norm=LATENT_NORM,
        ),
    )
    hidden = max(EXPERT_STEP, EXPERT_STEP * round(plan.hidden / (per_token + 1) / EXPERT_STEP))
    expert = FeedForwardConfig(hidden=hidden, activation="silu", gated=True)
    sparse = ExpertsConfig(
        count=experts,
        per_token=per_token,
        expert=expert,
        shared=expert,
        score="sigmoid",
        bias=True,
        # The weights sum to one, which would shrink the sum of as many independent outputs by the root of their number.
        scale=per_token**0.5,
    )
    dense = FeedForwardConfig(hidden=plan.hidden, activation="silu", gated=True)
    first, others = (
        LayerConfig(attention=attention, feedforward=feedforward, norm=RMS_NORM) for feedforward in (dense, sparse)
    )
    return _causal(plan, vocab, context, (first, *(others,) * (plan.layers - 1)))


def family_of_fresh(config: ModelConfig) -> Family:
    """The published family that a config of this module, or a masked language model over one, is saved as."""
    if not isinstance(config, CausalLMConfig):
        return MODERNBERT
    return DEEPSEEK_V3 if config.trunk.layers[0].attention.latent is not None else LLAMA


def _rotary(dims: int, context: int) -> RotaryConfig:
    # Su 2021's base up to a few thousand tokens and Llama 3's beyond: a longer context needs longer wavelengths.
    return RotaryConfig(dims=dims, theta=10_000.0 if context <= 4096 else 500_000.0)


def _causal(plan: SizePlan, vocab: int, context: int, layers: tuple[LayerConfig, ...]) -> CausalLMConfig:
    trunk = TrunkConfig(width=plan.width, layers=layers, final_norm=RMS_NORM)
    return CausalLMConfig(vocab=vocab, context=context, trunk=trunk, tied=True)
