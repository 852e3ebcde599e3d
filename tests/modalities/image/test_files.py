"""Picture files, good and bad."""

from __future__ import annotations

import io
import os
import struct
import threading
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.errors import CratonError, FileFormatError, UsageError
from craton.modalities.image import ImageLimits, check_pixels, encode_png, list_images, read_alpha, read_image

Image = pytest.importorskip("PIL.Image", reason="pictures need Pillow")
ImageCms = pytest.importorskip("PIL.ImageCms")
ImageFile = pytest.importorskip("PIL.ImageFile")

needs_avif = pytest.mark.skipif(not pytest.importorskip("PIL.features").check("avif"), reason="Pillow without AVIF")


def colours(height: int = 17, width: int = 23) -> np.ndarray:
    """Smooth, so that lossy formats come close."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns * 8 % 256, rows * 12 % 256, (rows + columns) * 6 % 256], -1).astype(np.uint8)


def written(image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB"):
    image = Image.fromarray(colours())
    if mode == "I;16":
        return Image.fromarray(colours()[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(colours()[..., 0].astype(np.float32))
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    return image.convert(mode)


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, body: bytes = b"") -> bytes:
    """A grey PNG whose header says what it likes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


FILES = {
    "png": written(picture(), "PNG"),
    "png, alpha": written(picture("RGBA"), "PNG"),
    "png, 16 bits": written(picture("I;16"), "PNG"),
    "png, palette": written(picture("P"), "PNG"),
    "jpeg": written(picture(), "JPEG"),
    "jpeg, progressive": written(picture(), "JPEG", progressive=True),
    "jpeg, cmyk": written(picture("CMYK"), "JPEG"),
    "jpeg, several": written(picture(), "MPO", save_all=True, append_images=[picture("L")]),
    "webp": written(picture(), "WEBP"),
    "gif": written(picture(), "GIF"),
    "bmp": written(picture(), "BMP"),
    "tiff": written(picture(), "TIFF"),
    "tiff, lab": written(picture("LAB"), "TIFF"),
    "tiff, numbers": written(picture("F"), "TIFF"),
    "tiff, packed": written(picture("RGBA"), "TIFF", compression="tiff_deflate"),
    "ppm": written(picture(), "PPM"),
}


@pytest.mark.parametrize(
    ("format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("PPM", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 24),
        ("JPEG", {"quality": 95}, 24),
        pytest.param("AVIF", {"quality": 95}, 24, marks=needs_avif),
    ],
)
def test_formats(format, options, tolerance, tmp_path):
    path = tmp_path / f"picture.{format.lower()}"
    path.write_bytes(written(picture(), format, **options))
    for source in (path, str(path), path.read_bytes()):
        found = read_image(source)
        assert found.dtype == np.uint8
        assert found.shape == (17, 23, 3)
        assert np.abs(found.astype(int) - colours()).max() <= tolerance
        assert read_alpha(source) is None


@pytest.mark.parametrize("mode", ["L", "1", "P", "LAB", "CMYK", "YCbCr", "LA", "RGBA"])
def test_ways_to_store_colour(mode):
    image = picture(mode)
    apart = np.abs(
        read_image(written(image, "TIFF")).astype(int)
        - np.asarray(picture() if mode == "LAB" else image.convert("RGB"))
    )
    # 8 bits of LAB are coarse where it is dark.
    assert apart.mean() < 1.5 if mode == "LAB" else apart.max() <= 1


def test_a_jpeg_of_four_inks():
    found = read_image(written(picture("CMYK"), "JPEG", quality=95))
    assert np.abs(found.astype(int) - colours()).mean() < 6


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 1000, 32768, 65535]], np.uint16), [0, 4, 128, 255]),
        (np.array([[0.0, 0.25, 0.5, 1.0]], np.float32), [0, 64, 128, 255]),
        (np.array([[0.0, 64.4, 128.0, 255.0]], np.float32), [0, 64, 128, 255]),
        (np.array([[0, 1000, 32768, 65535]], np.int32), [0, 4, 128, 255]),
    ],
)
def test_grey_of_more_than_8_bits_is_scaled_and_not_clipped(values, expected):
    found = read_image(written(Image.fromarray(values), "TIFF"))
    assert found[0].tolist() == [[value] * 3 for value in expected]
    if values.dtype == np.uint16:
        assert (read_image(written(Image.fromarray(values), "PNG")) == found).all()


def test_grey_maps_of_any_depth():
    assert read_image(b"P5 2 1 1000\n\x03\xe8\x00\x00").tolist() == [[[255] * 3, [0] * 3]]
    assert read_image(b"P2 2 1 10\n10 0\n").tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("values", [[0.0, np.nan], [0.0, np.inf], [-1.0, 0.5], [0.0, 300.0]])
def test_numbers_that_are_no_grey(values):
    with pytest.raises(FileFormatError, match=r"no numbers|grey values"):
        read_image(written(Image.fromarray(np.array([values], np.float32)), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation, format):
    # What a camera writes for each tag (TIFF 6.0, "Orientation"): the upright picture, turned back.
    turned_back = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    upright = np.repeat(np.repeat(np.array([[250, 120, 10], [70, 200, 30]], np.uint8), 24, 0), 24, 1)
    upright = np.repeat(upright[..., None], 3, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(turned_back[orientation](upright)))
    found = read_image(written(stored, format, exif=exif, **({"quality": 95} if format != "TIFF" else {})))
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).mean() < 4
    if format in ("PNG", "TIFF", "WEBP"):
        opaque = Image.fromarray(np.asarray(stored)).convert("RGBA")
        opaque.putalpha(Image.fromarray(np.ascontiguousarray(np.asarray(stored)[..., 0])))
        alpha = read_alpha(written(opaque, format, exif=exif))
        assert alpha is not None
        assert (alpha == upright[..., 0]).all()


def test_an_orientation_that_does_not_exist_turns_nothing():
    exif = Image.Exif()
    exif[0x0112] = 77
    assert (read_image(written(picture(), "PNG", exif=exif)) == colours()).all()


def test_damaged_exif_data_does_not_cost_the_picture():
    data = written(picture(), "PNG")
    end = data.index(b"IDAT") - 4
    with_exif = data[:end] + chunk(b"eXIf", b"II*\x00\xff\xff\xff\xffnonsense") + data[end:]
    assert (read_image(with_exif) == colours()).all()


def test_transparent_pictures_lie_on_white():
    image = Image.new("RGBA", (3, 1))
    for x, pixel in enumerate([(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 127)]):
        image.putpixel((x, 0), pixel)
    for data in (written(image, "PNG"), written(image, "WEBP", lossless=True, exact=True), written(image, "TIFF")):
        assert read_image(data)[0].tolist() == [[10, 20, 30], [255, 255, 255], [128, 128, 128]]
        assert read_alpha(data).tolist() == [[255, 0, 127]]


@pytest.mark.parametrize(
    ("mode", "colour", "transparency"),
    [("P", 0, 0), ("P", 0, b"\x00\xff"), ("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3))],
)
def test_a_colour_that_means_nothing_is_there(mode, colour, transparency):
    image = Image.new(mode, (2, 1), colour)
    if mode == "P":
        image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), {"P": 1, "L": 60, "RGB": (40, 50, 60)}[mode])
    data = written(image, "PNG", transparency=transparency)
    assert read_image(data)[0, 0].tolist() == [255, 255, 255]
    assert read_image(data)[0, 1].tolist() == ([60] * 3 if mode == "L" else [40, 50, 60])
    assert read_alpha(data).tolist() == [[0, 255]]


def test_grey_that_is_multiplied_by_its_alpha():
    data = bytearray(written(Image.new("LA", (2, 1), (100, 200)), "TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    entry = next(e for e in range(at + 2, at + 2 + 12 * count, 12) if struct.unpack_from("<H", data, e)[0] == 338)
    struct.pack_into("<H", data, entry + 8, 1)  # ExtraSamples: associated alpha
    assert Image.open(io.BytesIO(data)).mode == "La"
    assert read_image(bytes(data))[0].tolist() == [[155] * 3] * 2
    assert read_alpha(bytes(data)).tolist() == [[200, 200]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_the_first_is_read(format):
    first, second = (Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (200, 20))
    found = read_image(written(first, format, save_all=True, append_images=[second, second]))
    assert found.shape == (20, 30, 3)
    assert np.abs(found.astype(int) - 200).max() < 4


# What cannot be read.

BAD = {
    "nothing": b"",
    "a text": b"this is no picture\n" * 100,
    "noise": bytes(np.random.default_rng(0).integers(0, 256, 4_000, dtype=np.uint8)),
    "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"></svg>',
    "a program for a printer": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n",
    "a format that is not listed": written(picture(), "ICO"),
    "no width": png(0, 10),
    "no height": png(10, 0),
    "a map without rows": b"P6 4 0 255\n",
    "less than its header says": png(200, 200, bytes(100)),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_picture(name, tmp_path):
    path = tmp_path / "it.png"
    path.write_bytes(BAD[name])
    for read in (read_image, read_alpha):
        with pytest.raises(FileFormatError) as error:
            read(path)
        assert error.value.where == str(path)
        assert error.value.remedy


def test_what_is_no_file(tmp_path):
    with pytest.raises(UsageError, match="a folder"):
        read_image(tmp_path)
    with pytest.raises(UsageError, match="No such file"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(UsageError, match="cannot be read"):
        read_image("a\0b.png")
    with pytest.raises(UsageError, match="cannot be read"):
        read_image("~nobody-of-this-name/a.png")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device_without_an_end():
    with pytest.raises(FileFormatError, match="bytes, where 1,000 are read"):
        read_image("/dev/zero", ImageLimits(file_bytes=1_000))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_cut_short(name):
    data = FILES[name]
    whole = read_image(data)
    for cut in np.unique(np.linspace(0, len(data) - 1, 50).astype(int)):
        try:
            found = read_image(data[:cut])
        except FileFormatError:
            continue
        # Only what stands after the pixels may be missing.
        assert cut > len(data) * 0.4
        assert (found == whole).all()


@given(name=st.sampled_from(sorted(FILES)), data=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_bytes_are_refused_in_words_or_read(name, data):
    damaged = bytearray(FILES[name])
    places = st.integers(0, len(damaged) - 1) | st.integers(0, min(len(damaged), 64) - 1)
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), min_size=1, max_size=8)):
        damaged[at] = value
    for read in (read_image, read_alpha):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                found = read(bytes(damaged), ImageLimits(pixels=1_000_000))
            except CratonError:
                continue
        if found is not None:
            assert found.dtype == np.uint8
            assert found.size


@needs_avif
def test_damaged_bytes_of_avif():
    whole, dice = written(picture("RGBA"), "AVIF"), np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for _ in range(dice.integers(1, 8)):
            damaged[dice.integers(len(damaged))] = dice.integers(256)
        try:
            read_image(bytes(damaged), ImageLimits(pixels=1_000_000))
        except FileFormatError:
            continue


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0"])
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_refused_in_words_or_read(body, start):
    try:
        found = read_image(start + body, ImageLimits(pixels=1_000_000))
    except FileFormatError:
        return
    assert found.size


# Limits hold before anything is decoded.


@pytest.fixture
def never_decoded(monkeypatch):
    def refuse(*args):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


@pytest.mark.parametrize("size", [(100_000, 10), (10, 100_000), (20_000, 20_000), (30_000, 4_000), (2**31 - 1,) * 2])
@pytest.mark.usefixtures("never_decoded")
def test_a_header_that_promises_too_much(size):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(FileFormatError, match="pixels"):
            read_image(png(*size))


@pytest.mark.usefixtures("never_decoded")
def test_limits_of_the_caller(tmp_path):
    data = written(picture(), "PNG")
    (tmp_path / "it.png").write_bytes(data)
    for source in (data, tmp_path / "it.png"):
        for limits in (ImageLimits(pixels=390), ImageLimits(side=22), ImageLimits(file_bytes=len(data) - 1)):
            with pytest.raises(FileFormatError, match="are read"):
                read_image(source, limits)


def test_limits_are_inclusive():
    data = written(picture(), "PNG")
    assert read_image(data, ImageLimits(pixels=391, side=23, file_bytes=len(data))).shape == (17, 23, 3)


@pytest.mark.parametrize("chunk_of", [b"zTXt", b"iCCP", b"iTXt"])
def test_what_is_packed_beside_the_pixels_is_not_unpacked(chunk_of):
    data = written(picture(), "PNG")
    start = {b"zTXt": b"Comment\0\0", b"iCCP": b"profile\0\0", b"iTXt": b"Comment\0\1\0\0\0"}[chunk_of]
    packed = chunk(chunk_of, start + zlib.compress(bytes(100_000_000), 9))
    tracemalloc.start()
    try:
        with suppress(FileFormatError):
            read_image(data[:33] + packed + data[33:])
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_pillow_is_left_as_it_was():
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters)
    for data in [*FILES.values(), *BAD.values()]:
        try:
            read_image(data)
        except FileFormatError:
            continue
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_many_threads_at_once():
    filters, wrong = list(warnings.filters), []

    def read() -> None:
        for name in FILES:
            if not np.array_equal(read_image(FILES[name]), expected[name]):
                wrong.append(name)

    expected = {name: read_image(data) for name, data in FILES.items()}
    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert list(warnings.filters) == filters


# Arrays, folders and what is written.


def test_arrays_that_somebody_made():
    assert check_pixels(colours()) is not None
    grey = check_pixels(colours()[..., 0])
    assert grey.shape == (17, 23, 3)
    assert (grey == colours()[..., :1]).all()


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4, 3)),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 1), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_pixels(pixels):
    with pytest.raises(UsageError, match="uint8"):
        check_pixels(pixels)


def test_a_folder_of_pictures(tmp_path):
    for name in ("b.png", "a.JPG", "deep/er/c.webp", "deep/.hidden.png", ".thumbnails/d.png", "notes.txt", "png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.png").mkdir()
    os.symlink(tmp_path / "missing.png", tmp_path / "broken.png")
    assert [str(path.relative_to(tmp_path)) for path in list_images(tmp_path)] == ["a.JPG", "b.png", "deep/er/c.webp"]


def test_a_folder_that_is_hidden_itself(tmp_path):
    (tmp_path / ".pictures").mkdir()
    (tmp_path / ".pictures" / "a.png").touch()
    assert len(list_images(tmp_path / ".pictures")) == 1
    assert list_images(str(tmp_path)) == []


@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    scale=st.integers(1, 4),
    grey=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read(height, width, scale, grey, seed):
    shape = (height, width) if grey else (height, width, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    found = read_image(encode_png(pixels, scale=scale))
    assert (found == check_pixels(pixels).repeat(scale, 0).repeat(scale, 1)).all()
