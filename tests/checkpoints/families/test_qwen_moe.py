"""Qwen's mixtures of experts: dense layers among sparse ones, routing weights normalised or not, the shared expert."""

from __future__ import annotations

import pytest

from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from craton.errors import CheckpointError
from craton.trunk import ExpertsConfig

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-3,
}

QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

QWEN15_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def sparse_layers(model_or_config):
    config = getattr(model_or_config, "config", model_or_config)
    return [n for n, layer in enumerate(config.trunk.layers) if isinstance(layer.feedforward, ExpertsConfig)]


@pytest.mark.peer
def test_qwen3_all_sparse_with_window_and_biases(check_causal):
    transformers = pytest.importorskip("transformers")
    odd = {"norm_topk_prob": False, "attention_bias": True, "use_sliding_window": True, "sliding_window": 9}
    model = check_causal(transformers.Qwen3MoeConfig(**SMALL, **odd, head_dim=24))
    assert sparse_layers(model) == [0, 1, 2, 3]


@pytest.mark.peer
def test_qwen3_dense_layers_among_sparse_ones(check_causal):
    transformers = pytest.importorskip("transformers")
    odd = {"norm_topk_prob": True, "decoder_sparse_step": 2, "mlp_only_layers": [1], "tie_word_embeddings": True}
    model = check_causal(transformers.Qwen3MoeConfig(**SMALL, **odd))
    assert sparse_layers(model) == [3]


@pytest.mark.peer
@pytest.mark.parametrize("bias", [True, False])
def test_qwen2_with_its_gated_shared_expert(check_causal, bias):
    transformers = pytest.importorskip("transformers")
    odd = {"shared_expert_intermediate_size": 40, "mlp_only_layers": [0], "norm_topk_prob": bias, "qkv_bias": bias}
    check_causal(transformers.Qwen2MoeConfig(**SMALL, **odd))


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts(key):
    values = {k: v for k, v in SMALL.items() if k != "num_experts"} | {key: 5}
    config = QWEN3_MOE.config(Keys(values, "config.json"))
    assert config.trunk.layers[0].feedforward.count == 5


def test_qwen2_windows_are_refused():
    with pytest.raises(CheckpointError, match="use_sliding_window"):
        QWEN2_MOE.config(Keys({**SMALL, "use_sliding_window": True}, "config.json"))


@pytest.mark.peer
@pytest.mark.parametrize("published", [QWEN3_30B, QWEN15_MOE], ids=["qwen3", "qwen2"])
def test_published_and_absent_keys(read_published, published):
    config = read_published(published)
    assert sparse_layers(config) == list(range(published["num_hidden_layers"]))
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    read_published({key: published[key] for key in ("architectures", "model_type", *sizes)})
