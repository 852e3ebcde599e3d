"""A text encoder made readable by its pooler, and joined with a side of pictures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from craton.errors import UsageError
from craton.models import PoolingConfig, VisionTransformer, pool
from craton.models.initialisation import initialise
from craton.pretraining.image_text.joining import join, likeness, pooled_encoder, read_locked
from craton.pretraining.images.pretrain import vision_config
from craton.trunk.trunk import sequence_layout

TEXTS = [(3, 9, 4), (3, 200, 17, 60, 61, 4), (3, 5, 5, 5, 77, 4), (3, 4)]


def eye() -> VisionTransformer:
    vision = VisionTransformer(vision_config(60_000, image=16, patch=8, channels=3))
    initialise(vision, 3)
    return vision


@torch.no_grad()
def own(text, mode: str) -> torch.Tensor:
    lengths = [len(ids) for ids in TEXTS]
    flat = torch.tensor([token for ids in TEXTS for token in ids])
    return pool(text(flat, *sequence_layout(lengths)), lengths, PoolingConfig(mode=mode, normalise=False))


def test_the_first_token_through_a_pooler(make_encoder):
    text = make_encoder()
    model = join(eye(), pooled_encoder(text, PoolingConfig(mode="cls")), 0)
    assert len(model.config.text.trunk.layers) == 2
    found = torch.stack([read_locked(model, TEXTS)[ids] for ids in TEXTS])
    assert F.cosine_similarity(found, own(text, "cls")).min() > 0.9999


def test_the_mean_of_all_tokens_through_a_pooler(make_encoder):
    text = make_encoder()
    norm = text.trunk.layers[-1].feedforward_norm["residual"]
    model = join(eye(), pooled_encoder(text, PoolingConfig(mode="mean")), 0)
    assert len(model.config.text.trunk.layers) == 3
    known, expected = read_locked(model, TEXTS), own(text, "mean")
    found = torch.stack([known[ids] for ids in TEXTS])
    # What is lost is one direction, in which no two texts differ.
    same = F.normalize(1 / norm.weight.detach(), dim=0)
    constant = expected @ same
    torch.testing.assert_close(constant, constant[:1].expand(4), atol=1e-5, rtol=1e-5)
    expected = expected - constant[:, None] * same
    assert F.cosine_similarity(found, expected).min() > 0.9999
    assert likeness(text, PoolingConfig(mode="mean"), known) > 0.9
    # A norm without a bias loses nothing.
    torch.nn.init.zeros_(norm.bias)
    model = join(eye(), pooled_encoder(text, PoolingConfig(mode="mean")), 0)
    assert likeness(text, PoolingConfig(mode="mean"), read_locked(model, TEXTS)) > 0.9999


def test_a_norm_that_is_the_identity_needs_no_turning(make_encoder):
    text = make_encoder()
    norm = text.trunk.layers[-1].feedforward_norm["residual"]
    torch.nn.init.ones_(norm.weight)
    torch.nn.init.zeros_(norm.bias)
    model = join(eye(), pooled_encoder(text, PoolingConfig(mode="mean")), 0)
    assert likeness(text, PoolingConfig(mode="mean"), read_locked(model, TEXTS)) > 0.9999


def test_the_last_token_is_refused(make_encoder):
    with pytest.raises(UsageError, match="last token"):
        pooled_encoder(make_encoder(), PoolingConfig(mode="last"))


def test_both_sides_are_taken_over_and_the_texts_are_locked(make_encoder):
    vision, text = eye(), pooled_encoder(make_encoder(), PoolingConfig())
    model = join(vision, text, 0)
    for name, tensor in vision.state_dict().items():
        assert torch.equal(model.vision.get_parameter(name), tensor), name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"vision", "logits"}
    assert "vision.pooler.weight" in trained
