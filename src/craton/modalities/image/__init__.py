"""Pictures: files to pixels, pixels to what a model was trained on. Nothing here imports torch."""

from craton.modalities.image.files import (
    ImageLimits,
    Pixels,
    check_pixels,
    encode_png,
    list_images,
    read_alpha,
    read_image,
)
from craton.modalities.image.preprocessing import FILE_NAME, ImagePreprocessing, from_hf, read_preprocessing

__all__ = [
    "FILE_NAME",
    "ImageLimits",
    "ImagePreprocessing",
    "Pixels",
    "check_pixels",
    "encode_png",
    "from_hf",
    "list_images",
    "read_alpha",
    "read_image",
    "read_preprocessing",
]
