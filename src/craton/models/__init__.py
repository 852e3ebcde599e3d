"""The trunk with a front end and a head: things with a name that people know."""

from craton.models.causal_lm import CausalLM, CausalLMConfig
from craton.models.encoder import Encoder, EncoderConfig
from craton.models.pooling import PoolingConfig, pool

ModelConfig = CausalLMConfig | EncoderConfig
AnyModel = CausalLM | Encoder

__all__ = [
    "AnyModel",
    "CausalLM",
    "CausalLMConfig",
    "Encoder",
    "EncoderConfig",
    "ModelConfig",
    "PoolingConfig",
    "build",
    "pool",
]


def build(config: ModelConfig) -> AnyModel:
    """A model with freshly initialised weights (on the current default device; use `torch.device("meta")` for none)."""
    return CausalLM(config) if isinstance(config, CausalLMConfig) else Encoder(config)
