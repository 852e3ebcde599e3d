"""Qwen 2 and 3: biases, head norms and windows in the upper layers."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

QWEN25_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_HALF_B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SIZES = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")


def windows(config):
    return [layer.attention.window for layer in config.trunk.layers]


def test_qwen2_with_windows_in_the_upper_layers(check_causal):
    config = transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=6, max_window_layers=2, tie_word_embeddings=True
    )
    assert windows(check_causal(config).config) == [None, None, 6, 6]


def test_qwen2_with_windows_by_layer_types(check_causal):
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = transformers.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=9, layer_types=kinds)
    model = check_causal(config)
    assert windows(model.config) == [9, None, 9, None]
    # Layers that rotate alike share one setting, so that a pass makes its tables once.
    assert len({id(layer.attention.rotary) for layer in model.config.trunk.layers}) == 1


def test_qwen3_with_biases_windows_and_yarn(check_causal):
    rope = {"rope_type": "yarn", "rope_theta": 9e5, "factor": 4.0, "original_max_position_embeddings": 32}
    config = transformers.Qwen3Config(
        **SMALL,
        head_dim=24,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
        rope_parameters=rope,
    )
    check_causal(config)


def test_qwen3_tied(check_causal):
    check_causal(transformers.Qwen3Config(**SMALL, head_dim=8, tie_word_embeddings=True))


def test_published_keys(read_published):
    assert windows(read_published(QWEN25_HALF_B)) == [None] * 24
    assert windows(read_published(QWEN25_HALF_B | {"use_sliding_window": True})) == [None] * 21 + [32768] * 3
    long = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    read_published(QWEN3_HALF_B)
    config = read_published(QWEN3_HALF_B | {"rope_scaling": long, "max_position_embeddings": 131072})
    assert config.trunk.layers[0].attention.rotary.scaling.kind == "yarn"


@pytest.mark.parametrize("published", [QWEN25_HALF_B, QWEN3_HALF_B], ids=["qwen2", "qwen3"])
def test_absent_keys(read_published, published):
    small = {key: published[key] for key in SIZES} | {"num_hidden_layers": 30, "num_attention_heads": 32}
    assert windows(read_published(small | {"use_sliding_window": True})) == [None] * 28 + [4096] * 2
    assert read_published(small).trunk.layers[0].attention.kv_heads == 32
