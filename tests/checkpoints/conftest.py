"""Small random models of transformers, and the smallest tokeniser that every byte goes through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from craton.checkpoints.int_weight import IntWeight
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.modalities.text.token_pieces import byte_level_alphabet


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.fixture(scope="session")
def assert_close() -> Callable[[Tensor, Tensor, float], None]:
    """assert_close(ours, theirs, tolerance): the largest difference, in parts of the largest number."""

    def check(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < tolerance

    return check


@pytest.fixture(scope="session")
def random_model() -> Callable[[Any], Any]:
    """random_model(config): a model of transformers whose weights are large enough that every switch shows, and fp16
    numbers, so that an F16 file holds them exactly."""
    transformers = pytest.importorskip("transformers")

    def make(config: Any) -> Any:
        auto = transformers.AutoModel if config.model_type == "bert" else transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="eager").float().eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scaled = parameter.data + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5
            parameter.data = scaled.half().float()
        return model.requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, one merge, and three special tokens: 260 in all."""
    tokens = [*sorted(byte_level_alphabet()), "ab", "<s>", "</s>", "<pad>"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 257 + [3] * 3,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 257,
            "tokenizer.ggml.eos_token_id": 258,
            "tokenizer.ggml.padding_token_id": 259,
        }
    )


@pytest.fixture(scope="session")
def round_weight() -> Callable[..., IntWeight]:
    """round_weight(weight_OI, bits, group, symmetric): to the nearest of evenly spaced values in each group."""

    def make(weight_OI: Tensor, bits: int = 4, group: int = 32, symmetric: bool = True) -> IntWeight:
        rows, columns = weight_OI.shape
        lowest, highest = -(1 << bits - 1), (1 << bits - 1) - 1
        groups = weight_OI.float().reshape(rows, -1, min(group, columns))
        if symmetric:
            scales_OG, zeros_OG = (groups.abs().amax(2) / highest).half(), None
            codes = groups / scales_OG.float()[:, :, None]
        else:
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            scales_OG = ((high - low) / (highest - lowest)).half()
            zeros_OG = (lowest - low / scales_OG.float()).round().clamp(lowest, highest).to(torch.int8)
            codes = groups / scales_OG.float()[:, :, None] + zeros_OG[:, :, None]
        codes_OI = codes.round().clamp(lowest, highest).to(torch.int8).reshape(rows, columns)
        return IntWeight(bits, group, codes_OI, scales_OG, zeros_OG)

    return make
