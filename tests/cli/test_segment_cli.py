"""`craton segment`, as a user meets it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tests.inference.test_segmentation import HEIGHT, WIDTH, picture, write_segmenter

from craton.modalities.image import decode_rle, encode_png, read_image


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture
def file(tmp_path):
    pytest.importorskip("PIL", reason="pictures need Pillow")
    path = tmp_path / "گربه cat.png"
    path.write_bytes(encode_png(picture()))
    return path


def test_clicks(craton, model, file, tmp_path):
    out = tmp_path / "out"
    clicks = ("--points", "30,20", "--points", "5,5,out", "--box", "10,10,60,50")
    status, said, err = craton("segment", file, "-m", model, *clicks, "--out", out)
    assert status == 0, err
    assert "expected IoU" in said
    assert "float32" in err
    names = ["گربه cat-1.png", "گربه cat-drawing.png", "گربه cat.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(str(out / name) in said for name in names)
    mask = read_image(out / names[0])
    assert mask.shape == (HEIGHT, WIDTH, 3)
    assert set(np.unique(mask)) <= {0, 255}
    (annotation,) = json.loads((out / names[2]).read_text())["annotations"]
    assert np.array_equal(decode_rle(annotation["segmentation"]), mask[..., 0] == 255)
    assert read_image(out / names[1]).shape == (HEIGHT * 6, WIDTH * 6, 3)
    status, said, err = craton("segment", file, "-m", model, *clicks, "--out", out)
    assert (status, said) == (2, "")
    assert "exists already" in err


def test_several_guesses_and_a_better_one(craton, model, file, tmp_path):
    several = ("--points", "30,20", "--several", "--keep-logits", "--out", tmp_path / "first", "--json")
    status, said, err = craton("segment", file, "-m", model, *several)
    assert (status, err) == (0, "")
    document = json.loads(said)
    assert document["image"] == {"file_name": str(file), "height": HEIGHT, "width": WIDTH}
    assert len(document["annotations"]) == 3
    assert read_image(tmp_path / "first" / f"{file.stem}-drawing.png").shape == (HEIGHT * 6, WIDTH * 6 * 3 + 24, 3)
    logits = tmp_path / "first" / f"{file.stem}-logits.safetensors"
    assert str(logits) in document["files"]
    status, said, _ = craton("segment", file, "-m", model, "--points", "30,20", "--mask", logits, "--json")
    assert status == 0
    (again,) = json.loads(said)["annotations"]
    assert again["predicted_iou"] != document["annotations"][0]["predicted_iou"]


def test_everything(craton, model, file, tmp_path):
    arguments = ("segment", file, "-m", model, "--everything", "--points-per-side", "4")
    loose = ("--min-iou", "0", "--min-stability", "0", "--keep-logits", "--out", tmp_path, "--json")
    status, said, err = craton(*arguments, *loose)
    assert (status, err) == (0, "")
    found = json.loads(said)["annotations"]
    assert all(1 <= len(one["point_coords"][0]) <= 2 for one in found)
    assert len(json.loads((tmp_path / f"{file.stem}.json").read_text())["annotations"]) == len(found)
    status, said, _ = craton(*arguments, "--min-iou", "1", "--min-stability", "1")
    assert status == 0
    assert "nothing that is certain enough" in said


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((), "nothing says what to segment"),
        (("--points", "30"), "X,Y"),
        (("--points", "30,b"), "X,Y"),
        (("--points", "30,20,no"), "X,Y"),
        (("--points", "1000,20"), "outside the picture"),
        (("--points=-3,20",), "outside the picture"),
        (("--box", "1,2,3"), "X0,Y0,X1,Y1"),
        (("--box", "30,20,10,40"), "swapped"),
        (("--box", "30,20,30,40"), "no area"),
        (("--points", "3,2", "--mask", "missing.npy"), "missing.npy"),
        (("--everything", "--points", "3,2"), "--everything takes no"),
        (("--everything", "--several"), "--everything takes no"),
        (("--everything", "--min-iou", "3"), "min_iou"),
        (("--points", "3,2", "--min-iou", "0.5"), "--min-iou is of --everything"),
        (("--points", "3,2", "--keep-logits"), "--out"),
    ],
)
def test_wrong_use(craton, model, file, arguments, match):
    status, out, err = craton("segment", file, "--model", model, *arguments)
    assert (status, out) == (2, "")
    assert match in err.replace("\n", " ")


def test_what_is_no_picture_no_segmenter_and_a_mask_of_another_size(craton, model, file, seeing_folders, tmp_path):
    np.save(tmp_path / "small.npy", np.zeros((4, 4), np.float32))
    (tmp_path / "text.png").write_text("no picture")
    for image, name, arguments, match in (
        (file, seeing_folders["clip"], ("--points", "1,1"), "segments nothing"),
        (file, model, ("--mask", tmp_path / "small.npy"), "[32, 32]"),
        (tmp_path / "text.png", "nowhere", ("--points", "1,1"), "not a picture"),
        (tmp_path / "missing.png", "nowhere", ("--points", "1,1"), "cannot be read"),
    ):
        status, out, err = craton("segment", image, "--model", name, *arguments)
        assert (status, out) == (2, "")
        assert match in err.replace("\n", " ")
