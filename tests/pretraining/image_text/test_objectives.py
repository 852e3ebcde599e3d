"""The losses of CLIP and SigLIP against their definitions, equal captions, the scale, and gradient caching."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from craton.data.picture_batches import PictureBatch
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import apply_lora
from craton.models import DualEncoder
from craton.models.initialisation import initialise
from craton.pretraining.image_text.architecture import dual_encoder_config
from craton.pretraining.image_text.joining import lock_texts, read_locked
from craton.pretraining.image_text.objectives import ImageText

LOSSES = ("softmax", "sigmoid")


def dual(loss: str, seed: int = 0) -> DualEncoder:
    config = dual_encoder_config(60_000, loss, image=16, patch=8, vocab=40, context=6, pad=39)
    model = DualEncoder(config)
    initialise(model, seed)
    return model


def batch(texts: tuple[tuple[int, ...], ...] = ((1, 2, 39), (3, 39), (4, 5, 6, 39), (7, 39), (8, 39))) -> PictureBatch:
    count = len(texts)
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return PictureBatch(pixels, torch.full((count,), -1), torch.arange(count), 8, 1, texts)


def gradients(model: DualEncoder, loss: str, micro: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    ImageText(loss, micro=micro)(model.train(), batch()).loss_sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_softmax_is_the_mean_of_both_choices():
    model, data = dual("softmax").eval(), batch()
    parts = ImageText("softmax", micro=8)(model, data)
    logits, own = model(data.pixels_BCHW, data.texts), torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert parts.count == 5
    assert parts.loss_sum.item() / 5 == pytest.approx(expected.item(), rel=1e-5)
    assert parts.metrics["text_found"] == (logits.argmax(1) == own).sum()
    assert parts.metrics["picture_found"] == (logits.argmax(0) == own).sum()
    assert parts.metrics["scale"].item() / 5 == pytest.approx(1 / 0.07, rel=1e-4)


def test_sigmoid_is_a_verdict_on_every_pair():
    model, data = dual("sigmoid").eval(), batch()
    parts = ImageText("sigmoid", micro=8)(model, data)
    logits = model(data.pixels_BCHW, data.texts)
    expected = F.binary_cross_entropy_with_logits(logits, torch.eye(5), reduction="sum")
    assert parts.loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_equal_captions_are_no_negatives(loss):
    model = dual(loss).eval()
    objective = ImageText(loss, micro=8)
    # Of two pictures with one caption, each has the loss that it has without the other.
    twice = batch(((1, 2, 39), (3, 39), (1, 2, 39)))
    alone = replace(twice, pixels_BCHW=twice.pixels_BCHW[:2], texts=twice.texts[:2])
    other = replace(twice, pixels_BCHW=twice.pixels_BCHW[[2, 1]], texts=(twice.texts[2], twice.texts[1]))
    logits = model(twice.pixels_BCHW, twice.texts)
    if loss == "sigmoid":
        expected = -F.logsigmoid(torch.stack((logits[0, 0], logits[1, 1], logits[2, 2], -logits[0, 1], -logits[1, 0],
                                              -logits[1, 2], -logits[2, 1]))).sum()  # fmt: skip
        assert objective(model, twice).loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    else:
        rows = torch.stack([logits[0, [0, 1]], logits[2, [2, 1]], logits[[0, 1], 0], logits[[2, 1], 2]])
        middle = F.cross_entropy(logits[1:2], torch.tensor([1])) + F.cross_entropy(logits.T[1:2], torch.tensor([1]))
        expected = (F.cross_entropy(rows, torch.zeros(4, dtype=torch.int64), reduction="sum") + middle) / 2
        assert objective(model, twice).loss_sum.item() == pytest.approx(expected.item(), rel=1e-5)
    same = replace(twice, pixels_BCHW=twice.pixels_BCHW[[0, 2]], texts=(twice.texts[0], twice.texts[2]))
    if loss == "softmax":
        assert objective(model, same).loss_sum.item() == pytest.approx(0, abs=1e-6)
    assert objective(model, alone).count == objective(model, other).count == 2


def test_a_single_pair_has_no_loss_and_a_gradient():
    model = dual("softmax")
    parts = ImageText("softmax", micro=8)(model, batch(((1, 39),)))
    parts.loss_sum.backward()
    assert parts.loss_sum.item() == 0
    assert torch.isfinite(model.text.embedding.weight.grad).all()


def test_the_scale_is_limited_for_softmax_alone_and_only_while_it_is_trained():
    for loss, expected in (("softmax", 100.0), ("sigmoid", 150.0)):
        model = dual(loss)
        with torch.no_grad():
            model.logits.scale.fill_(torch.tensor(150.0).log())
        ImageText(loss, micro=8)(model.eval(), batch())
        assert model.logits.scale.exp().item() == pytest.approx(150, rel=1e-4)
        ImageText(loss, micro=8)(model.train(), batch())
        assert model.logits.scale.exp().item() == pytest.approx(expected, rel=1e-4)


def test_known_texts_are_not_read_again():
    model, data = dual("softmax").eval(), batch()
    lock_texts(model)
    expected = ImageText("softmax", micro=8)(model, data).loss_sum
    known = read_locked(model, data.texts)
    model.text = None  # what is not there cannot be read
    for micro in (2, 8):
        found = ImageText("softmax", micro=micro, known=known)(model, data).loss_sum
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        found.backward()
        assert model.vision.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(loss, adapted):
    model = dual(loss)
    if adapted:
        model.requires_grad_(False)
        torch.manual_seed(0)
        apply_lora(model, LoraSettings(rank=4))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and name.endswith(".b"):
                    parameter.normal_(std=0.1)  # B begins at zero, where A has no gradient
    whole = gradients(model, loss, micro=5)
    assert any(gradient.abs().max() > 1e-3 for gradient in whole.values())
    for micro in (1, 2, 3):
        parts = gradients(model, loss, micro)
        assert parts.keys() == whole.keys()
        for name in whole:
            # The loss is a sum, so that some gradients are far above 1.
            limit = 1e-5 * max(1.0, whole[name].abs().max().item())
            assert (parts[name] - whole[name]).abs().max().item() < limit, name
