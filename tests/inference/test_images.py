"""Models that see, end to end on random weights: vectors, classes, features."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import craton
from craton.errors import CheckpointError, ContextOverflow, FileFormatError, UsageError
from craton.inference.images import TEMPLATES, load_images, sees
from craton.modalities.image import read_image


@pytest.fixture
def model(seeing_folders):
    return lambda name, **options: load_images(seeing_folders[name], dtype="float32", **options)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov3"])
def test_vectors_do_not_depend_on_the_batch(model, picture_files, name):
    loaded = model(name)
    together = loaded.embed_images(picture_files * 2)
    assert together.shape == (10, loaded.width)
    assert torch.allclose(together.norm(dim=1), torch.ones(10), atol=1e-5)
    for row, path in zip(together, picture_files, strict=False):
        assert torch.allclose(loaded.embed_images([path])[0], row, atol=1e-5)
    assert torch.allclose(loaded.embed_images([read_image(picture_files[0])])[0], together[0], atol=1e-6)
    assert torch.equal(loaded.embed_images([picture_files[0].read_bytes()]), loaded.embed_images([picture_files[0]]))
    assert loaded.embed_images([]).shape == (0, loaded.width)


def test_classes_of_any_words_are_mean_vectors_of_sentences(model, picture_files):
    loaded = model("clip")
    labels = ["cat", "dog", "boat"]
    guesses = loaded.classify(picture_files[:2], labels)
    pictures = loaded.embed_images(picture_files[:2])
    for guess, picture in zip(guesses, pictures, strict=True):
        logits = []
        for label in labels:
            mean = loaded.embed([template.format(label) for template in TEMPLATES]).mean(0)
            logits.append(loaded.module.logits.scale.exp() * (picture @ (mean / mean.norm())))
        expected = torch.stack(logits).softmax(0)
        assert [one.label for one in guess] == [labels[i] for i in expected.argsort(descending=True)]
        for one in guess:
            assert one.probability == pytest.approx(float(expected[labels.index(one.label)]), abs=1e-5)


def test_siglips_probabilities_are_each_labels_alone(model, picture_files):
    loaded = model("siglip")
    one = {g.label: g.probability for g in loaded.classify(picture_files[:1], ["cat"])[0]}
    two = {g.label: g.probability for g in loaded.classify(picture_files[:1], ["cat", "dog"])[0]}
    assert one["cat"] == pytest.approx(two["cat"], rel=1e-4)
    assert torch.equal(loaded.embed("A Cat"), loaded.embed("a cat"))  # it was trained on small letters


def test_a_trained_head_has_its_own_classes(model, picture_files):
    loaded = model("vit")
    assert loaded.labels == ("cat", "dog", "گربه")
    (guesses,) = loaded.classify(picture_files[:1])
    assert sum(guess.probability for guess in guesses) == pytest.approx(1)
    (some,) = loaded.classify(picture_files[:1], ["dog", "cat"])
    assert {guess.label for guess in some} == {"dog", "cat"}
    with pytest.raises(UsageError, match="other classes than 'cow'"):
        loaded.classify(picture_files[:1], ["cow"])


def test_features(model, picture_files):
    loaded = model("dinov3")
    first, last = loaded.features(picture_files[0], [0, -1])
    assert (first.layer, last.layer) == (0, 1)
    assert first.patches.shape == (3, 3, 24)
    whole = loaded.module(torch.from_numpy(loaded.preprocessing.prepare(read_image(picture_files[0])))[None])[0]
    assert torch.allclose(last.cls, whole[0], atol=1e-5)
    assert torch.allclose(last.patches.flatten(0, 1), whole[3:], atol=1e-5)
    (sized,) = loaded.features(picture_files[0], size=48)
    assert sized.patches.shape == (6, 8, 24)  # 30 x 40 pixels keep their shape
    (without,) = model("siglip").features(picture_files[0])
    assert without.cls is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_of_fewer_bits_change_little(seeing_folders, picture_files, dtype):
    exact = load_images(seeing_folders["clip"], dtype="float32").embed_images(picture_files)
    rough = load_images(seeing_folders["clip"], dtype=dtype).embed_images(picture_files)
    assert ((exact * rough).sum(1) > 0.999).all()


def test_what_is_refused(model, seeing_folders, picture_files, tmp_path):
    clip = model("clip")
    for labels, match in (([], "no label"), (["a", "a"], "different words"), (["a", " "], "different words")):
        with pytest.raises(UsageError, match=match if labels else "different words"):
            clip.classify(picture_files[:1], labels)
    with pytest.raises(UsageError, match="once"):
        clip.classify(picture_files[:1], ["a"], ["a photo"])
    with pytest.raises(UsageError, match="no classes of its own"):
        clip.classify(picture_files[:1])
    with pytest.raises(ContextOverflow, match="more than"):
        clip.embed("a" * 60)
    with pytest.raises(UsageError, match="sees and reads no text"):
        model("dinov3").embed("cat")
    for layers, size, match in (([5], None, "no layer 5"), ([-3], None, "no layer -3"), ([0], 4, "4 pixels")):
        with pytest.raises(UsageError, match=match):
            clip.features(picture_files[0], layers, size=size)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FileFormatError, match="not a picture"):
        clip.embed_images([tmp_path / "text.png"])
    with pytest.raises(UsageError, match="uint8"):
        clip.embed_images([np.zeros((3, 3))])
    with pytest.raises(UsageError, match="sees pictures"):
        craton.load(seeing_folders["clip"])


def test_a_checkpoint_that_does_not_say_how_pictures_are_prepared(seeing_folders, tmp_path):
    import shutil

    shutil.copytree(seeing_folders["vit"], tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match="how pictures are prepared"):
        load_images(tmp_path / "bare")


def test_what_sees(seeing_folders, minilm_folder):
    assert sees(seeing_folders["dinov3"])
    assert not sees(minilm_folder)
    with pytest.raises(UsageError, match="makes no vectors"):
        load_images(minilm_folder)
