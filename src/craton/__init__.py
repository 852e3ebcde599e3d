"""Craton: one Python codebase for the whole life of a foundation model.

import craton
model = craton.load("smollm2-135m-instruct")
print(model.chat([{"role": "user", "content": "What is gravity?"}]).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from craton.errors import CratonError

if TYPE_CHECKING:
    from craton.finetuning.loading import load, load_images
    from craton.inference.images import ImageModel
    from craton.inference.model import Model
    from craton.inference.segmentation import load_segmenter

__version__ = "0.1.0"
__all__ = ["CratonError", "ImageModel", "Model", "__version__", "load", "load_images", "load_segmenter"]


def __getattr__(name: str) -> object:
    # `import craton` and `craton --help` must not pay for torch: what needs it is imported on first use.
    if name in ("load", "load_images"):
        from craton.finetuning import loading

        return getattr(loading, name)
    if name == "load_segmenter":
        from craton.inference.segmentation import load_segmenter

        return load_segmenter
    if name == "ImageModel":
        from craton.inference.images import ImageModel

        return ImageModel
    if name == "Model":
        from craton.inference.model import Model

        return Model
    raise AttributeError(f"module 'craton' has no attribute {name!r}")
