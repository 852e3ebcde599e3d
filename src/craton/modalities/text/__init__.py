"""Text: tokenisers and the one chat renderer."""

from craton.modalities.text.gguf_export import gguf_metadata_from_tokenizer
from craton.modalities.text.gguf_tokenizer import tokenizer_from_gguf
from craton.modalities.text.tokenizer import Tokenizer

__all__ = ["Tokenizer", "gguf_metadata_from_tokenizer", "tokenizer_from_gguf"]
