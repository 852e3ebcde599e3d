"""`craton features`: what the layers of a model make of a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import DType, Json, Threads
from craton.cli.terminal import load_seeing, print_json, stdout
from craton.errors import UsageError


def features(
    image: Annotated[str, Parameter(help="a picture file")],
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")],
    layers: Annotated[str, Parameter(help="numbers with commas between them, from 0, or from the end as -1")] = "-1",
    size: Annotated[
        int | None, Parameter(help="pixels of the shorter side; the picture keeps its shape (none: as trained)")
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="a .safetensors file for the vectors of patches and class token")
    ] = None,
    pca: Annotated[
        Path | None, Parameter(help="a .png file: the three directions in which the last layer's patches differ most")
    ] = None,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Take the vectors of a picture's patches from one or more layers, and draw them by their principal components."""
    try:
        numbers = [int(number) for number in layers.split(",")]
    except ValueError:
        raise UsageError(f"--layers are numbers with commas between them, not {layers!r}") from None
    for path, suffix in ((out, ".safetensors"), (pca, ".png")):
        if path is not None and path.suffix != suffix:
            raise UsageError(f"{path} does not end with {suffix}")
        if path is not None and path.exists():
            raise UsageError(f"{path} exists already", remedy="choose another name, or remove it first")
    from craton.checkpoints.disk import replace_file
    from craton.checkpoints.safetensors import write_safetensors
    from craton.modalities.image import encode_png
    from craton.modalities.image.features import principal_colours

    loaded = load_seeing(model, dtype=dtype, threads=threads, quiet=json)
    found = loaded.features(image, numbers, size=size)
    if out is not None:
        tensors = {f"layers.{one.layer}.patches": one.patches.contiguous() for one in found}
        tensors |= {f"layers.{one.layer}.cls": one.cls.contiguous() for one in found if one.cls is not None}
        write_safetensors(out, tensors)
    if pca is not None:
        colours = principal_colours(found[-1].patches.numpy())
        replace_file(pca, encode_png(colours, scale=loaded.vision.config.patch))
    rows, columns, width = found[-1].patches.shape
    written = [str(path) for path in (out, pca) if path is not None]
    if json:
        layers_found = [one.layer for one in found]
        print_json(
            {"model": loaded.name, "layers": layers_found, "grid": [rows, columns], "width": width, "files": written}
        )
        return
    stdout.print(f"{rows} x {columns} patches of {width} numbers, layers {', '.join(str(one.layer) for one in found)}")
    for file in written:
        stdout.print(file, markup=False, soft_wrap=True)
