"""Runs of `craton pretrain-pairs --text-model`: pictures taught to a text encoder, resume, and what transformers makes
of the result."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.vit import VIT
from craton.checkpoints.save import save_checkpoint
from craton.inference.images import load_images
from craton.models import VisionTransformer
from craton.pretraining.images.pretrain import vision_config

pytest.importorskip("PIL", reason="pictures need Pillow")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def small(**changes: object) -> list[str]:
    """Flags of a run of a few seconds."""
    flags = {
        "image_size": 16, "patch": 8, "size": "60k", "holdout": 0.25, "batch": 8, "steps": 6, "threads": 1,
        "dtype": "float32",
    } | changes  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def wall(name: str) -> np.ndarray:
    return np.full((20, 30, 3), COLOURS[name], np.uint8)


def test_a_text_encoder_is_taught_pictures_and_stays_as_it_is(craton, patches, encoder):
    flags = small(text_model=encoder, steps=40, name="walls", learning_rate=3e-3)
    status, _, err = craton("pretrain-pairs", patches, *flags)
    assert status == 0, err
    assert "stays as it is" in err
    model = load_images("walls", dtype="float32")
    assert model.checkpoint.hf["architectures"] == ["VisionTextDualEncoderModel"]
    for name in COLOURS:
        ((first, *_),) = model.classify([wall(name)], list(COLOURS), templates=["A {} wall."])
        assert first.label == name
    texts = model.checkpoint.load(torch.float32).text.state_dict()
    for name, tensor in Checkpoint.open(encoder).load(torch.float32).state_dict().items():
        assert torch.equal(texts[name], tensor), name
    # It goes on, and its texts still stay.
    assert craton("pretrain-pairs", patches, *small(model="walls", name="more", steps=2))[0] == 0
    more = load_images("more", dtype="float32").module.state_dict()
    for name, tensor in model.module.state_dict().items():
        assert torch.equal(more[name], tensor) == name.startswith("text"), name
    assert '"relation": "base", "name": "encoder"' in craton("show", "walls", "--json")[1]
    # LLaVA's files have no place for its pictures.
    status, _, err = craton("pretrain-chat", patches, "--vision", "walls", "--language", encoder)
    assert status == 2
    assert "cannot be the vision tower" in err


@pytest.mark.slow
def test_fewer_bits_leave_the_vectors_where_they_are(craton, patches, encoder):
    # The layer that takes the mean has matrices of zeros and of one large number a row.
    assert craton("pretrain-pairs", patches, *small(text_model=encoder, name="walls"))[0] == 0
    chosen = ("--method", "gptq", "--bits", "8", "--calibration", patches, "--samples", "8", "--name", "few")
    status, _, err = craton("quantize", "walls", *chosen)
    assert status == 0, err
    before, after = load_images("walls"), load_images("few")
    assert (before.embed(["A red wall."]) * after.embed(["A red wall."])).sum() > 0.999
    assert (before.embed_images([wall("red")]) * after.embed_images([wall("red")])).sum() > 0.999


@pytest.mark.slow
def test_a_side_of_pictures_from_the_store(craton, patches, encoder):
    pictures = ("--objective", "self-distillation", "--image-size", "24", "--patch", "8", "--size", "60k")
    steps = ("--steps", "2", "--batch", "8", "--threads", "1", "--holdout", "0", "--name", "eye")
    assert craton("pretrain-images", patches.parent, *pictures, *steps)[0] == 0
    flags = small(text_model=encoder, vision_model="eye", name="walls", steps=1, learning_rate=1e-12)
    status, _, err = craton("pretrain-pairs", patches, *flags)
    assert status == 0, err
    assert "24 x 24" in err
    eye, model = load_images("eye", dtype="float32"), load_images("walls", dtype="float32")
    assert model.preprocessing == eye.preprocessing
    weights = eye.module.state_dict()
    assert len(weights) > 20
    for name, tensor in weights.items():
        if not name.startswith(("pooler.", "mask.")):
            torch.testing.assert_close(model.module.vision.state_dict()[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.peer
def test_a_taught_text_encoder_opens_in_transformers(craton, patches, encoder):
    transformers = pytest.importorskip("transformers")
    status, _, err = craton("pretrain-pairs", patches, *small(text_model=encoder, name="walls", steps=20))
    assert status == 0, err
    ours = load_images("walls", dtype="float32")
    folder = ours.checkpoint.path
    theirs, info = transformers.VisionTextDualEncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A red wall.", "green", "a blue wall, white"]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    pixels = CLIPImageProcessorPil.from_pretrained(folder)([wall("red"), wall("blue")], return_tensors="pt")
    with torch.inference_mode():
        expected = theirs.eval()(**pixels, **inputs)
        torch.testing.assert_close(ours.embed(texts), expected.text_embeds, atol=2e-4, rtol=1e-4)
        vectors = ours.embed_images([wall("red"), wall("blue")])
        torch.testing.assert_close(vectors, expected.image_embeds, atol=2e-4, rtol=1e-4)


def test_a_run_that_was_stopped_is_the_run_that_was_not(check_resumed, encoder):
    # Parts of 2 pairs, so that gradient caching is in it too.
    flags = {"evaluate_every": 2, "save_every": 3, "keep_last": 9, "micro_tokens": 10,
             "text_model": encoder}  # fmt: skip
    check_resumed(lambda name: small(**flags, name=name))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--text-model", "nobody"), "nobody"),
        (("--text-model", "EYE"), "a BERT here"),
        (("--vision-model", "EYE"), "--text-model"),
        (("--text-model", "ENCODER", "--model", "ENCODER"), "--model"),
        (("--model", "ENCODER"), "no model of pictures and texts"),
        (("--text-model", "ENCODER", "--loss", "sigmoid"), "--loss softmax"),
        (("--text-model", "ENCODER", "--vision-model", "ENCODER"), "ViT or a DINOv2"),
        (("--text-model", "ENCODER", "--vision-model", "EYE"), "in colour"),
    ],
)
def test_wrong_use(craton, patches, encoder, tmp_path, arguments, match):
    grey = VisionTransformer(vision_config(60_000, image=16, patch=8, channels=1))
    places = {"ENCODER": encoder, "EYE": save_checkpoint(grey, VIT, tmp_path / "eye")}
    status, _, err = craton("pretrain-pairs", patches, *(places.get(word, word) for word in arguments))
    assert status == 2
    assert match in err
