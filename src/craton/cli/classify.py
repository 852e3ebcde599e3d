"""`craton classify`: which of several classes a picture shows."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from craton.cli.options import DType, Json, Threads
from craton.cli.terminal import load_seeing, print_json, stdout
from craton.errors import UsageError


def classify(
    *images: Annotated[str, Parameter(help="picture files")],
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")],
    labels: Annotated[
        str | None, Parameter(help="classes to choose from, with commas between them; none: those of a trained head")
    ] = None,
    template: Annotated[
        list[str] | None,
        Parameter(help="a sentence with {} for the label, several times for several; their vectors are averaged"),
    ] = None,
    top: Annotated[int, Parameter(help="classes to show for each picture")] = 3,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Say what pictures show: of any classes with CLIP or SigLIP, of its own with a trained classifier."""
    if not images:
        raise UsageError("there is nothing to classify", remedy="name picture files")
    if top < 1:
        raise UsageError(f"--top is 1 or more, not {top}")
    from craton.inference.images import TEMPLATES
    from craton.modalities.image import read_image

    read_image(images[0])  # what is no picture is refused before the model is loaded
    loaded = load_seeing(model, dtype=dtype, threads=threads, quiet=json)
    names = [name.strip() for name in labels.split(",") if name.strip()] if labels is not None else None
    found = loaded.classify(images, names, template or TEMPLATES)
    if json:
        answers = [
            {"image": image, "classes": [guess._asdict() for guess in guesses[:top]]}
            for image, guesses in zip(images, found, strict=True)
        ]
        print_json({"model": loaded.name, "images": answers})
        return
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for image, guesses in zip(images, found, strict=True):
        for number, guess in enumerate(guesses[:top]):
            bar = "█" * round(20 * guess.probability)
            table.add_row(image if not number else "", guess.label, f"{guess.probability:.1%}", f"[cyan]{bar}[/]")
    stdout.print(table)
