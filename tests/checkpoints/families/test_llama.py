"""Llama: every switch of its config on."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def test_odd_head_size_biases_and_llama3_scaling(check_causal):
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    config = transformers.LlamaConfig(**SMALL, head_dim=24, attention_bias=True, mlp_bias=True, rope_parameters=rope)
    check_causal(config)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=["linear", "yarn"],
)
def test_tied_with_rope_scaling(check_causal, rope):
    model = check_causal(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, rope_parameters=rope))
    assert model.head.weight is model.embedding.weight
