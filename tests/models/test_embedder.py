"""Text vectors: packed and alone, and those of the model that is loaded for embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.models import CausalLM, CausalLMConfig, Embedder, Encoder, EncoderConfig, PoolingConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig
from craton.trunk.trunk import sequence_layout

LENGTHS = [3, 1, 8, 5]
IDS = torch.randint(0, 40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def backbone(mask: Any) -> CausalLM | Encoder:
    torch.manual_seed(0)
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask=mask, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="gelu"),
        norm=NormConfig(kind="rms"),
    )
    trunk = TrunkConfig(width=16, layers=(layer,) * 2, final_norm=NormConfig(kind="rms"))
    if mask == "causal":
        return CausalLM(CausalLMConfig(vocab=40, context=32, trunk=trunk, tied=True))
    return Encoder(EncoderConfig(vocab=40, context=32, trunk=trunk))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(("mask", "mode"), [("full", "mean"), ("full", "cls"), ("causal", "last"), ("causal", "mean")])
def test_packed_vectors_are_those_of_each_text_alone(mask: str, mode: Any, normalise: bool) -> None:
    model = Embedder(backbone(mask), PoolingConfig(mode=mode, normalise=normalise))
    vectors = model(IDS, *sequence_layout(LENGTHS), LENGTHS)
    alone = torch.cat([model(part, *sequence_layout([len(part)]), [len(part)]) for part in IDS.split(LENGTHS)])
    torch.testing.assert_close(vectors, alone)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4)) == normalise


def test_the_vectors_of_the_loaded_model(minilm_folder: Path) -> None:
    texts = ["Where is my card?", "کارت من کجاست؟", "a"]
    checkpoint = Checkpoint.open(minilm_folder)
    module = checkpoint.load(torch.float32)
    assert isinstance(module, Encoder)
    assert checkpoint.pooling is not None
    encoded = checkpoint.tokenizer().encode_batch(texts)
    lengths = [len(ids) for ids in encoded]
    with torch.no_grad():
        model = Embedder(module, checkpoint.pooling)
        vectors = model(torch.tensor([i for ids in encoded for i in ids]), *sequence_layout(lengths), lengths)
    expected = craton.load(str(minilm_folder), dtype="float32").embed(texts)
    torch.testing.assert_close(vectors, expected, rtol=0, atol=2e-6)
