"""Picture files to pixels: RGB, 8 bits a channel. Every limit is held before a pixel is decoded.

Pillow reads them, of the formats that are listed here and no other; truncated files are refused.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from craton.config import Settings
from craton.errors import FileFormatError, UsageError

if TYPE_CHECKING:
    from PIL import Image

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
SUFFIXES: Final = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
)
# What Pillow's decoders raise for files that are not what they say.
DAMAGE: Final = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, ZeroDivisionError,
    OverflowError, RuntimeError, struct.error, zlib.error,
)  # fmt: skip
ORIENTATION: Final = 0x0112  # the EXIF tag
# What turns upright what was stored under each of its values, by Pillow's names.
TURNS: Final = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip

Pixels = NDArray[np.uint8]

_warning = threading.Lock()  # the filters of warnings belong to the whole process


class ImageLimits(Settings):
    """What a picture file may be at most; beyond it nothing is decoded."""

    file_bytes: int = Field(default=512 * 1024**2, ge=1, description="bytes of the file")
    pixels: int = Field(default=89_478_485, ge=1, le=89_478_485, description="pixels in all: 256 MiB of RGB")
    side: int = Field(default=32_768, ge=1, description="pixels of a side")


def read_image(source: str | Path | bytes, limits: ImageLimits = ImageLimits()) -> Pixels:  # noqa: B008  (immutable)
    """The pixels [H, W, 3] of a file, or of a file's bytes: RGB, turned as its EXIF tag says, laid on white where it is
    transparent. Of an animation it is the first picture. Grey of 16 bits is scaled to 8.

    Raises:
        UsageError: there is no such file, or Pillow (the extra [image]) is not installed.
        FileFormatError: the file is no picture, is cut short, is beyond a limit, or holds NaN.
    """
    where = "the picture" if isinstance(source, bytes) else str(source)
    with _opened(source, where, limits) as image:
        return np.array(_to_rgb(image, where))


def read_alpha(source: str | Path | bytes, limits: ImageLimits = ImageLimits()) -> Pixels | None:  # noqa: B008
    """How opaque each pixel is, [H, W] from 0 to 255, turned as `read_image` does; None for a picture without it.

    Raises what `read_image` raises.
    """
    where = "the picture" if isinstance(source, bytes) else str(source)
    with _opened(source, where, limits) as image:
        if not image.has_transparency_data:
            return None
        return np.array(_to_rgba(image).getchannel("A"))


def check_pixels(pixels: NDArray[Any]) -> Pixels:
    """Pixels that somebody made, [H, W, 3] or [H, W], uint8, as `read_image` gives them.

    Raises UsageError for another shape or type, or no pixel.
    """
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not pixels.size or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise UsageError(
            f"pixels are uint8 [H, W, 3] or [H, W], not {pixels.dtype} {list(pixels.shape)}",
            remedy="scale them to 0..255 and put the colours last",
        )
    return np.repeat(pixels[:, :, None], 3, 2) if grey else pixels


def list_images(folder: str | Path) -> list[Path]:
    """The picture files in a folder and below it, by their names' endings, sorted; hidden ones are left out."""
    root = Path(folder)
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def encode_png(pixels: NDArray[Any], *, scale: int = 1) -> bytes:
    """A PNG file of pixels [H, W, 3] or [H, W], uint8. scale: each becomes so many on either side."""
    Image = _pillow()
    image = Image.fromarray(pixels)
    if scale != 1:
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise UsageError("pictures need Pillow", remedy="pip install 'craton[image]' (or pillow alone)") from None
    return Image


@contextmanager
def _opened(source: str | Path | bytes, where: str, limits: ImageLimits) -> Iterator[Image.Image]:
    """The decoded picture, turned upright."""
    Image = _pillow()
    try:
        if isinstance(source, bytes):
            data = source
        else:
            path = Path(source).expanduser()
            if path.is_dir():
                raise UsageError("this is a folder, not a picture file", where=where)
            nbytes = path.stat().st_size
            _check(nbytes <= limits.file_bytes, f"{nbytes:,} bytes, where {limits.file_bytes:,} are read", where)
            with path.open("rb") as file:  # a pipe or a device tells no length
                data = file.read(limits.file_bytes + 1)
    except (OSError, ValueError, RuntimeError) as error:  # the latter two: of names that no file can have
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the picture file cannot be read: {why}", where=where) from None
    _check(len(data) <= limits.file_bytes, f"{len(data):,} bytes, where {limits.file_bytes:,} are read", where)
    with _header(Image, data, where) as image:
        width, height = image.size
        _check(width > 0 and height > 0, f"a picture of {width} x {height} pixels", where)
        _check(
            max(width, height) <= limits.side and width * height <= limits.pixels,
            f"{width:,} x {height:,} pixels, where sides of {limits.side:,} and {limits.pixels:,} in all are read",
            where,
        )
        try:
            with _quiet() if image.format == "TIFF" else nullcontext():
                image.load()
            upright = _turned(image)
        except (*DAMAGE, Image.DecompressionBombError, MemoryError) as error:
            raise FileFormatError(
                f"the picture is damaged or cut short: {error}", where=where, remedy="copy or download it again"
            ) from None
        yield upright


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of sizes that we refuse, and of damage that it reports as an error too, or that touches no pixel."""
    with _warning, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _header(Image: Any, data: bytes, where: str) -> Any:
    try:
        with _quiet():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            Image.init()
            return Image.open(io.BytesIO(data), formats=[name for name in FORMATS if name in Image.OPEN])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise FileFormatError(f"the picture is too large: {error}", where=where, remedy="make it smaller") from None
    except DAMAGE:
        raise FileFormatError(
            "this is not a picture that can be read",
            where=where,
            remedy="PNG, JPEG, WebP, GIF, BMP, TIFF and PPM are read; check what the file really is",
        ) from None


def _turned(image: Any) -> Any:
    try:
        with _quiet():
            orientation = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:
        return image  # the EXIF data is damaged and says nothing; the pixels are whole
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(_pillow().Transpose[turn])


def _to_rgb(image: Any, where: str) -> Any:
    from PIL import Image, ImageCms

    mode = image.mode
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(_to_bytes(np.array(image), mode, where)).convert("RGB")
    if mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    if image.has_transparency_data:
        image = _to_rgba(image)
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Any) -> Any:
    # Pillow converts grey with premultiplied alpha to nothing else.
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _to_bytes(values: NDArray[Any], mode: str, where: str) -> Pixels:
    """Grey of more than 8 bits: 16-bit numbers, or floating-point ones from 0 to 1 or to 255."""
    _check(bool(np.isfinite(values).all()), "the picture holds values that are no numbers", where)
    numbers = values.astype(np.float64)
    low, high = numbers.min(), numbers.max()
    whole = mode.startswith("I")
    most = 65535.0 if whole else 1.0 if high <= 1 else 255.0
    _check(low >= 0 and high <= most, f"grey values from {low:g} to {high:g}, where 0 to {most:g} are read", where)
    return np.rint(numbers * (255 / most)).astype(np.uint8)


def _check(fine: bool, what: str, where: str) -> None:
    if not fine:
        raise FileFormatError(what, where=where, remedy="export the picture again, smaller or as PNG or JPEG")
