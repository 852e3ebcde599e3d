"""Adapters of models that see: trained by `craton finetune`, read by PEFT, merged, and used by name."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import craton as package
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.dinov2 import DINOV2
from craton.checkpoints.families.vit import VIT
from craton.checkpoints.save import save_checkpoint
from craton.finetuning.finetune import resume
from craton.modalities.image import ImagePreprocessing, encode_png
from craton.models import VisionTransformer
from craton.models.initialisation import initialise
from craton.pretraining.images.pretrain import vision_config
from craton.store.runs import Run

pytest.importorskip("PIL", reason="pictures need Pillow")


@pytest.fixture
def base(tmp_path):
    """A random ViT, or a DINOv2 with its mask token and layer scale."""

    def make(name="vit"):
        config = vision_config(
            60_000, image=16, patch=8, channels=3, layer_scale=1.0 if name == "dinov2" else None
        ).model_copy(update={"mask_token": name == "dinov2"})
        model = VisionTransformer(config)
        initialise(model, 0)
        family = {"vit": VIT, "dinov2": DINOV2}[name]
        return save_checkpoint(model, family, tmp_path / name, preprocessing=ImagePreprocessing.square(16))

    return make


@pytest.fixture
def shades(tmp_path):
    rng = np.random.default_rng(0)
    for name, mean in (("dark", 60), ("light", 190)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(rng.normal(mean, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            (tmp_path / "data" / name / f"{number}.png").write_bytes(encode_png(pixels))
    return tmp_path / "data"


def flags(**changes):
    chosen = {
        "task": "classify", "steps": 40, "batch": 16, "holdout": 0.25, "learning_rate": 1e-2, "threads": 1,
        "dtype": "float32", "rank": 4, "name": "shades",
    } | changes  # fmt: skip
    return [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_an_adapter_end_to_end(craton, base, shades, tmp_path, name):
    status, out, err = craton("finetune", base(name), shades, *flags(), "--json")
    assert status == 0, err
    assert json.loads(out)["evaluation"]["correct"] == 1.0
    light = tmp_path / "light.png"
    light.write_bytes(encode_png(np.full((20, 30, 3), 240, np.uint8)))
    said = json.loads(craton("classify", light, "--model", "shades", "--json")[1])
    assert said["images"][0]["classes"][0]["label"] == "light"
    adapted = package.load_images("shades", dtype="float32")
    # Merged into a model of its own, it says the same.
    status, _, err = craton("merge", "shades", "--name", "merged")
    assert status == 0, err
    merged = package.load_images("merged", dtype="float32")
    pixels = torch.from_numpy(adapted.preprocessing.prepare(np.full((16, 16, 3), 99, np.uint8)))[None]
    assert torch.allclose(adapted.module(pixels), merged.module(pixels), atol=1e-5)


def test_left_is_not_right_where_pictures_are_not_mirrored(craton, base, tmp_path):
    rng = np.random.default_rng(0)
    for name, bright in (("left", slice(0, 8)), ("right", slice(8, 16))):
        (tmp_path / "sides" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 60, (16, 16, 3), np.uint8)
            pixels[:, bright] += 150
            (tmp_path / "sides" / name / f"{number}.png").write_bytes(encode_png(pixels))
    full = flags(method="full", learning_rate=3e-3)
    correct = {}
    for words in ((), ("--no-flip", "--crop", "1")):
        status, out, err = craton("finetune", base(), tmp_path / "sides", *full, *words, "--json")
        assert status == 0, err
        correct[words] = json.loads(out)["evaluation"]["correct"]
    mirrored, straight = correct.values()
    assert straight == 1.0 > mirrored


@pytest.mark.peer
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_peft_reads_it(craton, base, shades, name):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = base(name)
    assert craton("finetune", folder, shades, *flags(steps=5))[0] == 0
    ours = package.load_images("shades", dtype="float32")
    from craton.store import find

    kind = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}[name]
    theirs = getattr(transformers, kind).from_pretrained(folder, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(theirs, find("shades").path).eval()
    pixels = torch.from_numpy(ours.preprocessing.prepare(np.full((16, 16, 3), 99, np.uint8)))[None]
    assert torch.allclose(ours.module(pixels), theirs(pixel_values=pixels).logits, atol=1e-4)


def test_all_weights_and_further_training(craton, base, shades):
    assert craton("finetune", base(), shades, *flags(method="full", learning_rate=1e-3))[0] == 0
    assert Checkpoint.open(package.load_images("shades").checkpoint.path).config.labels == ("dark", "light")
    status, _, err = craton("finetune", "shades", shades, *flags(name="again", steps=3))
    assert status == 0, err
    assert package.load_images("again").labels == ("dark", "light")


def test_a_run_that_was_stopped_is_the_run_that_was_not(craton, base, shades):
    folder, more = base(), {"steps": 6, "save_every": 3, "keep_last": 9}
    for name in ("whole", "cut"):
        status, _, err = craton("finetune", folder, shades, *flags(**more, name=name))
        assert status == 0, err
    run = Run.open("cut")
    shutil.rmtree(run.checkpoints_folder / "step-00000006")
    again = resume(run)
    from safetensors.torch import load_file

    from craton.store import find

    whole = load_file(find("whole").path / "adapter_model.safetensors")
    cut = load_file(again.model.path / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"task": "sft"}, "for models of texts"),
        ({"method": "qlora"}, "for models of texts"),
        ({"shots": 3}, "--shots"),
        ({"data": "dark"}, "no classes"),
        ({"base": "clip"}, "given no classes by training"),
    ],
)
def test_wrong_use(craton, base, shades, seeing_folders, changes, match):
    changes = dict(changes)
    data = shades / changes.pop("data") if "data" in changes else shades
    model = seeing_folders[changes.pop("base")] if "base" in changes else base()
    status, _, err = craton("finetune", model, data, *flags(**changes))
    assert status == 2
    assert match in err
