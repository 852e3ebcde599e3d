"""`craton segment`: cut out of a picture what is pointed at, or everything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from craton.cli.flags import Flags, given
from craton.cli.options import DType, Json, Threads
from craton.cli.terminal import print_json, status, stderr, stdout
from craton.config.resolve import FLAGS, resolve
from craton.errors import UsageError
from craton.inference.segmentation_settings import EverythingSettings

if TYPE_CHECKING:
    from craton.inference.segmentation import SeenPicture, Segment, SegmentationModel


class _Prompt(NamedTuple):
    points: list[tuple[float, float]]
    labels: list[int]
    box: tuple[float, ...] | None


def segment(
    image: Annotated[str, Parameter(help="a picture file")],
    /,
    *,
    model: Annotated[str, Parameter(name=["--model", "-m"], help="a name or a path")],
    points: Annotated[
        list[str] | None,
        Parameter(
            negative="",
            help="X,Y in the picture's pixels, on what is meant; X,Y,out: on what is not; several times for more",
        ),
    ] = None,
    box: Annotated[str | None, Parameter(help="X0,Y0,X1,Y1 around what is meant: upper left and lower right")] = None,
    mask: Annotated[
        Path | None, Parameter(help="an earlier answer (--keep-logits, or a .npy file) that is to be made better")
    ] = None,
    everything: Annotated[
        bool, Parameter(negative="", help="all that can be found, by a grid of points, and without a prompt")
    ] = False,
    several: Annotated[
        bool, Parameter(negative="", help="all guesses at what is meant, the likeliest first, not the likeliest alone")
    ] = False,
    mirrored: Annotated[
        bool, Parameter(negative="", help="see the mirror image as well: masks a little better for twice the time")
    ] = False,
    out: Annotated[
        Path | None,
        Parameter(help="a folder: a .png for each mask, all as COCO's run lengths in a .json, and a drawing"),
    ] = None,
    keep_logits: Annotated[
        bool, Parameter(negative="", help="write the masks' logits for --mask, too, as .safetensors")
    ] = False,
    flags: Flags[EverythingSettings] | None = None,
    dtype: DType = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Cut out of a picture what clicks or a box mean, or everything, as masks with their scores."""
    settings, _ = resolve(EverythingSettings, [(FLAGS, given(flags))])
    prompt = _Prompt(*_points(points or []), _box(box) if box is not None else None)
    _check(prompt, mask, everything, several, given(flags), out, keep_logits)
    from craton.inference.segmentation import load_segmenter
    from craton.inference.segmentation_files import SegmentFiles, read_logits
    from craton.modalities.image import read_image
    from craton.modalities.image.overlay import side_by_side

    files = SegmentFiles.of(image, out, logits=keep_logits) if out is not None else None
    pixels = read_image(image)  # what is no picture is refused before the model is loaded
    earlier = read_logits(mask) if mask is not None else None
    loaded = load_segmenter(model, dtype=dtype, threads=threads)
    if not json:
        stderr.print(f"[dim]{stderr.escape(loaded.name)} · {stderr.escape(' · '.join(loaded.plan.decisions))}[/]")
    seen = loaded.look(pixels, mirrored=mirrored)
    if everything:
        with status(quiet=json) as say:
            found = seen.everything(settings, lambda done, total: say(f"{done} of {total} points asked"))
    else:
        found = seen.segment(prompt.points, prompt.labels, prompt.box, earlier, several=several)
    written: list[Path] = []
    if files is not None:
        parts = [[one] for one in found] if several else [found]
        drawings = [
            seen.draw(part, *prompt, spotlight=not everything, first=number) for number, part in enumerate(parts)
        ]
        written = files.write(seen, found, side_by_side(drawings))
    if json:
        _print_json(loaded, image, seen, found, written)
    else:
        _print(seen, found, written)


def _points(given: Sequence[str]) -> tuple[list[tuple[float, float]], list[int]]:
    points, labels = [], []
    for text in given:
        numbers, label = text.split(","), 1
        if len(numbers) == 3 and numbers[2].strip() in ("in", "out"):
            label = int(numbers.pop().strip() == "in")
        x, y = _numbers(text, numbers, 2, "--points", "X,Y or X,Y,out, as 120,80")
        points.append((x, y))
        labels.append(label)
    return points, labels


def _box(text: str) -> tuple[float, ...]:
    return _numbers(text, text.split(","), 4, "--box", "X0,Y0,X1,Y1, as 20,30,200,180")


def _numbers(text: str, parts: Sequence[str], count: int, flag: str, form: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        raise UsageError(f"{text!r} is not what {flag} takes", where=flag, remedy=f"write {form}")
    return numbers


def _check(
    prompt: _Prompt,
    mask: Path | None,
    everything: bool,
    several: bool,
    grid: dict[str, Any],
    out: Path | None,
    keep_logits: bool,
) -> None:
    asked = bool(prompt.points) or prompt.box is not None or mask is not None
    if everything and (asked or several):
        raise UsageError("--everything takes no --points, --box, --mask or --several", remedy="leave them out")
    if not everything and not asked:
        raise UsageError(
            "nothing says what to segment", remedy="give --points X,Y, --box X0,Y0,X1,Y1, --mask FILE or --everything"
        )
    if grid and not everything:
        raise UsageError(f"--{next(iter(grid)).replace('_', '-')} is of --everything", remedy="add --everything")
    if keep_logits and out is None:
        raise UsageError("--keep-logits needs a place", remedy="name a folder with --out")


def _print_json(
    loaded: SegmentationModel, image: str, seen: SeenPicture, found: Sequence[Segment], files: Sequence[Path]
) -> None:
    print_json(
        {
            "model": loaded.name,
            "image": {"file_name": image, "height": seen.height, "width": seen.width},
            "annotations": [one.annotation() for one in found],
            "files": [str(path) for path in files],
        }
    )


def _print(seen: SeenPicture, found: Sequence[Segment], files: Sequence[Path]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("mask", "expected IoU", "stability", "of the picture"):
        table.add_column(column, justify="right")
    table.add_column("x0 y0 x1 y1")
    for number, one in enumerate(found, 1):
        share = one.area / (seen.height * seen.width)
        edges = " ".join(str(edge) for edge in one.box)
        table.add_row(str(number), f"{one.predicted_iou:.3f}", f"{one.stability:.3f}", f"{share:.1%}", edges)
    stdout.print(table if found else "nothing that is certain enough; see --min-iou and --min-stability")
    for path in files:
        stdout.print(str(path), markup=False, soft_wrap=True)
