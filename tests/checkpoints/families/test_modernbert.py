"""ModernBERT: windows, two thetas, both spellings of its config."""

from __future__ import annotations

import pytest

from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.modernbert import MODERNBERT
from craton.errors import CheckpointError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "local_attention": 10,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
THETAS = {"full_attention": 5000.0, "sliding_attention": 300.0}

MODERNBERT_BASE = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "bos_token_id": 50281,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "vocab_size": 50368,
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "odd",
    [
        {"rope_parameters": {kind: {"rope_type": "default", "rope_theta": t} for kind, t in THETAS.items()}},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "hidden_activation": "silu", "norm_eps": 1e-3},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]},
        {"layer_types": ["full_attention"] * 5},
    ],
    ids=["thetas", "biases", "own-pattern", "no-window"],
)
def test_modernbert(check_encoder, odd):
    transformers = pytest.importorskip("transformers")
    check_encoder(transformers.ModernBertConfig(**SMALL, **IDS, **odd))


@pytest.mark.peer
def test_the_masked_language_models_encoder(check_masked_lm):
    transformers = pytest.importorskip("transformers")
    check_masked_lm(transformers.ModernBertConfig(**SMALL, **IDS))


def test_the_published_spelling_means_the_same():
    old = {**SMALL, "global_attn_every_n_layers": 2, "global_rope_theta": 5000.0, "local_rope_theta": 300}
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in THETAS.items()}
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    new = {**SMALL, "layer_types": kinds, "rope_parameters": rope}
    config = MODERNBERT.config(Keys(old, "config.json"))
    assert config == MODERNBERT.config(Keys(new, "config.json"))
    assert [layer.attention.window for layer in config.trunk.layers] == [None, 10, None, 10, None]
    assert [layer.attention.rotary.theta for layer in config.trunk.layers[:2]] == [5000.0, 300.0]
    assert config.trunk.layers[0].attention_norms == ()


def test_defaults_are_the_familys_own():
    values = {k: v for k, v in SMALL.items() if k != "local_attention"}
    layers = MODERNBERT.config(Keys(values, "config.json")).trunk.layers
    assert [layer.attention.rotary.theta for layer in layers] == [160000.0, 10000.0, 10000.0, 160000.0, 10000.0]
    assert layers[1].attention.window == 128


def test_a_step_of_zero_is_refused():
    with pytest.raises(CheckpointError, match="global_attn_every_n_layers"):
        MODERNBERT.config(Keys({**SMALL, "global_attn_every_n_layers": 0}, "config.json"))


@pytest.mark.peer
def test_published_keys(read_published):
    config = read_published(MODERNBERT_BASE)
    assert [layer.attention.window for layer in config.trunk.layers[:4]] == [None, 128, 128, None]
    other = {"global_rope_theta": 5000.0, "local_rope_theta": 300.0, "global_attn_every_n_layers": 2}
    layers = read_published({**MODERNBERT_BASE, **other}).trunk.layers
    assert [layer.attention.rotary.theta for layer in layers[:3]] == [5000.0, 300.0, 5000.0]


@pytest.mark.peer
def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    read_published({key: MODERNBERT_BASE[key] for key in ("architectures", "model_type", *sizes)})
