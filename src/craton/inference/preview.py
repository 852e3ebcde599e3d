"""A few words from a model that is being trained, through the engine that will serve it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from craton.inference.engine import Engine, Request
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer
from craton.models import CausalLM


def preview(model: CausalLM, tokenizer: Tokenizer, prompt: Sequence[int], max_tokens: int = 32) -> str:
    """The likeliest continuation of `prompt` (token ids, at least one). The model's training mode is kept."""
    training = model.training
    model.eval()
    try:
        dtype = model.compute_dtype or model.embedding.weight.dtype
        engine = Engine(model, tokenizer, dtype=dtype, native_threads=None)
        settings = SamplingSettings(max_tokens=min(max_tokens, model.config.context - len(prompt)))
        with torch.inference_mode():
            return engine.submit(Request(list(prompt), settings, 0)).wait().text
    finally:
        model.train(training)
