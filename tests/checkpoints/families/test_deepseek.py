"""DeepSeek-V2 and V3: latent attention, YaRN at the softmax's scale, groups of experts, shared and dense ones."""

from __future__ import annotations

from math import log

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from craton.checkpoints.families.family import Keys
from craton.errors import CheckpointError

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "rms_norm_eps": 1e-3,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4,
    "beta_slow": 1,
    "mscale": 0.9,
    "mscale_all_dim": 0.707,
}

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
V2 = V2_LITE | {
    "q_lora_rank": 1536,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "n_routed_experts": 160,
    "routed_scaling_factor": 16.0,
}
V3 = V2_LITE | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": {**V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


@pytest.mark.peer
def test_v2_lite_without_query_rank_greedy_with_yarn(check_causal):
    transformers = pytest.importorskip("transformers")
    check_causal(transformers.DeepseekV2Config(**SMALL, q_lora_rank=None, rope_parameters=YARN))


@pytest.mark.peer
def test_v2_groups_scaling_and_biases(check_causal):
    transformers = pytest.importorskip("transformers")
    odd = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
    check_causal(transformers.DeepseekV2Config(**SMALL, **odd, q_lora_rank=18, attention_bias=True))


@pytest.mark.peer
def test_v3_groups_balancing_bias_and_yarn(check_causal, tmp_path):
    transformers = pytest.importorskip("transformers")
    odd = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "norm_topk_prob": True}
    model = check_causal(
        transformers.DeepseekV3Config(**SMALL, **odd, q_lora_rank=18, attention_bias=True, rope_parameters=YARN)
    )
    biases = model.trunk.layers[1].feedforward.router_bias
    assert biases.min() < 0 < biases.max()  # else the choice within groups would not be tested
    half = Checkpoint.open(tmp_path / "theirs").load(torch.bfloat16)
    assert torch.equal(half.trunk.layers[1].feedforward.router_bias, biases)  # in bfloat16 it would choose others


@pytest.mark.peer
def test_v3_without_groups_half_split_rotation(check_causal):
    transformers = pytest.importorskip("transformers")
    odd = {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "rope_interleave": False, "q_lora_rank": None}
    check_causal(transformers.DeepseekV3Config(**SMALL, **odd, tie_word_embeddings=True))


def test_the_published_spelling_of_yarn_is_read():
    rope = {**{k: v for k, v in YARN.items() if not k.startswith("rope_")}, "type": "yarn"}
    old = {**SMALL, "q_lora_rank": None, "rope_scaling": rope, "rope_theta": 5000}
    new = {**SMALL, "q_lora_rank": None, "rope_parameters": YARN}
    assert DEEPSEEK_V2.config(Keys(old, "config.json")) == DEEPSEEK_V2.config(Keys(new, "config.json"))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        (DEEPSEEK_V2, "norm_topk_prob", True),
        (DEEPSEEK_V2, "topk_method", "noaux_tc"),
        (DEEPSEEK_V2, "moe_layer_freq", 2),
        (DEEPSEEK_V2, "num_key_value_heads", 2),
        (DEEPSEEK_V2, "first_k_dense_replace", 3),
        (DEEPSEEK_V3, "scoring_func", "softmax"),
        (DEEPSEEK_V3, "topk_group", 5),
        (DEEPSEEK_V3, "n_group", 3),
        (DEEPSEEK_V3, "num_experts_per_tok", 7),
    ],
)
def test_refused(family, key, value):
    values = {**SMALL, "n_group": 4, "topk_group": 2, key: value}
    with pytest.raises(CheckpointError, match=key):
        family.config(Keys(values, "config.json"))


@pytest.mark.peer
@pytest.mark.parametrize("published", [V2_LITE, V2, V3], ids=["V2-Lite", "V2", "V3"])
def test_published_keys(read_published, published):
    attention = read_published(published).trunk.layers[0].attention
    all_dim = published["rope_scaling"]["mscale_all_dim"]
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * all_dim * log(40) + 1) ** 2)
    assert attention.rotary.scaling.attention_factor == 1.0


@pytest.mark.peer
@pytest.mark.parametrize("published", [V2, V3], ids=["V2", "V3"])
def test_absent_keys(read_published, published):
    sizes = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    sizes += ["num_experts_per_tok", "num_key_value_heads"]
    read_published({key: published[key] for key in ("architectures", "model_type", *sizes)})


def test_an_odd_number_cannot_be_rotated_in_pairs():
    with pytest.raises(CheckpointError, match="multiple of 2"):
        DEEPSEEK_V3.config(Keys({**SMALL, "n_group": 4, "topk_group": 2, "qk_rope_head_dim": 7}, "config.json"))
