"""The shape of a fresh model of pictures and texts, from one number."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, Final, Literal

from craton.errors import UsageError
from craton.models import DualEncoderConfig, EncoderConfig, VisionConfig
from craton.pretraining.image_text.objectives import PairLoss
from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    TrunkConfig,
)

STEP: Final = 32  # widths are multiples of it, and heads have so many numbers
VISION_SHARE: Final = 0.6  # of the parameters, as in CLIP's smallest models


def dual_encoder_config(
    parameters: int, loss: PairLoss, *, image: int, patch: int, vocab: int, context: int, pad: int
) -> DualEncoderConfig:
    """A model of about so many parameters, three fifths of them on the side of the pictures: for softmax as CLIP's, for
    sigmoid as SigLIP's (`pad` fills texts up to the context).

    Depth = 4 + width / 128 on either side, the feed-forward is four times the width, and the common space as wide as
    the pictures' side. Raises UsageError for patches that do not fit the picture.
    """
    if image % patch:
        raise UsageError(f"a picture of {image} pixels is not made of whole patches of {patch}", where="--patch")
    patches = (image // patch) ** 2
    sees = _width(VISION_SHARE * parameters, lambda width: width * (3 * patch**2 + patches))
    reads = _width((1 - VISION_SHARE) * parameters, lambda width: width * (vocab + context))
    pixels: dict[str, Any] = {"image": (image, image), "patch": patch}
    positions = LearnedPositions(count=context)
    if loss == "softmax":
        norm = NormConfig(kind="layer", eps=1e-5, bias=True)
        vision = VisionConfig(
            **pixels, trunk=_tower(sees, norm, "full", input_norm=norm), patch_bias=False, projection=sees
        )
        text = EncoderConfig(vocab=vocab, context=context, trunk=_tower(reads, norm, "causal", positions=positions))
        return DualEncoderConfig(vision=vision, text=text, projection=sees)
    norm = NormConfig(kind="layer", eps=1e-6, bias=True)
    vision = VisionConfig(**pixels, trunk=_tower(sees, norm, "full"), class_token=False, pooling="attention")
    text = EncoderConfig(vocab=vocab, context=context, trunk=_tower(reads, norm, "full", positions=positions))
    return DualEncoderConfig(vision=vision, text=text, projection=sees, projection_bias=True, pad=pad, logit_bias=True)


def _layers(width: int) -> int:
    return round(4 + width / 128)


def _width(parameters: float, around: Callable[[int], int]) -> int:
    """The width whose trunk and what is `around` it have about so many parameters."""
    widths = range(2 * STEP, 4097, STEP)
    return min(widths, key=lambda w: abs(log((12 * w**2 * _layers(w) + around(w)) / parameters)))


def _tower(width: int, norm: NormConfig, mask: Literal["causal", "full"], **switches: Any) -> TrunkConfig:
    heads = width // STEP
    layer = LayerConfig(
        attention=AttentionConfig(heads=heads, kv_heads=heads, head_size=STEP, mask=mask, bias=("q", "k", "v", "o")),
        feedforward=FeedForwardConfig(hidden=4 * width, activation="gelu", bias=True),
        norm=norm,
    )
    return TrunkConfig(width=width, layers=(layer,) * _layers(width), final_norm=norm, **switches)
