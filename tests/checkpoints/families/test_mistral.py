"""Mistral: its window, its head size, and what it means where a key is absent or null."""

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

MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


def test_beyond_the_window_with_a_head_size_of_its_own(check_causal):
    config = transformers.MistralConfig(**SMALL, head_dim=24, sliding_window=7)
    model = check_causal(config)
    assert {layer.attention.window for layer in model.config.trunk.layers} == {7}


def test_tied_with_yarn(check_causal):
    rope = {
        "rope_type": "yarn",
        "rope_theta": 5000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8,
        "beta_slow": 0.5,
        "truncate": False,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
    config = transformers.MistralConfig(**SMALL, sliding_window=None, tie_word_embeddings=True, rope_parameters=rope)
    check_causal(config)


def test_published_keys(read_published):
    assert read_published(MISTRAL_7B).trunk.layers[31].attention.window == 4096
    nemo = MISTRAL_7B | {"head_dim": 128, "hidden_size": 5120, "sliding_window": None, "rope_theta": 1000000.0}
    attention = read_published(nemo).trunk.layers[0].attention
    assert (attention.window, attention.head_size, attention.rotary.theta) == (None, 128, 1e6)


def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = read_published({key: MISTRAL_7B[key] for key in ("architectures", "model_type", *sizes)})
    attention = config.trunk.layers[0].attention
    assert (attention.window, attention.kv_heads, config.context) == (4096, 8, 131072)
