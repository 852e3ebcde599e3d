"""RoBERTa and XLM-RoBERTa: BERT with two rows of the position table that belong to no token."""

from __future__ import annotations

import pytest
import torch

from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.roberta import ROBERTA
from craton.checkpoints.safetensors import open_weights
from craton.errors import CheckpointError

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 50,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}

ROBERTA_BASE = {
    "architectures": ["RobertaForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "roberta",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
XLM_ROBERTA_BASE = ROBERTA_BASE | {
    "architectures": ["XLMRobertaForMaskedLM"],
    "model_type": "xlm-roberta",
    "output_past": True,
    "position_embedding_type": "absolute",
    "vocab_size": 250002,
}


@pytest.mark.peer
@pytest.mark.parametrize("name", ["RobertaConfig", "XLMRobertaConfig"])
def test_as_long_a_text_as_the_table_holds(check_encoder, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    model = check_encoder(getattr(transformers, name)(**SMALL), length=48)
    assert model.config.context == 48
    saved = open_weights(tmp_path / "ours").tensor("embeddings.position_embeddings.weight")
    theirs = open_weights(tmp_path / "theirs").tensor("embeddings.position_embeddings.weight")
    assert torch.equal(saved[:2], torch.zeros(2, 32))
    assert torch.equal(saved[2:], theirs[2:])


@pytest.mark.peer
@pytest.mark.parametrize("name", ["RobertaConfig", "XLMRobertaConfig"])
def test_the_masked_language_models_encoder(check_masked_lm, name):
    transformers = pytest.importorskip("transformers")
    check_masked_lm(getattr(transformers, name)(**SMALL))


@pytest.mark.parametrize(("key", "value"), [("pad_token_id", 0), ("position_embedding_type", "relative_key")])
def test_refused(key, value):
    with pytest.raises(CheckpointError, match=key):
        ROBERTA.config(Keys({**SMALL, key: value}, "config.json"))


@pytest.mark.peer
@pytest.mark.parametrize("published", [ROBERTA_BASE, XLM_ROBERTA_BASE], ids=["roberta", "xlm-roberta"])
def test_published_and_absent_keys(read_published, published):
    assert read_published(published).context == 512
    absent = ("layer_norm_eps", "pad_token_id", "type_vocab_size", "hidden_act")
    assert read_published({k: v for k, v in published.items() if k not in absent}).token_types == 2
