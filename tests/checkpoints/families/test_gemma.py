"""Gemma 1, 2 and 3: norms of 1 + w, sandwiches, soft-caps, local and global layers with two thetas."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 128,
}

GEMMA_2B = {
    "architectures": ["GemmaForCausalLM"],
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "model_type": "gemma",
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
GEMMA2_2B = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "vocab_size": 262144,
}
SIZES = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def test_gemma1(check_causal):
    check_causal(transformers.GemmaConfig(**SMALL, attention_bias=True))


def test_gemma2_with_caps_that_bite_and_a_scale_of_its_own(check_causal):
    config = transformers.Gemma2Config(
        **SMALL,
        sliding_window=7,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.0,
        attention_bias=True,
    )
    model = check_causal(config)
    assert [layer.attention.window for layer in model.config.trunk.layers] == [7, None, 7, None]


def test_gemma2_without_caps_untied(check_causal):
    config = transformers.Gemma2Config(
        **SMALL,
        sliding_window=6,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"],
        hidden_activation="gelu",
    )
    check_causal(config)


def test_gemma3_with_two_thetas_and_scaling_for_the_global_layers(check_causal):
    rope = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    }
    config = transformers.Gemma3TextConfig(
        **SMALL,
        sliding_window=7,
        sliding_window_pattern=3,
        query_pre_attn_scalar=5,
        final_logit_softcapping=3.0,
        rope_parameters=rope,
    )
    attentions = [layer.attention for layer in check_causal(config).config.trunk.layers]
    assert [attention.window for attention in attentions] == [7, 7, None, 7]
    assert [attention.rotary.theta for attention in attentions] == [500.0, 500.0, 1e6, 500.0]
    # Layers that rotate alike share one setting, so that a pass makes its tables once.
    assert len({id(attention.rotary) for attention in attentions}) == 2


def test_gemma3_with_layer_types_only_and_biases(check_causal):
    config = transformers.Gemma3TextConfig(
        **SMALL, sliding_window=6, attention_bias=True, layer_types=["full_attention", *["sliding_attention"] * 3]
    )
    check_causal(config)


def test_bfloat16_rounds_where_gemma_does(tmp_path):
    """The embeddings' scale is rounded to bfloat16 (sqrt(96) = 9.798 to 9.8125), and 1 + w is not."""
    config = transformers.GemmaConfig(**SMALL | {"hidden_size": 96, "num_hidden_layers": 1})
    theirs = transformers.GemmaForCausalLM(config).bfloat16().eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    ours = Checkpoint.open(tmp_path).load(torch.bfloat16)
    ids = torch.arange(20)
    layer, seen, expected = ours.trunk.layers[0], {}, {}
    layer.register_forward_pre_hook(lambda _, args: seen.update(embedded=args[0]))
    layer.attention_norm["input"].register_forward_hook(lambda *args: seen.update(normed=args[2]))
    layer = theirs.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: expected.update(embedded=args[0][0]))
    layer.input_layernorm.register_forward_hook(lambda *args: expected.update(normed=args[2][0]))
    with torch.inference_mode():
        ours(ids, ids)
        theirs(ids[None])
    assert torch.equal(seen["embedded"], expected["embedded"])
    assert torch.equal(seen["normed"], expected["normed"])


def test_published_keys(read_published):
    gemma = read_published(GEMMA_2B)
    assert gemma.trunk.layers[0].feedforward.activation == "gelu_tanh"
    assert gemma.tied
    gemma2 = read_published(GEMMA2_2B)
    assert (gemma2.logit_softcap, gemma2.trunk.layers[1].attention.window) == (30.0, None)
    gemma3 = read_published(GEMMA3_1B)
    assert [n for n, layer in enumerate(gemma3.trunk.layers) if layer.attention.window is None] == [5, 11, 17, 23]


def test_gemma3_scaling_as_first_published(read_published):
    config = read_published(GEMMA3_1B | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}})
    local, everywhere = (config.trunk.layers[n].attention.rotary for n in (4, 5))
    assert (local.theta, local.scaling) == (1e4, None)
    assert (everywhere.theta, everywhere.scaling.factor) == (1e6, 8.0)


@pytest.mark.parametrize("published", [GEMMA_2B, GEMMA2_2B, GEMMA3_1B], ids=["gemma", "gemma2", "gemma3"])
def test_absent_keys(read_published, published):
    config = read_published({key: published[key] for key in SIZES} | {"num_attention_heads": 16})
    assert config.tied
    assert config.trunk.layers[0].attention.head_size == 256


def test_null_switches_a_cap_off_and_absence_does_not(read_published):
    without = {key: value for key, value in GEMMA2_2B.items() if not key.endswith("softcapping")}
    assert read_published(without).logit_softcap == 30.0
    nulls = {"final_logit_softcapping": None, "attn_logit_softcapping": None}
    config = read_published(without | nulls)
    assert config.logit_softcap is None
    assert config.trunk.layers[0].attention.softcap is None
