"""Text: tokenisers, chat templates and the one renderer from conversations to tokens. Nothing here imports torch."""

from craton.modalities.text.chat import TEMPLATE_VARIABLES, ChatTemplate, Rendered, render
from craton.modalities.text.gguf_export import GGUF_TYPES, gguf_metadata_from_tokenizer
from craton.modalities.text.gguf_tokenizer import tokenizer_from_gguf
from craton.modalities.text.messages import ROLES
from craton.modalities.text.token_stream import StreamDecoder
from craton.modalities.text.tokenizer import Tokenizer

__all__ = [
    "GGUF_TYPES",
    "ROLES",
    "TEMPLATE_VARIABLES",
    "ChatTemplate",
    "Rendered",
    "StreamDecoder",
    "Tokenizer",
    "gguf_metadata_from_tokenizer",
    "render",
    "tokenizer_from_gguf",
]
