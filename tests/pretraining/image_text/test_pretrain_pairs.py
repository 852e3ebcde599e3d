"""Runs of `craton pretrain-pairs`: from files to a model that finds pictures by words, resume, and what transformers
makes of the result."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from craton.inference.images import load_images
from craton.models import DualEncoder
from craton.pretraining.image_text.architecture import dual_encoder_config
from craton.pretraining.image_text.pretrain import resume
from craton.store.runs import Run

pytest.importorskip("PIL", reason="pictures need Pillow")

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}


def small(**changes: object) -> list[str]:
    """Flags of a run of a few seconds."""
    flags = {
        "image_size": 16, "patch": 8, "size": "60k", "holdout": 0.25, "batch": 8, "steps": 6, "threads": 1,
        "dtype": "float32", "context": 12, "vocab": 300,
    } | changes  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def wall(name: str) -> np.ndarray:
    return np.full((20, 30, 3), COLOURS[name], np.uint8)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_run_ends_in_a_model_that_knows_words(craton, patches, loss):
    flags = small(loss=loss, steps=40, name="walls", learning_rate=3e-3)
    status, out, err = craton("pretrain-pairs", patches, *flags, "--json")
    assert status == 0, err
    assert json.loads(out)["evaluation"]["targets"] == 8
    model = load_images("walls", dtype="float32")
    assert isinstance(model.module, DualEncoder)
    assert model.module.config.logit_bias == (loss == "sigmoid")
    for name in COLOURS:
        ((first, *_),) = model.classify([wall(name)], list(COLOURS), templates=["A {} wall."])
        assert first.label == name
    # It goes on, by its own loss and no other.
    if loss == "softmax":
        assert craton("pretrain-pairs", patches, *small(model="walls", name="more", steps=2))[0] == 0
        assert "walls" in craton("show", "more", "--json")[1]
    other = {"softmax": "sigmoid", "sigmoid": "softmax"}[loss]
    status, _, err = craton("pretrain-pairs", patches, *small(model="walls", name="third", loss=other))
    assert status == 2
    assert f"trained with {loss}" in err


@pytest.mark.peer
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_what_is_published_opens_in_transformers(craton, patches, loss):
    transformers = pytest.importorskip("transformers")
    assert craton("pretrain-pairs", patches, *small(loss=loss, name="walls", context=16))[0] == 0
    ours = load_images("walls", dtype="float32")
    folder = ours.checkpoint.path
    kind = transformers.CLIPModel if loss == "softmax" else transformers.SiglipModel
    theirs, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["A Red wall.", "green", "a blue wall, white"]
    inputs = tokenizer(texts, padding="max_length", max_length=ours.module.config.context, return_tensors="pt")
    for ids, own in zip(inputs["input_ids"].tolist(), ours.tokenizer.encode_batch(texts), strict=True):
        assert ids[: len(own)] == own
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(folder)
    pixels = processor([wall("red"), wall("blue")], return_tensors="pt")["pixel_values"]
    if loss == "sigmoid":
        inputs.pop("attention_mask", None)  # SigLIP reads the padding
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, **inputs).logits_per_image
    vectors = ours.embed_images([wall("red"), wall("blue")]), ours.embed(texts)
    with torch.inference_mode():
        torch.testing.assert_close(ours.module.logits(*vectors), expected, atol=2e-4, rtol=1e-4)


def test_a_run_that_was_stopped_is_the_run_that_was_not(check_resumed):
    # Parts of 2 pairs, so that gradient caching is in it too.
    flags = {"evaluate_every": 2, "save_every": 3, "keep_last": 9, "micro_tokens": 40}
    check_resumed(lambda name: small(**flags, name=name))


def test_other_captions_are_not_gone_on_with(craton, patches):
    assert craton("pretrain-pairs", patches, *small(save_every=3, keep_last=9, name="walls"))[0] == 0
    run = Run.open("walls")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    patches.write_text(patches.read_text().replace("red", "pink"))
    with pytest.raises(Exception, match="changed"):
        resume(run)


def test_a_dry_run_keeps_nothing(craton, patches):
    status, _, err = craton("pretrain-pairs", patches, *small(context=4), "--dry-run")
    assert status == 0
    assert "24 captions are cut to 4 tokens" in err
    assert json.loads(craton("runs", "--json")[1])["runs"] == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "no pictures to train on"),
        (("FOLDER", *small()), "no caption"),
        (("DATA", *small(patch=7)), "whole patches of 7"),
        (("DATA", *small(vocab=100)), "too few"),
        (("DATA", *small(context=2)), "context"),
        (("DATA", *small(name="No Name")), "name"),
        (("DATA", *small(loss="triplet")), "loss"),
        (("DATA", *small(model="nobody")), "nobody"),
    ],
)
def test_wrong_use(craton, patches, arguments, match):
    places = {"DATA": patches, "FOLDER": patches.parent}
    status, _, err = craton("pretrain-pairs", *(places.get(word, word) for word in arguments))
    assert status == 2
    assert match in err


def test_sizes_come_out_about_right():
    for loss in ("softmax", "sigmoid"):
        for parameters in (1_000_000, 10_000_000, 100_000_000):
            config = dual_encoder_config(parameters, loss, image=64, patch=16, vocab=4096, context=32, pad=4095)
            with torch.device("meta"):
                count = sum(p.numel() for p in DualEncoder(config).parameters())
            assert 0.7 < count / parameters < 1.4, (loss, parameters, count)
