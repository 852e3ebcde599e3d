"""From pixels to what a model of pictures was trained on: resized, cropped, normalised, as its files say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.errors import CheckpointError, UsageError
from craton.modalities.image.files import Pixels

FILE_NAME: Final = "preprocessor_config.json"

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
HALF: Final = (0.5, 0.5, 0.5)

MOST_PIXELS: Final = 1 << 27  # of a picture that is resized

Filter = Literal["nearest", "lanczos", "bilinear", "bicubic", "box", "hamming"]
FILTERS: Final[tuple[Filter, ...]] = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers

# What a published type of processor does where its file says nothing.
_CLIP: Final[Mapping[str, Any]] = {
    "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}, "resample": 3,
    "do_center_crop": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
}  # fmt: skip
_SQUARE: Final[Mapping[str, Any]] = {
    "size": {"height": 224, "width": 224}, "resample": 2,
    "do_center_crop": False, "image_mean": HALF, "image_std": HALF,
}  # fmt: skip
TYPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "CLIP": _CLIP,
    "Bit": _CLIP,
    "ViT": _SQUARE,
    "Siglip": {**_SQUARE, "resample": 3},
    "DINOv3ViT": {**_SQUARE, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD},
}
# Keys that change no pixel, or say what is done anyway (a picture is RGB when it comes here).
UNREAD: Final = frozenset(
    ("do_convert_rgb", "image_processor_type", "feature_extractor_type", "processor_class", "data_format", "device",
     "input_data_format", "disable_grouping", "return_tensors", "default_to_square", "pad_size", "images_kwargs",
     "image_seq_length", "use_square_size", "_valid_processor_keys", "auto_map")
)  # fmt: skip


class ImagePreprocessing(Settings):
    """How a picture is prepared. resize: to exactly `size` (height, width), or its shorter side to `size[0]`. crop: the
    middle of so many rows and columns, with black around a smaller picture. Then rescaled (times `rescale`) and
    normalised by `mean` and `std`, one for each channel. floating: the picture is rescaled before it is resized and is
    never rounded between the two (DINOv3). channels: 3, or 1 for luminance."""

    size: tuple[PositiveInt, PositiveInt] = (224, 224)
    resize: Literal["exactly", "shorter", "no"] = "exactly"
    filter: Filter = "bicubic"
    crop: tuple[PositiveInt, PositiveInt] | None = None
    rescale: PositiveFloat = 1 / 255
    mean: tuple[float, ...] = Field(default=HALF, min_length=1, max_length=3)
    std: tuple[PositiveFloat, ...] = Field(default=HALF, min_length=1, max_length=3)
    floating: bool = False
    channels: Literal[1, 3] = 3

    @classmethod
    def square(
        cls, size: int, mean: Sequence[float] = HALF, std: Sequence[float] = HALF, *, channels: Literal[1, 3] = 3
    ) -> ImagePreprocessing:
        """Shorter side to `size`, the middle square of it: what models that are trained here are given."""
        return cls(
            size=(size, size), resize="shorter", crop=(size, size), mean=tuple(mean), std=tuple(std), channels=channels
        )

    def resized_to(self, height: int, width: int) -> ImagePreprocessing:
        """The same numbers of a picture that is resized to these sides, without a crop."""
        return self.model_copy(update={"size": (height, width), "resize": "exactly", "crop": None})

    def as_they_are(self) -> ImagePreprocessing:
        """The same numbers of pictures that are resized and cropped already."""
        return self.model_copy(update={"resize": "no", "crop": None})

    def prepare(self, pixels: Pixels) -> NDArray[np.float32]:
        """pixels [H, W, 3], uint8 -> fp32 [channels, h, w]."""
        resized = self.resized(pixels)
        numbers = resized if self.floating else resized.astype(np.float32) * np.float32(self.rescale)
        mean, std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (self.mean, self.std))
        return np.ascontiguousarray((numbers - mean) / std, np.float32)

    def resized(self, pixels: Pixels) -> NDArray[Any]:
        """Resized and cropped but not normalised: [channels, h, w], uint8 (fp32 and rescaled where `floating`)."""
        from PIL import Image

        image = Image.fromarray(pixels)
        if self.channels == 1:
            image = image.convert("L")
        width, height = self._target(image.width, image.height)
        if width * height > MOST_PIXELS:  # a line of a few pixels' width becomes a band
            raise UsageError(
                f"a picture of {image.width:,} x {image.height:,} pixels would be resized to {width:,} x {height:,}",
                remedy="crop it to a less extreme shape",
            )
        resample = Image.Resampling[self.filter.upper()]
        if self.floating:
            values = np.asarray(image, np.float32) * np.float32(self.rescale)
            planes = [
                Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(np.atleast_3d(values), 2, 0)
            ]
            if (width, height) != image.size:
                planes = [plane.resize((width, height), resample) for plane in planes]
            return self._cropped(np.stack([np.asarray(plane) for plane in planes]))
        if (width, height) != image.size:
            image = image.resize((width, height), resample)
        return self._cropped(np.moveaxis(np.atleast_3d(np.asarray(image)), 2, 0))

    def prepare_all(self, pictures: Sequence[Pixels]) -> NDArray[np.float32]:
        """Several, [B, channels, h, w]. Raises UsageError where they come out at different sizes."""
        prepared = [self.prepare(pixels) for pixels in pictures]
        if len({one.shape for one in prepared}) > 1:
            raise UsageError("these pictures stay of different sizes, so they cannot be read together")
        return np.stack(prepared)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        if self.resize == "no":
            return width, height
        if self.resize == "exactly":
            return self.size[1], self.size[0]
        short, long = self.size[0], int(self.size[0] * max(width, height) / min(width, height))
        return (short, long) if width <= height else (long, short)

    def _cropped(self, values: NDArray[Any]) -> NDArray[Any]:
        if self.crop is None:
            return values
        for axis, wanted in ((1, self.crop[0]), (2, self.crop[1])):
            there = values.shape[axis]
            if there < wanted:
                # As the published processors: the odd row or column of black goes before the picture.
                before = ceil((wanted - there) / 2)
                pads = [(0, 0)] * 3
                pads[axis] = (before, wanted - there - before)
                values = np.pad(values, pads)
            else:
                start = (there - wanted) // 2
                values = values.take(range(start, start + wanted), axis)
        return values

    def to_hf(self) -> dict[str, Any]:
        """The `preprocessor_config.json` from which transformers prepares pictures in the same way."""
        values: dict[str, Any] = {
            # Fast: DINOv3's is known by that name alone to transformers 4, and by both to 5.
            "image_processor_type": "DINOv3ViTImageProcessorFast" if self.floating else "CLIPImageProcessor",
            "do_resize": self.resize != "no",
            "resample": FILTERS.index(self.filter),
            "do_center_crop": self.crop is not None,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "do_convert_rgb": self.channels == 3,
        }
        height, width = self.size
        values["size"] = {"shortest_edge": height} if self.resize == "shorter" else {"height": height, "width": width}
        if self.crop is not None:
            values["crop_size"] = {"height": self.crop[0], "width": self.crop[1]}
        return values


def read_preprocessing(folder: Path) -> ImagePreprocessing:
    """What the files of a checkpoint say. Raises CheckpointError where they say nothing, or what is not known."""
    return from_hf(*processor_values(folder))


def processor_values(folder: Path) -> tuple[Mapping[str, Any], str]:
    """The `preprocessor_config.json` of a checkpoint, or what stands for it, and where it was found."""
    for name in (FILE_NAME, "processor_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{name} cannot be read: {error}", where=str(path)) from None
        if isinstance(values, dict) and isinstance(values.get("image_processor"), dict):
            values = values["image_processor"]
        if isinstance(values, dict) and (
            "image_mean" in values or "image_processor_type" in values or "size" in values
        ):
            return values, str(path)
    raise CheckpointError(
        "the checkpoint does not say how pictures are prepared for it",
        where=str(folder),
        remedy=f"fetch its {FILE_NAME} as well",
    )


def processor_kind(values: Mapping[str, Any]) -> str:
    """Which type of processor a file names, without the endings: "CLIP", "Idefics3"; "" where it names none."""
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    for ending in ("Pil", "Fast", "ImageProcessor", "FeatureExtractor"):
        kind = kind.removesuffix(ending)
    return kind


def from_hf(values: Mapping[str, Any], where: str) -> ImagePreprocessing:
    """A `preprocessor_config.json` of ViT, CLIP, SigLIP, DINOv2 or DINOv3.

    Raises CheckpointError for another type of processor, and for an option that is not known: pixels that are prepared
    in another way give other vectors.
    """
    kind = processor_kind(values)
    if kind not in TYPES:
        raise CheckpointError(
            f"pictures are prepared by {kind or 'nobody'!r}, which is not known",
            where=where,
            remedy=f"known: {', '.join(f'{name}ImageProcessor' for name in TYPES)}",
        )
    given = {key: value for key, value in values.items() if value is not None}
    known = {**TYPES[kind], "do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}
    strange = sorted(key for key in set(given) - set(known) - UNREAD - {"crop_size", "do_pad"})
    if strange or given.get("do_pad"):
        name = strange[0] if strange else "do_pad"
        raise CheckpointError(f"the option {name!r} is not known", where=where, remedy="it may change every pixel")
    options = {**known, **given}
    resize, size = _size(options, kind, where)
    crop = None
    if options["do_center_crop"]:
        height, width = _sides(options.get("crop_size", options["size"]), where, "crop_size")
        crop = (height, width)
    normal = options["do_normalize"]
    mean, std = _numbers(options, "image_mean", where), _numbers(options, "image_std", where)
    if len(mean) != len(std) or min(std) <= 0:
        _no(where, "image_std")
    resample, rescale = options["resample"], options["rescale_factor"]
    if not isinstance(resample, int) or not 0 <= resample < len(FILTERS):
        _no(where, "resample")
    if not _is_number(rescale) or rescale <= 0:
        _no(where, "rescale_factor")
    return ImagePreprocessing(
        size=size,
        resize=resize,
        filter=FILTERS[resample],
        crop=crop,
        rescale=float(rescale) if options["do_rescale"] else 1.0,
        mean=mean if normal else (0.0,) * len(mean),
        std=std if normal else (1.0,) * len(std),
        floating=kind == "DINOv3ViT",
        channels=1 if len(mean) == 1 else 3,
    )


def _size(
    options: Mapping[str, Any], kind: str, where: str
) -> tuple[Literal["exactly", "shorter", "no"], tuple[int, int]]:
    size = options["size"]
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        short = size["shortest_edge"]
        return ("shorter" if options["do_resize"] else "no"), _sides(short, where, "size")
    if isinstance(size, int) and TYPES[kind]["do_center_crop"]:  # in older files, which meant the shorter side
        return ("shorter" if options["do_resize"] else "no"), _sides(size, where, "size")
    return ("exactly" if options["do_resize"] else "no"), _sides(size, where, "size")


def _sides(value: Any, where: str, key: str) -> tuple[int, int]:
    sides = [value, value] if isinstance(value, int) else value
    if isinstance(sides, dict) and set(sides) == {"height", "width"}:
        sides = [sides["height"], sides["width"]]
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(n, int) and 0 < n < 65536 for n in sides):
        _no(where, key)
    return sides[0], sides[1]


def _numbers(options: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    values = options[key]
    values = [values] * 3 if isinstance(values, int | float) else values
    if not isinstance(values, list | tuple) or len(values) not in (1, 3) or not all(_is_number(n) for n in values):
        _no(where, key)
    return tuple(float(n) for n in values)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9  # NaN is not


def _no(where: str, key: str) -> Any:
    raise CheckpointError(f"{key!r} is not what it should be", where=f"{where}: key {key!r}")
