"""How pictures are prepared: against the published processors, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import CheckpointError, UsageError
from craton.modalities.image import ImagePreprocessing, from_hf, read_preprocessing

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

PROCESSORS = {
    "clip": ("clip", "CLIPImageProcessorPil", {}),
    "clip, odd": (
        "clip",
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 41, "width": 44}},
    ),
    "siglip": ("siglip", "SiglipImageProcessorPil", {}),
    "dinov2": ("bit", "BitImageProcessorPil", {"size": {"shortest_edge": 256}}),
    "vit": ("vit", "ViTImageProcessorPil", {"image_mean": [0.1, 0.2, 0.3]}),
    "vit, unnormalised": ("vit", "ViTImageProcessorPil", {"do_normalize": False, "resample": 0}),
    "siglip 2": ("siglip", "SiglipImageProcessorPil", {"size": {"height": 31, "width": 18}, "resample": 2}),
    "clip, box": (
        "clip",
        "CLIPImageProcessorPil",
        {"size": {"height": 40, "width": 31}, "resample": 4, "do_center_crop": False},
    ),
    "clip, hamming": (
        "clip",
        "CLIPImageProcessorPil",
        {"size": {"shortest_edge": 9}, "resample": 5, "rescale_factor": 0.02},
    ),
    "dinov2, lanczos": ("bit", "BitImageProcessorPil", {"resample": 1, "crop_size": {"height": 8, "width": 300}}),
    "vit, untouched": ("vit", "ViTImageProcessorPil", {"do_resize": False, "do_rescale": False}),
}
SHAPES = [(50, 333), (300, 299), (7, 5), (640, 480), (1, 1), (1, 40)]


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def processor(name):
    pytest.importorskip("transformers")
    from importlib import import_module

    module, kind, options = PROCESSORS[name]
    found = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    return getattr(found, kind)(**options)


@pytest.mark.peer
@pytest.mark.parametrize("name", PROCESSORS)
def test_like_the_published_processors_and_back(name, tmp_path):
    theirs = processor(name)
    theirs.save_pretrained(tmp_path)
    ours = read_preprocessing(tmp_path)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    back = CLIPImageProcessorPil.from_pretrained(tmp_path / "back")
    for shape in SHAPES:
        pixels = picture(shape)
        reference = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        scale = max(1.0, np.abs(reference).max())
        prepared = ours.prepare(pixels)
        assert prepared.shape == reference.shape
        assert np.abs(prepared - reference).max() < 1e-5 * scale
        again = back(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        assert np.abs(again - reference).max() < 1e-5 * scale


@pytest.mark.peer
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    size=st.integers(1, 40),
    rows=st.integers(1, 50),
    columns=st.integers(1, 50),
)
@settings(max_examples=60, deadline=None)
def test_crops_like_the_published_processor(height, width, size, rows, columns):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    options = {"size": {"shortest_edge": size}, "crop_size": {"height": rows, "width": columns}}
    pixels = picture((height, width))
    reference = module.CLIPImageProcessorPil(**options)(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    prepared = from_hf({"image_processor_type": "CLIPImageProcessor"} | options, "here").prepare(pixels)
    assert np.abs(prepared - reference).max() < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_dinov3_resizes_numbers_that_are_not_rounded(shape):
    # Its published processor needs torchvision; this is what it asks of torch.
    torch = pytest.importorskip("torch")
    ours = from_hf({"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 64, "width": 48}}, "here")
    pixels = picture(shape)
    numbers = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    resized = torch.nn.functional.interpolate(numbers, (64, 48), mode="bilinear", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (ours.mean, ours.std))
    assert np.abs(ours.prepare(pixels) - ((resized - mean) / std)[0].numpy()).max() < 1e-5


def test_luminance():
    grey = ImagePreprocessing.square(14, (0.5,), (0.25,), channels=1)
    assert grey.prepare(picture((28, 40))).shape == (1, 14, 14)
    assert from_hf(grey.to_hf(), "here") == grey
    flat = np.full((28, 28, 3), 255, np.uint8)
    assert np.allclose(grey.prepare(flat), 2.0, atol=1e-6)


def test_grey_pictures_are_three_equal_colours():
    grey = np.repeat(picture((30, 20))[..., :1], 3, 2)
    prepared = ImagePreprocessing(size=(12, 12)).prepare(grey)
    assert (prepared == prepared[:1]).all()


def test_resized_to_other_sides_without_a_crop():
    chosen = ImagePreprocessing.square(14, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    other = chosen.resized_to(28, 42)
    assert other.prepare(picture((33, 50))).shape == (3, 28, 42)
    assert (other.mean, other.std, other.filter) == (chosen.mean, chosen.std, chosen.filter)
    plain = ImagePreprocessing(size=(28, 42), mean=chosen.mean, std=chosen.std)
    assert (other.prepare(picture((33, 50))) == plain.prepare(picture((33, 50)))).all()


def test_a_picture_is_not_changed_by_being_prepared():
    pixels = picture((20, 20))
    pixels.flags.writeable = False
    for chosen in (ImagePreprocessing(size=(20, 20)), ImagePreprocessing(resize="no", floating=True)):
        prepared = chosen.prepare(pixels)
        assert prepared.flags.writeable
        assert not np.shares_memory(prepared, pixels)


def test_several_at_once():
    pictures = [picture((20, 30), seed) for seed in range(3)]
    chosen = ImagePreprocessing.square(9)
    together = chosen.prepare_all(pictures)
    assert together.shape == (3, 3, 9, 9)
    assert all((together[i] == chosen.prepare(one)).all() for i, one in enumerate(pictures))


def test_a_line_does_not_become_gigabytes():
    with pytest.raises(UsageError, match="would be resized to 224 x 7,340,032"):
        ImagePreprocessing.square(224).prepare(np.zeros((32_768, 1, 3), np.uint8))


@given(height=st.integers(1, 70), width=st.integers(1, 70), size=st.integers(1, 40), crop=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_every_picture_comes_out_at_the_size_of_the_crop(height, width, size, crop):
    chosen = ImagePreprocessing(size=(size, size), resize="shorter", crop=(crop, crop))
    prepared = chosen.prepare(picture((height, width)))
    assert prepared.shape == (3, crop, crop)
    assert np.isfinite(prepared).all()


def test_pictures_that_stay_of_different_sizes_cannot_be_read_together():
    chosen = ImagePreprocessing(size=(8, 8), resize="shorter")
    with pytest.raises(UsageError, match="different sizes"):
        chosen.prepare_all([picture((10, 20)), picture((20, 20))])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_processor_type": "FuyuImageProcessor"}, "'Fuyu'"),
        ({"image_processor_type": None}, "'nobody'"),
        ({"do_flip": True}, "'do_flip' is not known"),
        ({"do_pad": True}, "'do_pad' is not known"),
        ({"size": {"longest_edge": 100}}, "'size'"),
        ({"size": -4}, "'size'"),
        ({"resample": 9}, "'resample'"),
        ({"image_mean": [0.5, 0.5]}, "'image_mean'"),
        ({"crop_size": "small", "do_center_crop": True}, "'crop_size'"),
        ({"resample": 2.0}, "'resample'"),
        ({"resample": "bicubic"}, "'resample'"),
        ({"rescale_factor": "1/255"}, "'rescale_factor'"),
        ({"rescale_factor": 0}, "'rescale_factor'"),
        ({"image_mean": "grey"}, "'image_mean'"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, "'image_mean'"),
        ({"image_std": [0.5, 0.0, 0.5]}, "'image_std'"),
        ({"image_std": [0.5]}, "'image_std'"),
    ],
)
def test_what_is_not_known_is_refused(changes, match):
    with pytest.raises(CheckpointError, match=match):
        from_hf({"image_processor_type": "ViTImageProcessor"} | changes, "here")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["height", "width", "shortest_edge", "longest_edge"]), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = [
    "size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "do_normalize", "rescale_factor",
    "image_mean", "image_std", "do_pad", "do_convert_rgb", "data_format",
]  # fmt: skip


@given(
    kind=st.sampled_from(["ViT", "CLIP", "Siglip", "Bit", "DINOv3ViT"]),
    values=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_any_file_is_refused_in_words_or_understood(kind, values):
    try:
        found = from_hf({"image_processor_type": f"{kind}ImageProcessor"} | values, "here")
    except CheckpointError:
        return
    assert from_hf(found.to_hf(), "here").prepare(picture((3, 4))).shape == found.prepare(picture((3, 4))).shape


def test_a_processor_inside_another_file(tmp_path):
    values = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X", "image_processor": values}))
    assert read_preprocessing(tmp_path) == from_hf(values, "here")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | {"size": {"height": 16, "width": 16}}))
    assert read_preprocessing(tmp_path).size == (16, 16)


def test_a_checkpoint_that_says_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="does not say"):
        read_preprocessing(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_preprocessing(tmp_path)


def test_older_spellings():
    old = from_hf({"feature_extractor_type": "CLIPFeatureExtractor", "size": 96, "crop_size": 80}, "here")
    assert (old.resize, old.size, old.crop) == ("shorter", (96, 96), (80, 80))
    square = from_hf({"feature_extractor_type": "ViTFeatureExtractor", "size": 96}, "here")
    assert (square.resize, square.size, square.crop) == ("exactly", (96, 96), None)
