"""What this machine can do, measured in a moment: the peak of its matrix products, and the dtype that is fast on it."""

from __future__ import annotations

import math
import time
from typing import Final

import torch

from craton.training.settings import ComputeDType

PEAK_SIZE: Final = 2048


def compute_dtype(choice: ComputeDType, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of activations, and why."""
    if choice != "auto":
        return getattr(torch, choice), "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "this GPU multiplies it in hardware"
        return torch.float32, "this GPU has no bfloat16"
    if torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU has AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "this CPU has AVX512-BF16"
    return torch.float32, "this CPU only emulates bfloat16"


def gemm_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.5) -> float:
    """FLOP/s of the best of several large square products, over `seconds`: what the products of a model could reach."""
    a = torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype)
    out = torch.empty_like(a)
    best, started = float("inf"), time.perf_counter()
    torch.mm(a, a, out=out)
    while math.isinf(best) or time.perf_counter() - started < seconds:  # on a busy machine one may take longer
        _synchronise(device)
        begin = time.perf_counter()
        torch.mm(a, a, out=out)
        _synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * PEAK_SIZE**3 / best


def use_threads(threads: int | None) -> int:
    """Compute with so many CPU threads (none: as torch found the machine); how many that is."""
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
