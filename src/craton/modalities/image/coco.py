"""Masks as COCO's run lengths, which pycocotools and most labelling tools read.

A mask is read column by column; its runs are counted, of background and of the thing in turn, background first (0
where the mask begins with the thing). The compressed form (pycocotools, maskApi.c) writes, from the fourth count on,
the difference to the count two before: five bits to a character, lowest first, 32 added where more follow, and 48 to
all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn, TypedDict

import numpy as np
from numpy.typing import NDArray

from craton.errors import FileFormatError, UsageError

PIXELS: Final = 1 << 28  # a few characters may claim any size; more than this is refused
DIGITS: Final = 7  # a count of more characters than that is beyond every size


class RunLengths(TypedDict):
    """size: [height, width]. counts: the compressed form."""

    size: list[int]
    counts: str


def encode_rle(mask_HW: NDArray[np.bool_]) -> RunLengths:
    """A mask [H, W] as run lengths. Raises UsageError where it is not one of bool, or has no pixel."""
    if mask_HW.ndim != 2 or mask_HW.dtype != np.bool_ or not mask_HW.size:
        raise UsageError(
            f"a mask is bool [H, W], not {mask_HW.dtype} {list(mask_HW.shape)}", remedy="compare it with a threshold"
        )
    flat = mask_HW.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    if flat[0]:
        counts.insert(0, 0)
    return {"size": list(mask_HW.shape), "counts": _compressed(counts)}


def decode_rle(rle: Mapping[str, Any], where: str = "the mask") -> NDArray[np.bool_]:
    """The mask [H, W] of {"size": [H, W], "counts": C}. C: the compressed form (text or bytes), or a list of counts.

    Raises FileFormatError where the two do not fit each other, or are not what they should be.
    """
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(_is_count(side) and side > 0 for side in size):
        _refuse(f"the size of a mask is [height, width], not {str(size)[:80]}", where)
    height, width = size
    if height * width > PIXELS:
        _refuse(f"a mask of {height:,} x {width:,} pixels, where {PIXELS:,} are read", where)
    if isinstance(counts, str | bytes):
        counts = _expanded(counts.encode() if isinstance(counts, str) else counts, where)
    if not isinstance(counts, list) or not all(_is_count(n) for n in counts):
        _refuse("the counts of a mask are its compressed text or a list of whole numbers", where)
    if sum(counts) != height * width:
        _refuse(f"the runs of the mask are {sum(counts):,} pixels, where {height} x {width} are", where)
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(height, width, order="F")


def _compressed(counts: Sequence[int]) -> str:
    written = bytearray()
    for i, count in enumerate(counts):
        rest = count - counts[i - 2] if i > 2 else count
        while True:
            digit, rest = rest & 31, rest >> 5
            # The fifth bit is the sign: what is left must be nothing but that.
            done = rest == (-1 if digit & 16 else 0)
            written.append(48 + digit + (0 if done else 32))
            if done:
                break
    return written.decode("ascii")


def _expanded(text: bytes, where: str) -> list[int]:
    counts: list[int] = []
    value, shift = 0, 0
    for at, character in enumerate(text):
        code = character - 48
        if not 0 <= code < 64 or shift == 5 * DIGITS:
            _refuse("the counts of the mask are not in COCO's compressed form", f"{where}: character {at + 1}")
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            if code & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value, shift = 0, 0
    if shift:
        _refuse("the counts of the mask are cut short", where)
    return counts


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= PIXELS


def _refuse(what: str, where: str) -> NoReturn:
    raise FileFormatError(what, where=where, remedy="export the annotations again")
