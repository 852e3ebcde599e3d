"""Pictures in pieces: against the published processors, pixels and text."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import CheckpointError
from craton.modalities.image import Grid, ImageSplitting, read_splitting, splitting_from_hf

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")

OPTIONS = {
    "smolvlm": {"size": {"longest_edge": 200}, "max_image_size": {"longest_edge": 50}},
    "not a multiple": {"size": {"longest_edge": 97}, "max_image_size": {"longest_edge": 32}},
    "one tile": {"size": {"longest_edge": 31}, "max_image_size": {"longest_edge": 32}},
    "whole": {"do_image_splitting": False, "size": {"longest_edge": 97}, "max_image_size": {"longest_edge": 32}},
    "as published": {},
    "other numbers": {
        "size": {"longest_edge": 128},
        "max_image_size": {"longest_edge": 64},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "rescale_factor": 0.01,
    },
}
SHAPES = [(40, 100), (300, 299), (64, 64), (7, 5), (1, 90), (90, 1), (333, 120)]


def picture(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def processor(family, **options):
    pytest.importorskip("transformers")
    from importlib import import_module

    kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[family]
    module = import_module(f"transformers.models.{family}.image_processing_pil_{family}")
    return getattr(module, f"{kind}ImageProcessorPil")(**options)


def same(ours, theirs, pixels):
    reference = theirs(Image.fromarray(pixels), return_tensors="np", return_row_col_info=True)
    grid = ours.grid(*pixels.shape[:2])
    prepared = ours.prepare(pixels)
    assert grid == (reference["rows"][0][0], reference["cols"][0][0])
    assert prepared.dtype == np.float32
    assert prepared.shape == reference["pixel_values"][0].shape
    assert len(prepared) == grid.tiles
    assert reference["pixel_attention_mask"].all()
    assert np.abs(prepared - reference["pixel_values"][0]).max() < 1e-5


@pytest.mark.peer
@pytest.mark.parametrize("family", ["idefics3", "smolvlm"])
@pytest.mark.parametrize("name", OPTIONS)
def test_like_the_published_processors_and_back(family, name, tmp_path):
    theirs = processor(family, **OPTIONS[name])
    theirs.save_pretrained(tmp_path)
    ours = read_splitting(tmp_path)
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "preprocessor_config.json").write_text(json.dumps(ours.to_hf()))
    back = type(processor("idefics3")).from_pretrained(tmp_path / "back")
    for shape in SHAPES[:2] if name == "as published" else SHAPES:
        same(ours, theirs, picture(shape))
        same(ours, back, picture(shape))


@pytest.mark.peer
@given(height=st.integers(1, 120), width=st.integers(1, 120), longest=st.integers(1, 90), tile=st.integers(8, 40))
@settings(max_examples=80, deadline=None)
def test_any_size_like_the_published_processor(height, width, longest, tile):
    theirs = processor("idefics3", size={"longest_edge": longest}, max_image_size={"longest_edge": tile})
    ours = splitting_from_hf(
        {
            "image_processor_type": "Idefics3ImageProcessorFast",
            "size": {"longest_edge": longest},
            "max_image_size": {"longest_edge": tile},
        },
        "here",
    )
    same(ours, theirs, picture((height, width)))


@pytest.mark.peer
def test_the_text_like_the_published_processor():
    processing = pytest.importorskip("transformers.models.idefics3.processing_idefics3")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters)
    images = processor("idefics3", size={"longest_edge": 100}, max_image_size={"longest_edge": 32})
    theirs = processing.Idefics3Processor(images, tokenizer, image_seq_len=5)
    ours = splitting_from_hf(json.loads(images.to_json_string()), "here")
    shapes = [(40, 100), (20, 20), (100, 7), (300, 299)]
    read = theirs(
        images=[Image.fromarray(picture(s)) for s in shapes], text="".join(f"a{i} <image>\n" for i in range(4))
    )
    expected = "".join(f"a{i} {ours.grid(*shape).text(5)}\n" for i, shape in enumerate(shapes))
    assert tokenizer.decode(read["input_ids"][0]) == expected

    whole = processing.Idefics3Processor(
        processor("idefics3", do_image_splitting=False, max_image_size={"longest_edge": 32}), tokenizer, image_seq_len=2
    )
    read = whole(images=[Image.fromarray(picture((40, 100)))], text="<image>")
    assert tokenizer.decode(read["input_ids"][0]) == Grid(0, 0).text(2)


@pytest.mark.peer
@pytest.mark.parametrize("grid", [Grid(0, 0), Grid(1, 2), Grid(3, 1), Grid(4, 4)])
def test_the_text_of_smolvlm(grid):
    module = pytest.importorskip("transformers.models.smolvlm.processing_smolvlm")
    theirs = module.get_image_prompt_string(*grid, 4, "<fake_token_around_image>", "<image>", "<global-img>")
    assert grid.text(4) == theirs


def test_the_text_by_hand():
    around = "<fake_token_around_image>"
    assert Grid(0, 0).text(2) == f"{around}<global-img><image><image>{around}"
    assert Grid(2, 1).text(1) == (
        f"{around}<row_1_col_1><image>\n{around}<row_2_col_1><image>\n\n{around}<global-img><image>{around}"
    )


@given(rows=st.integers(1, 8), columns=st.integers(1, 8), tokens=st.integers(1, 9))
def test_the_text_has_a_place_for_every_vector(rows, columns, tokens):
    grid = Grid(rows, columns)
    assert grid.text(tokens).count("<image>") == tokens * grid.tiles


def test_tiles_lie_where_they_were():
    # Four quarters of one colour each, and no resizing but to the size they have.
    pixels = np.kron(np.array([[10, 90], [170, 250]], np.uint8), np.ones((16, 16), np.uint8))
    ours = ImageSplitting(longest=32, tile=16)
    ours = ours.model_copy(update={"whole": ours.whole.resized_to(16, 16)})
    prepared = ours.prepare(np.repeat(pixels[..., None], 3, 2))
    assert prepared.shape == (5, 3, 16, 16)
    means = (prepared[:4].mean((1, 2, 3)) + 1) * 127.5
    assert np.abs(means - [10, 90, 170, 250]).max() < 1e-3


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "'CLIP', which does not cut"),
        ({"image_processor_type": None}, "'nobody'"),
        ({"size": {"height": 100, "width": 100}}, "'size'"),
        ({"size": {"longest_edge": 8192}}, "1 to 4096"),
        ({"size": {"longest_edge": "large"}}, "'size'"),
        ({"max_image_size": 364}, "'max_image_size'"),
        ({"max_image_size": {"longest_edge": 0}}, "'max_image_size'"),
        ({"max_image_size": {"longest_edge": 64, "shortest_edge": 9}}, "'max_image_size'"),
        ({"do_resize": False}, "cannot be cut"),
        ({"do_flip": True}, "'do_flip' is not known"),
        ({"do_center_crop": True, "crop_size": 40}, "not cropped"),
        ({"image_mean": [0.5], "image_std": [0.5]}, "three colours"),
        ({"resample": 9}, "'resample'"),
    ],
)
def test_what_is_not_known_is_refused(changes, match):
    with pytest.raises(CheckpointError, match=match):
        splitting_from_hf({"image_processor_type": "Idefics3ImageProcessor"} | changes, "here")


def test_the_file_of_smolvlm_2_names_films_too():
    values = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 2048},
        "max_image_size": {"longest_edge": 512},
        "video_sampling": {"fps": 1, "max_frames": 64},
    }
    found = splitting_from_hf(values, "here")
    assert (found.longest, found.tile, found.split) == (2048, 512, True)
    assert splitting_from_hf(found.to_hf(), "here") == found


def test_a_checkpoint_that_says_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="does not say"):
        read_splitting(tmp_path)
