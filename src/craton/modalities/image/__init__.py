"""Pictures: files to pixels, pixels to what a model was trained on, what a model finds to colours and masks. Nothing
here imports torch."""

from craton.modalities.image.coco import RunLengths, decode_rle, encode_rle
from craton.modalities.image.features import principal_colours
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
from craton.modalities.image.splitting import Grid, ImageSplitting, read_splitting, splitting_from_hf

__all__ = [
    "FILE_NAME",
    "Grid",
    "ImageLimits",
    "ImagePreprocessing",
    "ImageSplitting",
    "Pixels",
    "RunLengths",
    "check_pixels",
    "decode_rle",
    "encode_png",
    "encode_rle",
    "from_hf",
    "list_images",
    "principal_colours",
    "read_alpha",
    "read_image",
    "read_preprocessing",
    "read_splitting",
    "splitting_from_hf",
]
