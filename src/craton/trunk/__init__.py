"""The only Transformer. Pure modules over flat tokens: no files, no tokenisers, no modality, no family's name."""

from craton.trunk.cache import KVCache
from craton.trunk.config import (
    AttentionConfig,
    CrossAttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    RotaryConfig,
    RotaryScaling,
    TrunkConfig,
)
from craton.trunk.cross_attention import Context, ContextView
from craton.trunk.linear import Linear, replace_linears
from craton.trunk.trunk import Trunk

__all__ = [
    "AttentionConfig",
    "Context",
    "ContextView",
    "CrossAttentionConfig",
    "ExpertsConfig",
    "FeedForwardConfig",
    "KVCache",
    "LatentConfig",
    "LayerConfig",
    "LearnedPositions",
    "Linear",
    "NormConfig",
    "RotaryConfig",
    "RotaryScaling",
    "Trunk",
    "TrunkConfig",
    "replace_linears",
]
