"""GPT-NeoX: parallel and serial blocks, both spellings of its rotary keys, the tensors that old files carry."""

from __future__ import annotations

import json

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.safetensors import open_weights, write_safetensors

SMALL = {
    "vocab_size": 199,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
}

PYTHIA_160M = {
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "gelu",
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "model_type": "gpt_neox",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "vocab_size": 50304,
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "odd",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        {"use_parallel_residual": False, "attention_bias": False, "hidden_act": "gelu_new", "layer_norm_eps": 1e-3},
        {"tie_word_embeddings": True},
    ],
    ids=["rotary", "serial-no-bias", "tied"],
)
def test_gpt_neox(check_causal, odd):
    transformers = pytest.importorskip("transformers")
    check_causal(transformers.GPTNeoXConfig(**SMALL, **odd))


@pytest.mark.peer
def test_pythias_own_files(check_causal, tmp_path):
    """Their config has the keys of before transformers 5, their weights carry masks and frequencies."""
    transformers = pytest.importorskip("transformers")
    ours = check_causal(transformers.GPTNeoXConfig(**SMALL))
    folder = open_weights(tmp_path / "theirs")
    tensors = {name: folder.tensor(name).clone() for name in folder.tensors}
    for layer in range(SMALL["num_hidden_layers"]):
        place = f"gpt_neox.layers.{layer}.attention"
        tensors[f"{place}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
        tensors[f"{place}.masked_bias"] = torch.tensor(-1e9)
        tensors[f"{place}.rotary_emb.inv_freq"] = torch.ones(2)
    published = {"architectures": ["GPTNeoXForCausalLM"], **SMALL, "rotary_pct": 0.25, "rotary_emb_base": 10000}
    (tmp_path / "published").mkdir()
    write_safetensors(tmp_path / "published" / "model.safetensors", tensors)
    (tmp_path / "published" / "config.json").write_text(json.dumps(published))
    assert Checkpoint.open(tmp_path / "published").config == ours.config
    assert Checkpoint.open(tmp_path / "published").load(torch.float32).config == ours.config


@pytest.mark.peer
def test_published_keys(read_published):
    config = read_published(PYTHIA_160M)
    assert config.trunk.layers[0].attention.rotary.dims == 16
    half = read_published({**PYTHIA_160M, "rotary_pct": 0.5, "rotary_emb_base": 500}).trunk.layers[0].attention.rotary
    assert (half.dims, half.theta) == (32, 500.0)


@pytest.mark.peer
def test_absent_keys(read_published):
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    read_published({key: PYTHIA_160M[key] for key in ("architectures", "model_type", *sizes)})
