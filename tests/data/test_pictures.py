"""Pictures for training: where they come from, what forms a step, how chance changes them."""

from __future__ import annotations

import gzip
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data.augmentation import AugmentSettings
from craton.data.idx import read_idx
from craton.data.picture_batches import PictureLoader, augmented
from craton.data.pictures import PictureSet, read_pictures
from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.image import encode_png

pytest.importorskip("PIL", reason="pictures need Pillow")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def some(count: int = 12, side: int = 8, channels: int = 3) -> PictureSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return PictureSet(pixels, np.arange(count) % 3, ("a", "b", "c"), None, tuple(map(str, range(count))))


def loader(pictures: PictureSet, **options) -> PictureLoader:
    chosen = {"batch": 5, "micro": 2, "patch": 4, "mean": (0.5,) * 3, "std": (0.5,) * 3, "seed": 1} | options
    return PictureLoader(pictures, **chosen)


class TestReading:
    def test_folders_are_classes(self, tmp_path):
        for name, shade in (("cat", 10), ("dog", 200), ("dog", 210)):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{shade}.png").write_bytes(encode_png(np.full((9, 12, 3), shade, np.uint8)))
        found = read_pictures([str(tmp_path)], size=6)
        assert found.names == ("cat", "dog")
        assert found.labels.tolist() == [0, 1, 1]
        assert found.pixels.shape == (3, 6, 6, 3)
        assert found.pixels[:, 0, 0, 0].tolist() == [10, 200, 210]
        assert read_pictures([str(tmp_path / "dog")], size=6, channels=1).labels is None

    def test_tables_with_labels_and_captions(self, tmp_path):
        (tmp_path / "p.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
        rows = [{"image": "p.png", "label": name, "caption": f"a {name}"} for name in ("x", "y", "x")]
        table = tmp_path / "t.jsonl"
        table.write_text("\n".join(map(json.dumps, rows)))
        found = read_pictures([str(table)], size=4)
        assert (found.names, found.captions) == (("x", "y"), ("a x", "a y", "a x"))
        again = read_pictures([str(table)], size=4, names=("y", "x", "z"))
        assert again.labels.tolist() == [1, 0, 1]
        with pytest.raises(DataError, match="'x' is not among"):
            read_pictures([str(table)], size=4, names=("y",))

    @pytest.mark.parametrize("packed", [False, True])
    def test_idx_files_with_their_labels(self, tmp_path, packed):
        pictures = np.random.default_rng(0).integers(0, 256, (5, 7, 7), dtype=np.uint8)
        suffix = ".gz" if packed else ""
        for name, array in (
            ("train-images-idx3-ubyte", pictures),
            ("train-labels-idx1-ubyte", np.arange(5, dtype=np.uint8)),
        ):
            data = idx(array)
            (tmp_path / (name + suffix)).write_bytes(gzip.compress(data) if packed else data)
        found = read_pictures([str(tmp_path / f"train-images-idx3-ubyte{suffix}")], size=7, channels=1)
        assert (found.pixels[..., 0] == pictures).all()
        assert found.labels.tolist() == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(
        ("row", "match"),
        [
            ({"label": "x"}, "names its file"),
            ({"image": "p.png", "caption": 3}, "a caption"),
            ({"image": "p.png"}, "no label"),
        ],
    )
    def test_records_that_do_not_fit(self, tmp_path, row, match):
        (tmp_path / "p.png").write_bytes(encode_png(np.zeros((4, 4, 3), np.uint8)))
        rows = [{"image": "p.png", "label": "a"}, row]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with pytest.raises(DataError, match=match) as refusal:
            read_pictures([str(tmp_path / "t.jsonl")], size=4)
        assert "t.jsonl:2" in refusal.value.where

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            read_pictures([str(tmp_path / "none")], size=4)
        (tmp_path / "empty").mkdir()
        with pytest.raises(UsageError, match="no pictures"):
            read_pictures([str(tmp_path / "empty")], size=4)


class TestIdx:
    @given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
    @settings(max_examples=30, deadline=None)
    def test_round_trip(self, tmp_path_factory, shape):
        path = tmp_path_factory.mktemp("idx") / "a"
        array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        path.write_bytes(idx(array))
        assert (read_idx(path) == array).all()

    @pytest.mark.parametrize(
        ("data", "match"),
        [
            (b"", "no IDX"),
            (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "no IDX"),
            (b"\0\0\x08\x09" + bytes(40), "no IDX"),
            (b"\0\0\x08\x02\xff\xff\xff\xff\xff\xff\xff\xff", "shape"),
            (b"\0\0\x08\x01\0\0\0\0", "shape"),
            (idx(np.zeros(9, np.uint8))[:-1], "less than"),
            (idx(np.zeros(9, np.uint8)) + b"x", "more than"),
        ],
    )
    def test_what_is_none(self, tmp_path, data, match):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(FileFormatError, match=match):
            read_idx(tmp_path / "a")

    def test_gzip_that_is_cut_off(self, tmp_path):
        (tmp_path / "a.gz").write_bytes(gzip.compress(idx(np.zeros(999, np.uint8)))[:-9])
        with pytest.raises(FileFormatError, match="cut off"):
            read_idx(tmp_path / "a.gz")


class TestLoader:
    def test_an_epoch_holds_every_picture_once(self):
        steps = loader(some())
        assert steps.steps_per_epoch == 3
        seen = [int(i) for step in range(3) for batch in steps.step(step) for i in batch.indices_B]
        assert sorted(seen) == list(range(12))
        assert seen != list(range(12))
        assert [int(i) for i in loader(some(), shuffle=False).indices(0)] == [0, 1, 2, 3, 4]

    def test_ranks_share_a_step(self):
        alone = sorted(int(i) for b in loader(some()).step(1) for i in b.indices_B)
        ranks = [loader(some(), rank=rank, world=2).step(1) for rank in range(2)]
        assert len(ranks[0]) == len(ranks[1])
        assert sorted(int(i) for part in ranks for b in part for i in b.indices_B if i >= 0) == alone

    def test_chance_is_a_function_of_seed_epoch_and_picture(self):
        augment = AugmentSettings(crop=0.5, shift=0.1, flip=True, colour=0.3, erase=0.5)
        one, two = (loader(some(), augment=augment, views=2) for _ in range(2))
        one.step(0)
        later = one.step(4)[0]
        assert torch.equal(later.pixels_BCHW, two.step(4)[0].pixels_BCHW)
        first, second = later.pixels_BCHW.chunk(2)
        assert not torch.equal(first, second)
        other = loader(some(), augment=augment, views=2, micro=5).step(4)[0]
        place = other.indices_B.tolist().index(int(later.indices_B[0]))
        assert torch.allclose(other.pixels_BCHW[place], first[0], atol=1e-6)

    def test_what_is_measured_is_not_changed(self):
        batches = loader(some(), micro=5).all()
        assert [len(batch.labels_B) for batch in batches] == [5, 5, 2]
        pixels = torch.cat([batch.pixels_BCHW for batch in batches])
        expected = torch.from_numpy(some().pixels).permute(0, 3, 1, 2).float() / 255
        assert torch.allclose(pixels, (expected - 0.5) / 0.5, atol=1e-6)
        assert batches[0].lengths == (4,) * 5
        assert batches[0].tokens == 20

    @pytest.mark.parametrize("options", [{"batch": 0}, {"micro": 0}, {"views": 0}])
    def test_numbers_that_make_no_sense(self, options):
        with pytest.raises(UsageError):
            loader(some(), **options)


@given(seed=st.integers(0, 1000), crop=st.floats(0.1, 1), shift=st.floats(0, 0.5), erase=st.sampled_from([0.0, 1.0]))
@settings(max_examples=40, deadline=None)
def test_changed_pictures_stay_pictures(seed, crop, shift, erase):
    pixels = torch.from_numpy(some(4).pixels).permute(0, 3, 1, 2).float() / 255
    draws = np.random.default_rng(seed).random((4, 12)).astype(np.float32)
    changed = augmented(pixels, draws, AugmentSettings(crop=crop, shift=shift, flip=True, colour=0.5, erase=erase))
    assert changed.shape == pixels.shape
    assert ((changed >= 0) & (changed <= 1)).all()


def test_no_change_is_no_change():
    pixels = torch.rand(3, 1, 8, 8)
    draws = np.random.default_rng(0).random((3, 12)).astype(np.float32)
    assert torch.equal(augmented(pixels, draws, AugmentSettings()), pixels)
    flipped = augmented(pixels, np.zeros_like(draws), AugmentSettings(flip=True))
    assert torch.allclose(flipped, pixels.flip(-1), atol=1e-5)
