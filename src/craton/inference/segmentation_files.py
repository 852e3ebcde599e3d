"""Segments as files: a mask each as PNG, all as COCO's run lengths, a drawing, and the logits to go on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from craton.checkpoints.disk import disk_errors, replace_file
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.errors import FileFormatError, UsageError
from craton.inference.segmentation import SeenPicture, Segment
from craton.modalities.image import Pixels, encode_png

LARGEST: Final = 1 << 28  # bytes of a .npy file
LOGITS, IOU = "logits", "predicted_iou"  # tensors of a file of logits


@dataclass(frozen=True)
class SegmentFiles:
    """Where the answer about one picture is written. logits: None where they are not kept."""

    folder: Path
    picture: str
    document: Path
    drawing: Path
    logits: Path | None

    @classmethod
    def of(cls, picture: str | Path, folder: Path, *, logits: bool = False) -> SegmentFiles:
        """Files named after the picture. Raises UsageError where one of them is there already."""
        stem = Path(picture).stem
        kept = folder / f"{stem}-logits.safetensors" if logits else None
        files = cls(folder, Path(picture).name, folder / f"{stem}.json", folder / f"{stem}-drawing.png", kept)
        _refuse_taken([files.mask(1), files.document, files.drawing, *([kept] if kept is not None else [])])
        return files

    def mask(self, number: int) -> Path:
        """The file of a mask, by its number from 1."""
        return self.folder / f"{Path(self.picture).stem}-{number}.png"

    def write(self, seen: SeenPicture, found: Sequence[Segment], drawing: Pixels) -> list[Path]:
        """Write all of them, and name them; the folder is made where it is not there.

        The document is as of one picture of SA-1B: {"image": {...}, "annotations": [{...}]}, COCO's keys.
        Raises UsageError where a mask's file is there already, StoreError where one cannot be written.
        """
        masks = [self.mask(number) for number in range(1, len(found) + 1)]
        _refuse_taken(masks)
        with disk_errors("make the folder", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        for path, one in zip(masks, found, strict=True):
            replace_file(path, encode_png(one.mask.astype(np.uint8) * 255))
        replace_file(self.drawing, encode_png(drawing))
        written = [*masks, self.drawing]
        if self.logits is not None and found:
            tensors = {
                LOGITS: torch.from_numpy(np.stack([one.logits for one in found])),
                IOU: torch.tensor([one.predicted_iou for one in found], dtype=torch.float32),
            }
            write_safetensors(self.logits, tensors)
            written.append(self.logits)
        annotations = [
            {"id": number, "file_name": path.name} | one.annotation()
            for number, (path, one) in enumerate(zip(masks, found, strict=True), 1)
        ]
        image = {"file_name": self.picture, "height": seen.height, "width": seen.width}
        text = json.dumps({"image": image, "annotations": annotations}, ensure_ascii=False, indent=1)
        replace_file(self.document, f"{text}\n".encode())
        return [*written, self.document]


def read_logits(path: Path) -> NDArray[np.float32]:
    """Logits [h, w] of an earlier mask: of a .npy file, or of a .safetensors file as `SegmentFiles` writes it, where of
    several masks the one is taken that was expected to fit best.

    Raises UsageError for another file, and where nothing says which of several is meant, FileFormatError for a damaged
    one.
    """
    if not path.is_file():
        raise UsageError("no such file of an earlier mask", where=str(path), remedy="check the path")
    if path.suffix == ".npy":
        return _one(_read_npy(path), None, path)
    if path.suffix != ".safetensors":
        raise UsageError(f"{path} does not end with .npy or .safetensors", remedy="take a file of --keep-logits")
    file = SafetensorsFile.open(path)
    if LOGITS not in file.tensors:
        raise UsageError(f"there is no tensor {LOGITS!r}", where=str(path), remedy="take a file of --keep-logits")
    scores = file.tensor(IOU).float().numpy() if IOU in file.tensors else None
    return _one(file.tensor(LOGITS).float().clone().numpy(), scores, path)


def _read_npy(path: Path) -> NDArray[np.float32]:
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        read = np.load(path, allow_pickle=False)
        if not isinstance(read, np.ndarray) or read.dtype.kind != "f":
            raise ValueError("it holds no floating-point numbers")
    except (OSError, ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise FileFormatError(
            f"this is no array of logits: {error}", where=str(path), remedy="write it with numpy.save"
        ) from None
    return read.astype(np.float32)


def _one(logits: NDArray[np.float32], scores: NDArray[np.float32] | None, path: Path) -> NDArray[np.float32]:
    if logits.ndim < 3 or len(logits) == 1:
        return logits
    if scores is None or scores.shape != logits.shape[:1]:
        raise UsageError(
            f"{len(logits)} masks, and nothing says which is meant", where=str(path), remedy="write one of them alone"
        )
    best: NDArray[np.float32] = logits[int(scores.argmax())]
    return best


def _refuse_taken(paths: Sequence[Path]) -> None:
    taken = next((path for path in paths if path.exists()), None)
    if taken is not None:
        raise UsageError(f"{taken} exists already", remedy="name another folder, or remove it first")
