"""The trunk with a front end and a head: things with a name that people know."""

from collections.abc import Callable

from craton.models.causal_lm import CausalLM, CausalLMConfig
from craton.models.classifier import Classifier, ClassifierConfig
from craton.models.dual_encoder import DualEncoder, DualEncoderConfig
from craton.models.embedder import Embedder
from craton.models.encoder import Encoder, EncoderConfig
from craton.models.image_chat import ImageChat, ImageChatConfig
from craton.models.image_classifier import ImageClassifier, ImageClassifierConfig
from craton.models.masked_lm import MaskedLM, MaskedLMConfig
from craton.models.pooling import PoolingConfig, pool
from craton.models.segmenter import Segmenter, SegmenterConfig
from craton.models.seq2seq import Seq2Seq, Seq2SeqConfig
from craton.models.vision import VisionConfig, VisionTransformer

# What reads or writes text, and so has a vocabulary and a context.
TextModelConfig = CausalLMConfig | EncoderConfig | ClassifierConfig | MaskedLMConfig | Seq2SeqConfig
TextModel = CausalLM | Encoder | Classifier | MaskedLM | Seq2Seq
ModelConfig = TextModelConfig | VisionConfig | ImageClassifierConfig | DualEncoderConfig | SegmenterConfig
AnyModel = TextModel | VisionTransformer | ImageClassifier | DualEncoder | Segmenter

__all__ = [
    "AnyModel",
    "CausalLM",
    "CausalLMConfig",
    "Classifier",
    "ClassifierConfig",
    "DualEncoder",
    "DualEncoderConfig",
    "Embedder",
    "Encoder",
    "EncoderConfig",
    "ImageChat",
    "ImageChatConfig",
    "ImageClassifier",
    "ImageClassifierConfig",
    "MaskedLM",
    "MaskedLMConfig",
    "ModelConfig",
    "PoolingConfig",
    "Segmenter",
    "SegmenterConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "TextModel",
    "TextModelConfig",
    "VisionConfig",
    "VisionTransformer",
    "build",
    "pool",
]


def build(config: ModelConfig) -> AnyModel:
    """A model with freshly initialised weights (on the current default device; use `torch.device("meta")` for none)."""
    makers: dict[type[ModelConfig], Callable[..., AnyModel]] = {
        CausalLMConfig: CausalLM,
        ImageChatConfig: ImageChat,
        EncoderConfig: Encoder,
        ClassifierConfig: Classifier,
        MaskedLMConfig: MaskedLM,
        Seq2SeqConfig: Seq2Seq,
        VisionConfig: VisionTransformer,
        ImageClassifierConfig: ImageClassifier,
        DualEncoderConfig: DualEncoder,
        SegmenterConfig: Segmenter,
    }
    return makers[type(config)](config)
