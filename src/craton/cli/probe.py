"""`craton probe`: how good a model's vectors of pictures are, by classes that are learnt on top of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from craton.cli.options import DType, Json, Threads
from craton.cli.terminal import load_seeing, print_json, status, stdout
from craton.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from craton.data.pictures import PictureSet
    from craton.inference.images import ImageModel


def probe(
    model: Annotated[str, Parameter(help="a name or a path")],
    /,
    *data: Annotated[str, Parameter(help="pictures with classes to learn from: folders, tables, IDX files")],
    evaluation: Annotated[list[str], Parameter(help="pictures with classes to guess")],
    method: Annotated[
        Literal["linear", "knn", "both"],
        Parameter(help="a linear layer, the nearest neighbours, or one after the other"),
    ] = "both",
    neighbours: Annotated[int, Parameter(help="knn: how many vote")] = 20,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Guess classes from a model's vectors, and beside them from raw pixels. The model is not trained."""
    if not data:
        raise UsageError("there is nothing to learn from", remedy="craton probe MODEL TRAINING --evaluation TEST")
    if neighbours < 1:
        raise UsageError(f"--neighbours is 1 or more, not {neighbours}")

    from craton.data.pictures import read_pictures
    from craton.evaluation.probes import Method, Probe
    from craton.evaluation.probes import probe as measure

    loaded = load_seeing(model, dtype=dtype, threads=threads, quiet=json)
    shape = loaded.preprocessing
    size = (shape.crop or shape.size)[0]
    methods: tuple[Method, ...] = ("linear", "knn") if method == "both" else (method,)
    with status(quiet=json) as say:

        def read(sources: Sequence[str], names: Sequence[str] = ()) -> PictureSet:
            return read_pictures(sources, size=size, channels=shape.channels, names=names, shape=shape, on_progress=say)

        train = read(data)
        test = read(evaluation, train.names)
        loaded.preprocessing = shape.as_they_are()
        if train.labels is None or test.labels is None:
            raise UsageError("these pictures have no classes", remedy="put each class into a folder of its own")
        vectors = [_vectors(loaded, pictures, say) for pictures in (train, test)]
        pixels = [_pixels(part) for part in (train, test)]
        found: list[tuple[str, Probe]] = []
        for what, (learnt, guessed) in ((loaded.name, vectors), ("raw pixels", pixels)):
            for one in methods:
                say(f"{one} on {what}")
                result = measure(learnt, train.labels, guessed, test.labels, one, neighbours=neighbours)
                found.append((what, result))
    if json:
        rows = [
            {"vectors": what, "method": one.method, "accuracy": one.accuracy.value, "low": one.accuracy.low,
             "high": one.accuracy.high, "n": one.accuracy.n}
            for what, one in found
        ]  # fmt: skip
        print_json({"model": loaded.name, "train": len(train), "classes": len(train.names), "probes": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("vectors", "method", "right", "95 % interval"):
        table.add_column(column)
    for what, result in found:
        right = result.accuracy
        table.add_row(what, result.method, f"{right.value:.2%}", f"{right.low:.2%} to {right.high:.2%}")
    stdout.print(table)
    counts = f"{len(train):,} pictures to learn from, {len(test):,} to guess, {len(train.names)} classes"
    stdout.print(f"[dim]{counts}; always the most frequent one: {found[0][1].chance:.1%}[/]")


def _pixels(pictures: PictureSet) -> Tensor:
    """Raw pixels as vectors, of at most 32 x 32 of them: more would fill the memory and say little more."""
    import torch
    from torch.nn.functional import adaptive_avg_pool2d

    parts = []
    for start in range(0, len(pictures), 1024):
        some = torch.from_numpy(pictures.pixels[start : start + 1024]).permute(0, 3, 1, 2).float()
        height, width = some.shape[2:]
        parts.append(adaptive_avg_pool2d(some, (min(32, height), min(32, width))).flatten(1))
    return torch.cat(parts)


def _vectors(loaded: ImageModel, pictures: PictureSet, say: Callable[[str], None]) -> Tensor:
    # A picture of one channel goes to the model as shades of grey.
    rows = [p[..., 0] if p.shape[-1] == 1 else p for p in pictures.pixels]
    return loaded.embed_images(rows, lambda done: say(f"{done:,} of {len(rows):,} pictures seen"))
