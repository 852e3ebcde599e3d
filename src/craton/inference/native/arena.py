"""All packed weights in one region of huge pages: a step reads every one of them, and with pages of 4 kB the processor
spends a sixth to a quarter of that time looking addresses up (docs/log.md)."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from craton.checkpoints.disk import trim_heap
from craton.inference.native.packed import PackedWeight

HUGE_PAGE = 2 << 20
LINE = 64  # the packed layout's own alignment
TRIMMED = 8 << 20  # bytes moved before the places that they left are given back


def gather(weights: Sequence[PackedWeight]) -> None:
    """Move the weights' bytes into one region, in this order. Where the system has no huge pages, they stay."""
    size = sum(_whole_lines(weight.data.numel()) for weight in weights)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    region = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        region.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return  # a kernel without them
    bytes_ = torch.frombuffer(region, dtype=torch.uint8)
    start = -bytes_.data_ptr() % HUGE_PAGE
    left = 0
    for weight in weights:
        length = weight.data.numel()
        weight.move(bytes_[start : start + length])
        start += _whole_lines(length)
        left += length
        if left >= TRIMMED:
            trim_heap()
            left = 0
    trim_heap()


def _whole_lines(length: int) -> int:
    return -(-length // LINE) * LINE
