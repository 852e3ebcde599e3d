"""Training on pictures: objectives, whole runs, exact resume, and what is published."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.safetensors import open_weights
from craton.data.picture_batches import PictureLoader
from craton.data.pictures import PictureSet
from craton.inference.images import load_images
from craton.modalities.image import encode_png
from craton.models import ImageClassifier, VisionTransformer
from craton.models.initialisation import initialise
from craton.models.masked_autoencoder import MaskedAutoencoder
from craton.models.self_distilled import SelfDistilled
from craton.models.vision import patchify, unpatchify
from craton.pretraining.images.objectives import MaskedPixels, SelfDistillation, shared_out, spread
from craton.pretraining.images.pretrain import resume, vision_config
from craton.store.runs import Run
from craton.training.image_classification import ImageClassification

pytest.importorskip("PIL", reason="pictures need Pillow")

CONFIG = vision_config(50_000, image=16, patch=8, channels=3)


def batch(count=6, views=1, **options):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
    pictures = PictureSet(pixels, np.arange(count) % 3, ("a", "b", "c"), None, ("",) * count)
    chosen = {"batch": count, "micro": count, "patch": 8, "mean": (0.5,) * 3, "std": (0.3,) * 3, "seed": 0} | options
    return PictureLoader(pictures, views=views, **chosen).make(np.arange(count))


def encoder(seed=0):
    model = VisionTransformer(CONFIG)
    initialise(model, seed)
    return model


@pytest.fixture
def shades(tmp_path):
    """A folder of two classes that a glance tells apart: dark and light."""
    rng = np.random.default_rng(0)
    for name, mean in (("dark", 60), ("light", 190)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(24):
            pixels = np.clip(rng.normal(mean, 30, (16, 16, 3)), 0, 255).astype(np.uint8)
            (tmp_path / "data" / name / f"{number}.png").write_bytes(encode_png(pixels))
    return tmp_path / "data"


def small(**changes: object) -> list[str]:
    """Flags of a run of a few seconds."""
    flags = {
        "image_size": 16, "patch": 8, "size": "50k", "holdout": 0.25, "batch": 12, "steps": 6, "threads": 1,
        "dtype": "float32",
    } | changes  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class TestObjectives:
    def test_classes_are_a_mean_of_pictures(self):
        model = ImageClassifier.over(encoder(), ("a", "b", "c"))
        parts = ImageClassification()(model.eval(), batch())
        expected = torch.nn.functional.cross_entropy(model(batch().pixels_BCHW), batch().labels_B)
        assert parts.count == 6
        assert parts.loss_sum.item() / 6 == pytest.approx(expected.item(), rel=1e-5)

    def test_patches_and_back(self):
        pixels = torch.rand(2, 3, 16, 24)
        assert torch.equal(unpatchify(patchify(pixels, 8), 8, (2, 3)), pixels)

    def test_patches_that_are_read_alone_are_the_same_in_any_order(self):
        model, pixels = encoder().eval(), torch.rand(2, 3, 16, 16)
        kept = torch.tensor([[0, 2, 3], [1, 0, 3]])
        some = model(pixels, kept_BM=kept)
        turned = model(pixels, kept_BM=kept.flip(1))
        assert some.shape == (2, 4, CONFIG.trunk.width)
        assert torch.allclose(some[:, 0], turned[:, 0], atol=1e-5)
        assert torch.allclose(some[:, 1:], turned[:, 1:].flip(1), atol=1e-5)
        whole = torch.arange(4).expand(2, -1)
        assert torch.allclose(model(pixels, kept_BM=whole), model(pixels), atol=1e-6)

    def test_hidden_patches_alone_count_and_cannot_be_seen(self):
        model = MaskedAutoencoder(encoder(), CONFIG.trunk, CONFIG.grid)
        initialise(model, 1)
        objective, data = MaskedPixels(hidden=0.5), batch()
        parts = objective(model.eval(), data)
        assert parts.count == 6 * 2
        assert objective(model, data).loss_sum == parts.loss_sum  # measuring hides the same each time
        kept = torch.tensor([[0, 3]]).expand(6, -1)
        changed = data.pixels_BCHW.clone()
        changed[:, :, :8, 8:] += 1.0  # the second patch, which is hidden
        assert torch.equal(model(data.pixels_BCHW, kept), model(changed, kept))

    def test_a_teacher_follows_its_student_and_has_no_gradient(self):
        model = SelfDistilled(encoder(), prototypes=32)
        initialise(model.student, 1)
        model.start_teacher()
        data, objective = batch(views=2), SelfDistillation(momentum=0.5)
        parts = objective(model.train(), data)
        parts.loss_sum.backward()
        assert parts.count == 12  # each of two views is compared with the other
        assert all(p.grad is None for p in model.teacher.parameters())
        before = model.teacher.encoder.patches.weight.clone()
        with torch.no_grad():
            model.student.encoder.patches.weight.add_(1.0)
        objective(model, data)
        assert torch.equal(model.teacher.encoder.patches.weight, before)  # a step that is given up moves nothing
        objective.settle(model)
        assert torch.allclose(model.teacher.encoder.patches.weight, before + 0.5, atol=1e-5)
        frozen = model.teacher.encoder.patches.weight.clone()
        objective(model.eval(), data)
        assert torch.equal(model.teacher.encoder.patches.weight, frozen)

    @pytest.mark.parametrize("views", [1, 2, 3])
    def test_a_student_sees_a_part_and_is_measured_alike_each_time(self, views):
        model = SelfDistilled(encoder(), prototypes=32)
        initialise(model.student, 1)
        objective, data = SelfDistillation(hidden=0.5), batch(views=views)
        parts = objective(model.eval(), data)
        assert parts.count == 6 * {1: 1, 2: 2, 3: 4}[views]
        assert objective(model, data).loss_sum == parts.loss_sum
        assert SelfDistillation(hidden=0.01)(model, data).loss_sum != parts.loss_sum

    @given(st.integers(1, 40), st.integers(2, 40), st.floats(0.1, 30), st.integers(0, 9))
    @settings(max_examples=30, deadline=None)
    def test_answers_are_shared_out(self, pictures, prototypes, scale, seed):
        logits = scale * torch.randn(pictures, prototypes, generator=torch.Generator().manual_seed(seed))
        shares = shared_out(logits)
        assert torch.allclose(shares.sum(1), torch.ones(pictures), atol=1e-4)
        assert (shares >= 0).all()

    def test_no_prototype_takes_all_pictures(self):
        favoured = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        favoured[:, 0] += 20.0
        assert favoured.softmax(1).sum(0)[0] > 60
        assert torch.allclose(shared_out(favoured).sum(0), torch.full((8,), 8.0), rtol=0.2)
        alike = torch.arange(8.0).expand(64, -1)
        assert torch.allclose(shared_out(alike), torch.full((64, 8), 1 / 8))

    def test_vectors_that_lie_together_are_driven_apart(self):
        together = torch.nn.functional.normalize(torch.ones(6, 4) + 0.01 * torch.randn(6, 4), dim=-1)
        assert spread(together) > spread(torch.eye(4)) == pytest.approx(-math.log(math.sqrt(2)), abs=1e-5)
        assert spread(torch.ones(1, 4)) == 0
        equal = torch.ones(3, 4, requires_grad=True)  # the same picture several times
        spread(equal).backward()
        assert torch.isfinite(equal.grad).all()


class TestRuns:
    def test_classes_end_to_end(self, craton, shades, tmp_path):
        status, out, err = craton(
            "pretrain-images", shades, *small(steps=60, name="shades", learning_rate=3e-3), "--json"
        )
        assert status == 0, err
        assert json.loads(out)["evaluation"]["correct"] == 1.0
        model = load_images("shades")
        assert model.labels == ("dark", "light")
        (guess,) = model.classify([np.full((20, 30, 3), 250, np.uint8)])
        assert guess[0].label == "light"
        # Further classes on what it has learnt, and it is judged as any other model.
        again = ("pretrain-images", shades, *small(model="shades", name="more"), "--json")
        assert craton(*again)[0] == 0
        probes = json.loads(craton("probe", "shades", shades, "--evaluation", shades, "--neighbours", "3", "--json")[1])
        assert {row["method"] for row in probes["probes"]} == {"linear", "knn"}
        assert probes["probes"][0]["accuracy"] == 1.0

    @pytest.mark.peer
    def test_what_is_published_opens_in_transformers(self, craton, shades, tmp_path):
        transformers = pytest.importorskip("transformers")
        assert craton("pretrain-images", shades, *small(name="shades"))[0] == 0
        ours = load_images("shades", dtype="float32")
        theirs = transformers.ViTForImageClassification.from_pretrained(ours.checkpoint.path)
        pixels = torch.from_numpy(ours.preprocessing.prepare(np.full((16, 16, 3), 99, np.uint8)))[None]
        assert torch.allclose(ours.module(pixels), theirs(pixel_values=pixels).logits, atol=1e-4)
        assert theirs.config.id2label == {0: "dark", 1: "light"}

    @pytest.mark.parametrize("objective", ["classes", "masked-pixels", "self-distillation"])
    def test_a_run_that_was_stopped_is_the_run_that_was_not(self, craton, shades, objective):
        flags = {"objective": objective, "evaluate_every": 2, "save_every": 3, "keep_last": 9}
        assert craton("pretrain-images", shades, *small(**flags, name="whole"))[0] == 0
        status, _, err = craton("pretrain-images", shades, *small(**flags, name="cut"))
        assert status == 0, err
        run = Run.open("cut")
        shutil.rmtree(run.checkpoints_folder / "step-00000006")
        result = resume(run)
        whole = open_weights(load_images("whole").checkpoint.path)
        again = open_weights(result.model.path)
        assert set(whole.tensors) == set(again.tensors)
        for name in whole.tensors:
            assert torch.equal(whole.tensor(name), again.tensor(name)), name

    def test_a_dry_run_keeps_nothing(self, craton, shades):
        assert craton("pretrain-images", shades, *small(), "--dry-run")[0] == 0
        assert json.loads(craton("runs", "--json")[1])["runs"] == []

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ((), "no pictures to train on"),
            (("PLAIN", *small()), "no classes"),
            (("DATA", *small(patch=7)), "whole patches of 7"),
            (("DATA", *small(name="No Name")), "name"),
            (("DATA", *small(size="tiny")), "not a size"),
            (("DATA", *small(colour=2)), "colour"),
        ],
    )
    def test_wrong_use(self, craton, shades, arguments, match):
        places = {"DATA": shades, "PLAIN": shades / "dark"}
        status, _, err = craton("pretrain-images", *(places.get(word, word) for word in arguments))
        assert status == 2
        assert match in err
