"""OLMo 2: norms on the branches' outputs and over the whole width of queries and keys."""

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
    "max_position_embeddings": 128,
}

OLMO2_7B = {
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


def test_shared_heads_and_biases(check_causal):
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    config = transformers.Olmo2Config(**SMALL, num_key_value_heads=2, attention_bias=True, rope_parameters=rope)
    check_causal(config)


def test_tied_with_a_head_size_of_its_own(check_causal):
    config = transformers.Olmo2Config(**SMALL, head_dim=24, tie_word_embeddings=True, hidden_act="gelu_new")
    assert check_causal(config).config.trunk.layers[0].attention.kv_heads == 4


def test_published_keys(read_published):
    assert read_published(OLMO2_7B).trunk.layers[0].attention_norms == ("output",)


def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = read_published({key: OLMO2_7B[key] for key in ("architectures", "model_type", *sizes)})
    assert (config.context, config.trunk.final_norm.eps) == (2048, 1e-5)
