"""Phi-3: fused matrices, partly rotated heads, and longrope on both sides of the original context."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.phi3 import PHI3
from craton.trunk.trunk import sequence_layout

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "pad_token_id": None,
}

PHI3_MINI_128K = {
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "embd_pdrop": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "model_type": "phi3",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 47 + [64.8], "short_factor": [1.1] * 48, "type": "longrope"},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
PHI4_MINI = PHI3_MINI_128K | {
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "partial_rotary_factor": 0.75,
    "tie_word_embeddings": True,
    "vocab_size": 200064,
}


def longrope(original, context=128, share=0.75, **extra):
    pairs = int(32 * share) // 2
    return {
        "max_position_embeddings": context,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "partial_rotary_factor": share,
            "short_factor": [1.0 + 0.05 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.4 * i for i in range(pairs)],
            **extra,
        },
    }


def test_fused_matrices_shared_heads_and_a_window(check_causal):
    check_causal(transformers.Phi3Config(**SMALL, num_key_value_heads=1, sliding_window=7))


def test_a_head_size_of_its_own(check_causal):
    check_causal(transformers.Phi3Config(**SMALL, head_dim=24, tie_word_embeddings=True))


def test_longrope_within_the_original_context(check_causal):
    model = check_causal(transformers.Phi3Config(**SMALL, **longrope(original=64), tie_word_embeddings=True), 48)
    assert model.config.trunk.layers[0].attention.rotary.dims == 24


def test_longrope_beyond_the_original_context(check_causal):
    # Every sequence that the check decodes has more than 7 tokens before its first cached step.
    check_causal(transformers.Phi3Config(**SMALL, **longrope(original=7)), 72)


def test_longrope_with_its_attention_factor_given(check_causal):
    check_causal(transformers.Phi3Config(**SMALL, **longrope(original=7, share=1.0, attention_factor=1.4)), 72)


def test_each_packed_sequence_takes_the_factors_of_its_own_length(tmp_path):
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**SMALL, **longrope(original=16))).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    ours = Checkpoint.open(tmp_path).load(torch.float32)
    ids = torch.randint(0, 199, (16 + 17,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        packed = ours(ids, *sequence_layout([16, 17]))
        separate = torch.cat([theirs(part[None]).logits[0] for part in ids.split([16, 17])])
    torch.testing.assert_close(packed, separate, rtol=1e-3, atol=1e-4)


def test_published_keys(read_published):
    rotary = read_published(PHI3_MINI_128K).trunk.layers[0].attention.rotary
    assert (rotary.dims, rotary.scaling.factor, rotary.scaling.original_context) == (96, 32.0, 4096)
    assert rotary.scaling.attention_factor == pytest.approx(1.19, abs=1e-2)
    assert read_published(PHI4_MINI).trunk.layers[0].attention.rotary.dims == 96
    read_published(PHI3_MINI_128K | {"rope_scaling": None, "sliding_window": 2047, "max_position_embeddings": 4096})


def test_the_first_name_of_longrope():
    first = PHI3_MINI_128K | {"rope_scaling": PHI3_MINI_128K["rope_scaling"] | {"type": "su"}}
    assert PHI3.config(Keys(first, "config.json")) == PHI3.config(Keys(PHI3_MINI_128K, "config.json"))


def test_the_original_context_beside_the_factors_or_by_default():
    scaling = PHI3_MINI_128K["rope_scaling"]
    without = {key: value for key, value in PHI3_MINI_128K.items() if key != "original_max_position_embeddings"}
    inside = without | {"rope_scaling": scaling | {"original_max_position_embeddings": 2048}}
    for values, expected in ((without, 4096), (inside, 2048)):
        config = PHI3.config(Keys(values, "config.json"))
        assert config.trunk.layers[0].attention.rotary.scaling.original_context == expected


def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = read_published({key: PHI3_MINI_128K[key] for key in ("architectures", "model_type", *sizes)})
    assert (config.context, config.trunk.final_norm.eps, config.tied) == (4096, 1e-5, False)
