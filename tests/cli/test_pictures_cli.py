"""`craton classify`, `search`, `features`, `embed` and `show` with models that see, as a user meets them."""

from __future__ import annotations

import json
import os

import pytest

from craton.checkpoints.safetensors import SafetensorsFile
from craton.modalities.image import encode_png, read_image


def test_classify(craton, seeing_folders, picture_files):
    status, out, err = craton("classify", *picture_files[:2], "--model", seeing_folders["clip"], "--labels", "cat, dog")
    assert status == 0
    assert out.count("cat") == out.count("dog") == 2
    assert "%" in out
    assert "float32" in err
    status, out, err = craton("classify", picture_files[0], "--model", seeing_folders["vit"], "--top", "1", "--json")
    document = json.loads(out)
    assert (status, err) == (0, "")
    assert len(document["images"][0]["classes"]) == 1


def test_search_by_text_and_by_picture(craton, seeing_folders, picture_files):
    folder = picture_files[0].parent
    arguments = ("search", folder, "--model", seeing_folders["clip"], "--json")
    first = json.loads(craton(*arguments, "--like", picture_files[3])[1])
    assert (first["pictures"], first["added"], first["removed"]) == (5, 5, 0)
    assert first["hits"][0]["path"] == str(picture_files[3])
    assert first["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    second = json.loads(craton("search", folder, "a cat", *arguments[2:])[1])
    assert (second["added"], len(second["hits"])) == (0, 5)
    # One goes, one changes, one comes, one is no picture.
    picture_files[0].unlink()
    picture_files[1].write_bytes(encode_png(read_image(picture_files[3])))
    os.utime(picture_files[1], ns=(0, 1))
    (folder / "new.png").write_bytes(encode_png(read_image(picture_files[4])))
    (folder / "bad.png").write_text("no picture")
    third = json.loads(craton(*arguments, "--like", picture_files[3])[1])
    assert (third["pictures"], third["added"], third["removed"]) == (5, 2, 2)
    assert [bad["path"] for bad in third["unreadable"]] == [str(folder / "bad.png")]
    assert {hit["path"] for hit in third["hits"][:2]} == {str(picture_files[3]), str(picture_files[1])}
    assert str(picture_files[0]) not in {hit["path"] for hit in third["hits"]}
    status, out, err = craton("search", folder, "a cat", "--model", seeing_folders["clip"], "-k", "2")
    assert (status, len(out.splitlines())) == (0, 2)
    assert "left out" in err


def test_features(craton, seeing_folders, picture_files, tmp_path):
    out_file, pca = tmp_path / "f.safetensors", tmp_path / "f.png"
    arguments = ("--size", "48", "--layers", "0,-1", "--out", out_file, "--pca", pca)
    status, out, _ = craton("features", picture_files[0], "--model", seeing_folders["dinov3"], *arguments)
    assert status == 0
    assert "6 x 8 patches of 24 numbers, layers 0, 1" in out
    file = SafetensorsFile.open(out_file)
    assert file.tensor("layers.0.patches").shape == (6, 8, 24)
    assert file.tensor("layers.1.cls").shape == (24,)
    assert read_image(pca).shape == (48, 64, 3)
    status, _, err = craton("features", picture_files[0], "--model", seeing_folders["dinov3"], "--pca", pca)
    assert status == 2
    assert "exists already" in err


def test_embed(craton, seeing_folders, picture_files):
    document = json.loads(craton("embed", *picture_files[:2], "--model", seeing_folders["dinov3"], "--json")[1])
    assert (document["width"], len(document["vectors"])) == (24, 2)
    both = seeing_folders["clip"]
    texts = json.loads(craton("embed", "a cat", "--model", both, "--json")[1])
    pictures = json.loads(craton("embed", picture_files[0], "--images", "--model", both, "--json")[1])
    assert texts["width"] == pictures["width"] == 16


def test_show_and_export(craton, seeing_folders, tmp_path):
    status, out, _ = craton("show", seeing_folders["vit"])
    assert status == 0
    assert "24 x 24 pixels, patches of 8" in out
    assert "cat, dog" in out
    assert "50" in craton("show", seeing_folders["siglip"])[1]
    for name in ("vit", "clip"):
        assert craton("export", seeing_folders[name], tmp_path / name)[0] == 0
        assert (tmp_path / name / "preprocessor_config.json").is_file()
        assert (tmp_path / name / "tokenizer.json").is_file() == (name == "clip")
    status, _, err = craton("export", seeing_folders["vit"], tmp_path / "vit.gguf")
    assert status == 2
    assert "sees pictures" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("classify", "--model", "clip"), "nothing to classify"),
        (("classify", "missing.png", "--model", "clip"), "missing.png"),
        (("classify", "PICTURE", "--model", "clip"), "no classes of its own"),
        (("classify", "PICTURE", "--model", "clip", "--labels", "a", "--top", "0"), "--top"),
        (("classify", "PICTURE", "--model", "clip", "--labels", "a", "--template", "photo"), "once"),
        (("search", "FOLDER", "--model", "clip"), "what to look for"),
        (("search", "nowhere", "cat", "--model", "clip"), "no such folder"),
        (("search", "FOLDER", "cat", "--model", "dinov3"), "reads no text"),
        (("features", "PICTURE", "--model", "dinov3", "--layers", "last"), "--layers"),
        (("features", "PICTURE", "--model", "dinov3", "--layers", "9"), "no layer 9"),
        (("features", "PICTURE", "--model", "dinov3", "--out", "f.txt"), "does not end with"),
        (("generate", "Hi", "--model", "vit"), "sees pictures"),
        (("quantize", "vit", "--name", "n"), "not whole groups"),
        (("prune", "vit", "--name", "n"), "judged by pictures"),
    ],
)
def test_wrong_use(craton, seeing_folders, picture_files, arguments, match):
    places = {"PICTURE": picture_files[0], "FOLDER": picture_files[0].parent} | seeing_folders
    status, out, err = craton(*(places.get(word, word) for word in arguments))
    assert (status, out) == (2, "")
    assert match in err.replace("\n", " ")
