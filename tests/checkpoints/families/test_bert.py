"""BERT."""

from __future__ import annotations

import pytest

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
