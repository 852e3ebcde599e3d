"""BERT."""

from __future__ import annotations

import shutil

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.safetensors import open_weights, write_safetensors

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer


def test_bert(check_encoder):
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=50,
        hidden_act="gelu_new",
    )
    check_encoder(config)


def test_the_masked_language_models_encoder(check_masked_lm):
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=50,
    )
    assert check_masked_lm(config).pooler is None


def test_the_first_files_names_of_a_norm(check_encoder, tmp_path):
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=50,
    )
    ours, folder = check_encoder(config), open_weights(tmp_path / "theirs")
    tensors = {}
    for name in folder.tensors:
        first = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[f"bert.{first}"] = folder.tensor(name).clone()
    (tmp_path / "old").mkdir()
    write_safetensors(tmp_path / "old" / "model.safetensors", tensors)
    shutil.copy(tmp_path / "theirs" / "config.json", tmp_path / "old" / "config.json")
    again = Checkpoint.open(tmp_path / "old").load(torch.float32)
    assert any(name.endswith("gamma") for name in tensors)
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in again.state_dict().items())
