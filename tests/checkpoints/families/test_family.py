"""The checked reading of a config.json: what cannot be run is refused by name, and nothing but our errors escapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.families import FAMILIES, family_of
from craton.checkpoints.families.family import Keys, read_rotated, write_rotated
from craton.errors import CheckpointError
from craton.models import ModelConfig

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
PAIRS = [1.0] * 8


def read(architecture, **values):
    values = {"architectures": [architecture]} | SIZES | values
    return family_of(values, "config.json").config(Keys(values, "config.json"))


REFUSED = {
    "rope type": ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "new rope type": ("Qwen3ForCausalLM", {"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
    "no factor": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear"}}, "factor"),
    "factor": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": -1}}, "factor"),
    "theta": ("LlamaForCausalLM", {"rope_theta": "ten thousand"}, "rope_theta"),
    "share of a pair": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.2}, "partial_rotary_factor"),
    "other scaling": ("Phi3ForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "longrope"),
    "longrope factors": (
        "Phi3ForCausalLM",
        {"rope_scaling": {"type": "longrope", "long_factor": PAIRS, "short_factor": PAIRS[1:]}},
        "short_factor",
    ),
    "context": (
        "Phi3ForCausalLM",
        {
            "rope_scaling": {"type": "longrope", "long_factor": PAIRS, "short_factor": PAIRS},
            "original_max_position_embeddings": 0,
        },
        "context of 0",
    ),
    "activation": ("MistralForCausalLM", {"hidden_act": "softmax"}, "hidden_act"),
    "layer types": ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    "unknown layer type": ("Qwen2ForCausalLM", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    "too few layer types": ("SmolLM3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
    "no window": ("Qwen3ForCausalLM", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    "window": ("MistralForCausalLM", {"sliding_window": 0}, "window"),
    "mrope": ("Qwen2ForCausalLM", {"use_mrope": True}, "use_mrope"),
    "NoPE flags": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 2]}, "no_rope_layers"),
    "NoPE interval": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 0}, "no_rope_layer_interval"),
    "both directions": ("Gemma2ForCausalLM", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    "soft-cap": ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    "scale": ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    "images": ("Gemma3ForConditionalGeneration", {"vision_config": {}, "text_config": {}}, "vision_config"),
    "heads": ("OlmoForCausalLM", {}, "Olmo2ForCausalLM"),
    "no heads": ("Olmo2ForCausalLM", {"num_attention_heads": 0}, "heads"),
    "heads that cannot share": ("Olmo2ForCausalLM", {"num_key_value_heads": 3}, "3"),
    "no layers": ("LlamaForCausalLM", {"num_hidden_layers": 0}, "num_hidden_layers"),
    "kind": ("LlamaForCausalLM", {"attention_bias": 1}, "attention_bias"),
}


@pytest.mark.parametrize(("architecture", "values", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_run_is_refused_by_name(architecture, values, named):
    with pytest.raises(CheckpointError) as refusal:
        read(architecture, **values)
    assert named in str(refusal.value)
    assert "config.json" in refusal.value.where


KEYS = sorted(
    {*SIZES, "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "layer_types"}
    | {"no_rope_layers", "no_rope_layer_interval", "sliding_window_pattern", "query_pre_attn_scalar", "rms_norm_eps"}
    | {"partial_rotary_factor", "original_max_position_embeddings", "tie_word_embeddings", "rope_local_base_freq"}
    | {"final_logit_softcapping", "hidden_act", "hidden_activation", "max_window_layers"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, -1, 0.5, 2**70, float("nan"), float("inf"), "", "default", "full_attention"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3)
ROPE_KEYS = ["rope_type", "type", "factor", "rope_theta", "original_max_position_embeddings", "attention_factor"]
ROPE_KEYS += ["short_factor", "long_factor", "low_freq_factor", "high_freq_factor", "mscale", "mscale_all_dim"]
ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "yarn", "longrope", "su", "default"])},
    optional={key: VALUES | st.just(PAIRS) for key in ROPE_KEYS[1:]},
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([name for family in FAMILIES for name in family.architectures]),
    st.dictionaries(st.sampled_from(KEYS), VALUES | ROPE, max_size=4),
)
def test_a_damaged_config_is_read_or_refused(architecture, values):
    try:
        config = read(architecture, **values)
    except CheckpointError:
        return
    assert isinstance(config, ModelConfig)


def test_the_share_that_rotates_survives_writing():
    for size in range(2, 260, 2):
        for rotated in range(2, size + 1, 2):
            keys = Keys({"partial_rotary_factor": write_rotated(rotated, size)}, "config.json")
            assert read_rotated(keys, size) == rotated
