"""Segmenters: what a prompt may be, and what training reaches."""

from __future__ import annotations

import pytest
import torch

from craton.errors import UsageError
from craton.models import Segmenter, SegmenterConfig, VisionConfig
from craton.models.initialisation import initialise
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

NORM = NormConfig(kind="layer", eps=1e-6, bias=True)
LAYER = LayerConfig(
    attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full", bias=("q", "k", "v", "o")),
    feedforward=FeedForwardConfig(hidden=32, activation="gelu", bias=True),
    norm=NORM,
)
VISION = VisionConfig(
    image=(32, 32),
    patch=8,
    trunk=TrunkConfig(width=16, layers=(LAYER,), final_norm=None),
    class_token=False,
    pooling="mean",
)


@pytest.fixture
def segmenter():
    model = Segmenter(SegmenterConfig(vision=VISION, width=16, heads=2, hidden=32, iou_hidden=16))
    initialise(model, 0)
    return model


def test_shapes_and_prompts(segmenter):
    image = segmenter.encode(torch.randn(1, 3, 32, 32))
    assert image.shape == (1, 16, 4, 4)
    points, labels = torch.rand(5, 2, 2) * 32, torch.tensor([[1, 0]] * 5)
    boxes = torch.tensor([[2.0, 3, 20, 25]]).expand(5, -1)
    logits, quality = segmenter.decode(image, points, labels)
    assert logits.shape == (5, 3, *segmenter.config.mask_size) == (5, 3, 16, 16)
    assert quality.shape == (5, 3)
    again, _ = segmenter.decode(image, points, labels, masks_B1HW=logits[:, :1], several=False)
    assert again.shape == (5, 1, 16, 16)
    for prompt in ({"boxes_B4": boxes}, {"points_BQ2": points, "labels_BQ": labels, "boxes_B4": boxes}):
        found, _ = segmenter.decode(image, **prompt)
        assert found.shape == logits.shape
        assert not torch.allclose(found, logits)
    alone, _ = segmenter.decode(image, masks_B1HW=logits[:, :1])
    assert torch.isfinite(alone).all()


def test_a_prompt_alone_or_among_others(segmenter):
    image = segmenter.encode(torch.randn(3, 3, 32, 32))
    points, labels = torch.rand(3, 2, 2) * 32, torch.tensor([[1, 0], [1, -1], [1, 1]])
    together, _ = segmenter.decode(image, points, labels)
    for number in range(3):
        one = slice(number, number + 1)
        alone, _ = segmenter.decode(image[one], points[one], labels[one])
        torch.testing.assert_close(alone, together[one], rtol=1e-4, atol=1e-5)


def test_inside_is_not_outside(segmenter):
    image, point = segmenter.encode(torch.randn(1, 3, 32, 32)), torch.tensor([[[9.0, 9]]])
    inside, _ = segmenter.decode(image, point, torch.tensor([[1]]))
    outside, _ = segmenter.decode(image, point, torch.tensor([[0]]))
    elsewhere, _ = segmenter.decode(image, point + 10, torch.tensor([[1]]))
    assert (inside - outside).abs().max() > 0.1 * inside.abs().max()
    assert (inside - elsewhere).abs().max() > 0.1 * inside.abs().max()


def test_every_parameter_learns(segmenter):
    points, labels = torch.tensor([[[4.0, 5], [9, 9]]]).expand(2, -1, -1), torch.tensor([[1, 0], [1, -1]])
    image = segmenter.encode(torch.randn(2, 3, 32, 32))
    logits, quality = segmenter.decode(image, points, labels, torch.tensor([[1.0, 2, 8, 9]]).expand(2, -1))
    single, alone = segmenter.decode(image, points, labels, masks_B1HW=logits[:, :1], several=False)
    (logits.square().sum() + quality.square().sum() + single.square().sum() + alone.square().sum()).backward()
    still = [name for name, p in segmenter.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # A key's bias changes no softmax, and the frequencies stay as they are.
    assert [name for name in still if not name.endswith((".k.bias", "frequencies"))] == []


def test_activations_in_bfloat16(segmenter):
    segmenter.vision.compute_dtype = torch.bfloat16
    image = segmenter.encode(torch.randn(1, 3, 32, 32))
    assert image.dtype == torch.bfloat16
    logits, quality = segmenter.decode(image, torch.tensor([[[4.0, 5]]]), torch.tensor([[1]]))
    assert logits.dtype == quality.dtype == torch.bfloat16


def test_what_is_refused(segmenter):
    with pytest.raises(UsageError, match="32 x 32"):
        segmenter.encode(torch.randn(1, 3, 32, 24))
    with pytest.raises(UsageError, match="nothing says what to segment"):
        segmenter.decode(segmenter.encode(torch.randn(1, 3, 32, 32)))
    for wrong in ({"width": 24, "heads": 8}, {"vision": VISION.model_copy(update={"image": (32, 24)})}):
        with pytest.raises(ValueError, match=r"not split|no squares"):
            SegmenterConfig(**{"vision": VISION, **wrong})
