"""Losses against their definitions, and the rounds of prompts."""

from __future__ import annotations

import pytest
import torch
from tests.pretraining.masks.test_mask_batches import loader

from craton.models import Segmenter
from craton.models.initialisation import initialise
from craton.pretraining.masks.objective import PromptedMasks, correction, mask_loss, overlap
from craton.pretraining.masks.pretrain import segmenter_config
from craton.pretraining.masks.settings import PromptSettings

pytest.importorskip("PIL", reason="pictures need Pillow")


@pytest.fixture
def model() -> Segmenter:
    found = Segmenter(segmenter_config(300_000, image=16, patch=4))
    initialise(found, 0)
    return found


def test_the_loss_is_focal_and_dice():
    torch.manual_seed(0)
    logits, target = 3 * torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.rand(2, 5, 7) > 0.6
    found = mask_loss(logits, target)
    for g in range(2):
        for m in range(3):
            p, t = logits[g, m].sigmoid(), target[g]
            right = torch.where(t, p, 1 - p)
            focal = (-((1 - right) ** 2) * right.log()).mean()
            dice = 1 - (2 * p[t].sum() + 1) / (p.sum() + t.sum() + 1)
            assert found[g, m].item() == pytest.approx((20 * focal + dice).item())


def test_overlap_is_intersection_over_union():
    a = torch.tensor([[[[1, 1, 0, 0]], [[0, 0, 0, 0]]]], dtype=torch.bool)
    b = torch.tensor([[[[0, 1, 1, 0]]]], dtype=torch.bool)
    assert overlap(a, b).tolist() == [[pytest.approx(1 / 3), 0]]
    assert overlap(a[:, 1:], a[:, 1:]).tolist() == [[0]]


def test_a_correction_is_a_click_into_what_is_wrong():
    target = torch.tensor([[[1, 1, 0, 0]]], dtype=torch.bool).expand(3, -1, -1)
    answer = torch.tensor([[[1, 0, 0, 0]], [[1, 1, 0, 1]], [[1, 1, 0, 0]]], dtype=torch.bool)
    points, labels = correction(answer, target, torch.full((3,), 0.5))
    assert points[:2].tolist() == [[1, 0], [3, 0]]
    assert labels.tolist() == [1, 0, -1]


def test_a_batch_is_the_sum_of_its_scenes(model):
    whole, parts = loader(micro=4).step(0), loader(micro=1).step(0)
    objective = PromptedMasks()
    together, alone = objective(model, whole[0]), [objective(model, part) for part in parts]
    assert together.count == sum(part.count for part in alone) == 16
    torch.testing.assert_close(together.loss_sum, sum(part.loss_sum for part in alone), rtol=1e-4, atol=1e-4)
    assert set(together.metrics) == {"first_iou", "best_iou", "last_iou"}
    for name, value in together.metrics.items():
        assert 0 <= value <= 16
        torch.testing.assert_close(value, sum(part.metrics[name] for part in alone), rtol=1e-4, atol=1e-3)


def test_all_guesses_have_a_share(model):
    batch = loader(prompts=PromptSettings(corrections=0)).step(0)[0]
    best, half, all_alike = (PromptedMasks(shared)(model, batch).loss_sum for shared in (0.0, 0.5, 1.0))
    assert best < all_alike
    torch.testing.assert_close(half, (best + all_alike) / 2)


@pytest.mark.parametrize("boxes", [0.0, 1.0])
@pytest.mark.parametrize("corrections", [0, 2])
def test_all_that_is_trained_has_a_gradient(model, boxes, corrections):
    prompts = PromptSettings(prompts=2, boxes=boxes, corrections=corrections)
    PromptedMasks()(model, loader(prompts=prompts).step(0)[0]).loss_sum.backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    # Without a correction no mask is fed back.
    assert without == {name for name, _ in model.named_parameters() if "prompts.mask_" in name and not corrections}


def test_prompts_about_nothing_train_nothing(model):
    batch = loader()._nothing()
    parts = PromptedMasks()(model, batch)
    parts.loss_sum.backward()
    assert parts.count == 0
    assert parts.loss_sum.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
