"""The trunk with a front end and a head: things with a name that people know."""

from craton.models.causal_lm import CausalLM, CausalLMConfig
from craton.models.classifier import Classifier, ClassifierConfig
from craton.models.embedder import Embedder
from craton.models.encoder import Encoder, EncoderConfig
from craton.models.masked_lm import MaskedLM, MaskedLMConfig
from craton.models.pooling import PoolingConfig, pool
from craton.models.seq2seq import Seq2Seq, Seq2SeqConfig

ModelConfig = CausalLMConfig | EncoderConfig | ClassifierConfig | MaskedLMConfig | Seq2SeqConfig
AnyModel = CausalLM | Encoder | Classifier | MaskedLM | Seq2Seq

__all__ = [
    "AnyModel",
    "CausalLM",
    "CausalLMConfig",
    "Classifier",
    "ClassifierConfig",
    "Embedder",
    "Encoder",
    "EncoderConfig",
    "MaskedLM",
    "MaskedLMConfig",
    "ModelConfig",
    "PoolingConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "build",
    "pool",
]


def build(config: ModelConfig) -> AnyModel:
    """A model with freshly initialised weights (on the current default device; use `torch.device("meta")` for none)."""
    if isinstance(config, CausalLMConfig):
        return CausalLM(config)
    if isinstance(config, EncoderConfig):
        return Encoder(config)
    if isinstance(config, Seq2SeqConfig):
        return Seq2Seq(config)
    return Classifier(config) if isinstance(config, ClassifierConfig) else MaskedLM(config)
