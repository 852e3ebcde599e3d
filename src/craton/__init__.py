"""Craton: one Python codebase for the whole life of a foundation model.

import craton
model = craton.load("smollm2-135m-instruct")
print(model.chat([{"role": "user", "content": "What is gravity?"}]).text)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from craton.errors import CratonError

if TYPE_CHECKING:
    from craton.finetuning.loading import load
    from craton.inference.images import ImageModel, load_images
    from craton.inference.model import Model

__version__ = "0.1.0"
__all__ = ["CratonError", "ImageModel", "Model", "__version__", "load", "load_images"]


def __getattr__(name: str) -> object:
    # `import craton` and `craton --help` must not pay for torch: what needs it is imported on first use.
    if name == "load":
        from craton.finetuning.loading import load

        return load
    if name in ("ImageModel", "load_images"):
        from craton.inference import images

        return getattr(images, name)
    if name == "Model":
        from craton.inference.model import Model

        return Model
    raise AttributeError(f"module 'craton' has no attribute {name!r}")
