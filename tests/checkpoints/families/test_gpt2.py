"""GPT-2: parity, the published layout of its files, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.gpt2 import GPT2
from craton.checkpoints.safetensors import write_safetensors
from craton.errors import CheckpointError

SMALL = {"vocab_size": 199, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}

PUBLISHED = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_use_proj": True,
    "vocab_size": 50257,
}


@pytest.mark.peer
@pytest.mark.parametrize(
    "odd", [{"tie_word_embeddings": False}, {"n_inner": 80, "activation_function": "relu", "layer_norm_epsilon": 1e-3}]
)
def test_gpt2(check_causal, odd):
    transformers = pytest.importorskip("transformers")
    model = check_causal(transformers.GPT2Config(**SMALL, **odd, bos_token_id=0, eos_token_id=1))
    assert (model.head.weight is model.embedding.weight) is odd.get("tie_word_embeddings", True)


@pytest.mark.peer
@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_published_files_carry_masks_and_may_lack_the_prefix(tmp_path, prefix):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SMALL, bos_token_id=0, eos_token_id=1)).eval()
    tensors = {name.replace("transformer.", prefix): t.clone() for name, t in theirs.state_dict().items()}
    del tensors["lm_head.weight"]
    for layer in range(SMALL["n_layer"]):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **SMALL}))
    ids = torch.arange(40)
    with torch.inference_mode():
        ours = Checkpoint.open(tmp_path).load(torch.float32)(ids, ids)
        torch.testing.assert_close(ours, theirs(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("activation_function", "mish"),
        ("n_head", 5),
        ("n_layer", "three"),
    ],
)
def test_refused(key, value):
    with pytest.raises(CheckpointError, match=key):
        GPT2.config(Keys({**SMALL, key: value}, "config.json"))


@pytest.mark.peer
def test_published_keys(read_published):
    config = read_published(PUBLISHED)
    assert config.trunk.layers[0].feedforward.hidden == 3072


@pytest.mark.peer
def test_absent_keys(read_published):
    sizes = ("vocab_size", "n_embd", "n_layer", "n_head", "n_positions")
    read_published({key: PUBLISHED[key] for key in ("architectures", "model_type", *sizes)})


def test_one_tensor_under_two_names_is_refused(tmp_path):
    tensors = {"wpe.weight": torch.ones(64, 48), "transformer.wpe.weight": torch.ones(64, 48)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["GPT2LMHeadModel"], **SMALL}))
    with pytest.raises(CheckpointError, match="two names of one tensor"):
        Checkpoint.open(tmp_path).load(torch.float32)
