"""Segments of pictures: prompts, feedback, everything, files; with random weights, and with answers that are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import craton
from craton.checkpoints.families.sam import SAM
from craton.checkpoints.safetensors import write_safetensors
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, FileFormatError, UsageError
from craton.inference.segmentation import without_overlaps
from craton.inference.segmentation_files import SegmentFiles, read_logits
from craton.inference.segmentation_settings import EverythingSettings
from craton.modalities.image import decode_rle, encode_rle, read_image
from craton.modalities.image.longest_side import SquarePreparation
from craton.models import Segmenter, SegmenterConfig, VisionConfig
from craton.models.initialisation import initialise
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig

pytest.importorskip("PIL", reason="pictures need Pillow")

SIDE, PATCH = 64, 8
HEIGHT, WIDTH = 60, 100  # of the pictures; they take 38 x 64 of the square


def write_segmenter(folder, *, side=SIDE):
    """A small random model, saved as it is published."""
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=2, head_size=8, mask="full", bias=("q", "k", "v", "o")),
        feedforward=FeedForwardConfig(hidden=32, activation="gelu", bias=True),
        norm=NormConfig(kind="layer", eps=1e-6, bias=True),
    )
    trunk = TrunkConfig(width=16, layers=(layer,), final_norm=None)
    vision = VisionConfig(image=(side, side), patch=PATCH, trunk=trunk, class_token=False, pooling="mean")
    model = Segmenter(SegmenterConfig(vision=vision, width=16, heads=2, hidden=32, iou_hidden=16))
    initialise(model, 0)
    save_checkpoint(model, SAM, folder)
    preparation = SquarePreparation(side=SIDE, mask=SIDE // PATCH * 4)
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation.to_config()))
    return folder


def picture(height=HEIGHT, width=WIDTH):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture
def model(folder):
    return craton.load_segmenter(folder, dtype="float32")


@pytest.fixture
def knowing(model, monkeypatch):
    """A model that answers each point with the square of 20 pixels that it lies in, and knows those between 20 and 80
    across. Its three guesses are the square, its left half, and a mask that is unsure."""

    def decode(image_BCHW, points_BQ2, labels_BQ, boxes_B4, masks_B1HW, *, several):
        y, x = (torch.arange(32) + 0.5) * 2 / 0.64, (torch.arange(32) + 0.5) * 2 / 0.64
        logits, iou = [], []
        for at_x, at_y in points_BQ2[:, 0].div(0.64).tolist():
            left, top = at_x // 20 * 20, at_y // 20 * 20
            inside = ((x >= left) & (x < left + 20))[None] & ((y >= top) & (y < top + 20))[:, None]
            part = inside & (x < left + 10)[None]
            logits.append(torch.stack([inside * 20.0 - 10, part * 20.0 - 10, inside * 1.0 - 0.5]))
            iou.append([0.95, 0.7, 0.99] if 20 <= at_x < 80 else [0.1, 0.1, 0.1])
        return torch.stack(logits), torch.tensor(iou)

    monkeypatch.setattr(model.module, "decode", decode)
    return model


def test_segments_of_a_prompt(model):
    seen = model.look(picture())
    assert (seen.height, seen.width) == (HEIGHT, WIDTH)
    guesses = seen.segment([(30, 20)], several=True)
    assert len(guesses) == 3
    assert [one.predicted_iou for one in guesses] == sorted((one.predicted_iou for one in guesses), reverse=True)
    for one in guesses:
        assert one.mask.shape == (HEIGHT, WIDTH)
        assert one.mask.dtype == np.bool_
        assert one.logits.shape == model.module.config.mask_size == (32, 32)
        assert one.area == one.mask.sum()
        x0, y0, x1, y1 = one.box
        if one.area:
            assert one.mask[y0:y1, x0:x1].sum() == one.area
            assert all(line.any() for line in (one.mask[y0], one.mask[y1 - 1], one.mask[:, x0], one.mask[:, x1 - 1]))
        assert 0 <= one.stability <= 1
        assert np.array_equal(model.preparation.restore(one.logits[None], HEIGHT, WIDTH)[0] > 0, one.mask)
        said = one.annotation()
        assert np.array_equal(decode_rle(said["segmentation"]), one.mask)
        assert said["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    # A first point or box alone may mean several things: its one answer is the likeliest guess.
    (best,) = seen.segment([(30, 20)])
    assert best.rle == guesses[0].rle
    (boxed,) = seen.segment(box=(10, 10, 50, 40))
    assert boxed.rle == seen.segment(box=(10, 10, 50, 40), several=True)[0].rle
    # More than that has an answer of its own.
    (two,) = seen.segment([(30, 20), (5, 5)], [1, 0])
    assert all(
        not np.array_equal(two.logits, one.logits) for one in seen.segment([(30, 20), (5, 5)], [1, 0], several=True)
    )
    (again,) = seen.segment([(30, 20)], logits=best.logits)
    assert not np.allclose(again.logits, best.logits)
    (alone,) = seen.segment(logits=best.logits[None])
    assert alone.mask.shape == (HEIGHT, WIDTH)


def test_the_same_answer_from_a_file_from_bytes_and_in_another_number_format(folder, model, tmp_path):
    from craton.modalities.image import encode_png

    file = tmp_path / "picture.png"
    file.write_bytes(encode_png(picture()))
    expected = model.look(picture()).segment([(3, 50)])[0]
    assert model.look(file).segment([(3, 50)])[0].rle == expected.rle
    assert model.look(file.read_bytes()).segment([(3, 50)])[0].rle == expected.rle
    rough = craton.load_segmenter(folder, dtype="bfloat16").look(file).segment([(3, 50)])[0]
    assert np.abs(rough.logits - expected.logits).max() < 0.1 * np.abs(expected.logits).max()


def test_points_are_of_the_picture_as_it_is_shown(model, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.fromarray(np.rot90(picture())).save(tmp_path / "turned.png", exif=exif)
    seen = model.look(tmp_path / "turned.png")
    assert np.array_equal(seen.pixels, picture())
    assert seen.segment([(90, 10)])[0].rle == model.look(picture()).segment([(90, 10)])[0].rle


@pytest.mark.parametrize(("height", "width"), [(64, 64), (HEIGHT, WIDTH), (WIDTH, HEIGHT)])
def test_a_mirror_image_that_is_seen_as_well_makes_no_side_special(model, height, width):
    pixels = picture(height, width)
    one, other = (model.look(view, mirrored=True) for view in (pixels, pixels[:, ::-1].copy()))
    columns = -(-one._model.preparation.fitted(height, width)[1] // 2)  # of the logits that lie on the picture
    earlier = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    turned = np.zeros_like(earlier)
    turned[:, :columns], turned[:, columns:] = earlier[:, :columns][:, ::-1], earlier[:, :1]
    prompts = [
        ({"points": [(10, 20)]}, {"points": [(width - 11, 20)]}),
        ({"box": (5, 8, 40, 30)}, {"box": (width - 40, 8, width - 5, 30)}),
        ({"points": [(10, 20), (30, 9)], "labels": [1, 0], "box": (5, 8, 40, 30)},
         {"points": [(width - 11, 20), (width - 31, 9)], "labels": [1, 0], "box": (width - 40, 8, width - 5, 30)}),
        ({"points": [(10, 20)], "logits": earlier}, {"points": [(width - 11, 20)], "logits": turned}),
    ]  # fmt: skip
    for said, mirrored in prompts[: None if columns == 32 else 3]:
        (found,), (again,) = one.segment(**said), other.segment(**mirrored)
        np.testing.assert_allclose(found.logits[:, :columns], again.logits[:, :columns][:, ::-1], atol=1e-5)
        assert found.predicted_iou == pytest.approx(again.predicted_iou, abs=1e-5)
        (plain,) = model.look(pixels).segment(**said)
        assert not np.allclose(found.logits, plain.logits, atol=1e-5)


@pytest.mark.peer
def test_like_transformers_from_the_picture_to_the_mask(folder, model):
    transformers = pytest.importorskip("transformers")
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    theirs = transformers.SamModel.from_pretrained(folder).eval()
    processor = transformers.SamProcessor(SamImageProcessorPil.from_pretrained(folder))
    for shape, points, labels, box in (
        ((HEIGHT, WIDTH), [[30, 20], [5, 5]], [1, 0], None),
        ((90, 35), None, None, [3, 10, 30, 80]),
    ):
        pixels = picture(*shape)
        inputs = processor(
            pixels,
            input_points=None if points is None else [[points]],
            input_labels=None if labels is None else [[labels]],
            input_boxes=None if box is None else [[box]],
            return_tensors="pt",
        )
        with torch.no_grad():
            found = theirs(**inputs, multimask_output=True)
        sizes = (inputs["original_sizes"], inputs["reshaped_input_sizes"])
        masks = processor.post_process_masks(found.pred_masks, *sizes, binarize=False)[0][0].numpy()
        ours = model.look(pixels).segment(points, labels, box, several=True)
        order = np.argsort(-found.iou_scores[0, 0].numpy(), kind="stable")
        for one, m in zip(ours, order, strict=True):
            scale = float(found.pred_masks.abs().max())
            assert np.abs(one.logits - found.pred_masks[0, 0, m].numpy()).max() < 2e-4 * scale
            assert one.predicted_iou == pytest.approx(float(found.iou_scores[0, 0, m]), abs=1e-4)
            certain = np.abs(masks[m]) > 1e-3 * scale
            assert np.array_equal(one.mask[certain], masks[m][certain] > 0)


def test_everything(knowing):
    told = []
    seen = knowing.look(picture())
    found = seen.everything(EverythingSettings(points_per_side=10), lambda done, total: told.append((done, total)))
    # Nine squares between 20 and 80; the halves are not expected to fit, the unsure masks are not stable.
    assert len(found) == 9
    assert told == [(64, 100), (100, 100)]
    covered = sum(one.mask.astype(int) for one in found)
    assert covered.max() == 1
    assert covered[:, 24:76].mean() > 0.9
    assert not covered[:, :17].any()
    for one in found:
        assert one.predicted_iou == pytest.approx(0.95)
        assert one.stability == 1
        x, y = one.point
        assert one.mask[int(y), int(x)]
        assert one.annotation()["point_coords"] == [[x, y]]
    assert seen.everything(EverythingSettings(points_per_side=1)) != []
    assert seen.everything(EverythingSettings(points_per_side=2, min_iou=0.999)) == []
    unsure = seen.everything(EverythingSettings(points_per_side=2, min_stability=0))
    assert {one.stability for one in unsure} == {0.0}  # they are expected to fit best, and hide the stable ones
    with_halves = seen.everything(EverythingSettings(points_per_side=10, min_iou=0.6))
    assert len(with_halves) == 18


@given(
    st.lists(st.tuples(*[st.integers(0, 12)] * 4), max_size=12),
    st.randoms(use_true_random=False),
    st.sampled_from([0.0, 0.3, 0.7, 1.0]),
)
@settings(max_examples=80, deadline=None)
def test_of_overlapping_boxes_the_better_stays(sides, random, most):
    boxes = np.array([(x, y, x + w, y + h) for x, y, w, h in sides], float).reshape(-1, 4)
    scores = np.array([random.random() for _ in boxes])
    kept = without_overlaps(boxes, scores, most)

    def iou(a, b):
        shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
        union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared
        return shared / union if union else 0

    assert list(scores[kept]) == sorted(scores[kept], reverse=True)
    for n, i in enumerate(kept):
        assert all(iou(boxes[i], boxes[j]) <= most + 1e-9 for j in kept[:n])
    for i in set(range(len(boxes))) - set(kept):
        assert any(iou(boxes[i], boxes[j]) >= most - 1e-9 and scores[j] >= scores[i] for j in kept)


def test_files(model, tmp_path):
    seen = model.look(picture())
    guesses = seen.segment([(30, 20)], several=True)
    files = SegmentFiles.of("some/cat.jpg", tmp_path / "out", logits=True)
    drawing = seen.draw(guesses, [(30, 20)], [1], spotlight=True)
    written = files.write(seen, guesses, drawing)
    names = ["cat-1.png", "cat-2.png", "cat-3.png", "cat-drawing.png", "cat-logits.safetensors", "cat.json"]
    assert [path.name for path in written] == names
    document = json.loads((tmp_path / "out" / "cat.json").read_text())
    assert document["image"] == {"file_name": "cat.jpg", "height": HEIGHT, "width": WIDTH}
    for number, (one, said) in enumerate(zip(guesses, document["annotations"], strict=True), 1):
        mask = read_image(tmp_path / "out" / said["file_name"])
        assert np.array_equal(mask[..., 0], one.mask * np.uint8(255))
        assert said["id"] == number
        assert said["segmentation"] == encode_rle(one.mask)
    assert np.array_equal(read_logits(tmp_path / "out" / "cat-logits.safetensors"), guesses[0].logits)
    np.save(tmp_path / "one.npy", guesses[1].logits.astype(np.float64))
    assert np.array_equal(read_logits(tmp_path / "one.npy"), guesses[1].logits)
    with pytest.raises(UsageError, match="exists already"):
        SegmentFiles.of("cat.png", tmp_path / "out")
    (tmp_path / "new").mkdir()
    fresh = SegmentFiles.of("cat.png", tmp_path / "new")
    (tmp_path / "new" / "cat-2.png").write_text("mine")
    with pytest.raises(UsageError, match=r"cat-2\.png exists already"):
        fresh.write(seen, guesses, drawing)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cat-2.png"]


def test_files_of_earlier_masks_that_are_refused(tmp_path):
    for name, array in (("three.npy", np.zeros((3, 4, 4))), ("whole.npy", np.zeros((4, 4), int))):
        np.save(tmp_path / name, array)
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "mask.png").write_text("")
    write_safetensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "bad.safetensors").write_text("no tensors")
    for name, match, kind in (
        ("three.npy", "3 masks", UsageError),
        ("whole.npy", "no floating-point", FileFormatError),
        ("text.npy", "no array", FileFormatError),
        ("objects.npy", "no array", FileFormatError),
        ("mask.png", "does not end with", UsageError),
        ("other.safetensors", "no tensor 'logits'", UsageError),
        ("bad.safetensors", "safetensors", FileFormatError),
        ("missing.npy", "no such file", UsageError),
    ):
        with pytest.raises(kind, match=match):
            read_logits(tmp_path / name)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ({}, "nothing says"),
        ({"points": []}, "nothing says"),
        ({"points": [(100, 3)]}, "outside the picture"),
        ({"points": [(3, -1)]}, "outside the picture"),
        ({"points": [(np.nan, 3)]}, "outside the picture"),
        ({"points": [(1, 2, 3)]}, r"\(x, y\)"),
        ({"points": [(1, 2)], "labels": [1, 0]}, "for 1 points"),
        ({"points": [(1, 2)], "labels": [2]}, "labels"),
        ({"labels": [1]}, "without points"),
        ({"box": (5, 5, 5, 9)}, "no area"),
        ({"box": (9, 5, 5, 9)}, "swapped"),
        ({"box": (5, 5, 101, 9)}, "out of the picture"),
        ({"box": (-1, 5, 10, 9)}, "out of the picture"),
        ({"box": (5, 5, 9)}, "four numbers"),
        ({"box": (5, 5, 9, np.inf)}, "four numbers"),
        ({"logits": np.zeros((16, 16), np.float32)}, "earlier mask"),
        ({"logits": np.full((32, 32), np.nan, np.float32)}, "NaN"),
    ],
)
def test_prompts_that_are_refused(model, prompt, match):
    with pytest.raises(UsageError, match=match) as refused:
        model.look(picture()).segment(**prompt)
    assert refused.value.exit_status == 2


def test_models_and_pictures_that_are_refused(model, seeing_folders, tmp_path):
    with pytest.raises(UsageError, match="segments nothing"):
        craton.load_segmenter(seeing_folders["vit"])
    write_segmenter(tmp_path, side=32)
    with pytest.raises(CheckpointError, match="sides of 64, and the model sees 32"):
        craton.load_segmenter(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(FileFormatError):
        model.look(tmp_path / "text.png")
    with pytest.raises(UsageError, match="uint8"):
        model.look(np.zeros((3, 3)))
