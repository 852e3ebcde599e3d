"""SmolLM3: layers without positions, windows in them, and both ways of saying which."""

from __future__ import annotations

import pytest

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}

SMOLLM3_3B = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
    "vocab_size": 128256,
}


def rotates(config):
    return [layer.attention.rotary is not None for layer in config.trunk.layers]


def test_a_first_layer_without_positions_windows_and_biases(check_causal):
    config = transformers.SmolLM3Config(
        **SMALL,
        no_rope_layers=[0, 1, 1, 0, 1],
        use_sliding_window=True,
        sliding_window=7,
        attention_bias=True,
        mlp_bias=True,
    )
    model = check_causal(config)
    assert rotates(model.config) == [False, True, True, False, True]
    assert [layer.attention.window for layer in model.config.trunk.layers] == [7, None, None, 7, None]


def test_windows_where_layer_types_put_them(check_causal):
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = transformers.SmolLM3Config(
        **SMALL,
        head_dim=24,
        no_rope_layer_interval=2,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=kinds,
        tie_word_embeddings=False,
    )
    assert rotates(check_causal(config).config) == [True, False, True, False, True]


def test_no_layer_with_positions(check_causal):
    config = check_causal(transformers.SmolLM3Config(**SMALL, no_rope_layers=[0] * 5)).config
    assert not any(rotates(config))


def test_published_keys(read_published):
    config = read_published(SMOLLM3_3B)
    assert rotates(config) == [True, True, True, False] * 9
    assert config.tied
    without = {key: value for key, value in SMOLLM3_3B.items() if key not in ("no_rope_layers", "layer_types")}
    assert read_published(without) == config
    windowed = read_published(without | {"use_sliding_window": True, "sliding_window": 1024})
    assert [layer.attention.window for layer in windowed.trunk.layers] == [None, None, None, 1024] * 9


def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = read_published({key: SMOLLM3_3B[key] for key in ("architectures", "model_type", *sizes)})
    assert config.trunk.layers[0].attention.rotary.theta == 2e6
    assert config.trunk.layers[0].attention.kv_heads == 4
