"""From float32 to GGML's blocks of 256: each function reads values [n, 256] and fills blocks [n, block bytes].

A block's groups have scales of their own, which are small integers under the block's scale `d`. They are found by
trying some, and for the codes that each gives, the scale (and minimum) of least squares; large weights count for more.
The layout is ggml-common.h's; which of the possible blocks is chosen is not bit for bit llama.cpp's choice.
"""

from __future__ import annotations

import numpy as np

from craton.checkpoints.gguf.dequantize import Blocks, Values

TRIED = 11  # scales for each group; 21 lower the error by 0.1 %, 5 raise it by 0.9 %


def q4_k(values: Values, blocks: Blocks) -> None:
    """Eight groups of 32 four-bit codes: d * scale * code - dmin * minimum, with scales and minima of 6 bits."""
    groups = values.reshape(-1, 8, 32)
    scales, minima = _scale_and_minimum(groups, levels=15)
    d, dmin = (_scale_of_scales(numbers, 63) for numbers in (scales, minima))
    sc, mn = (np.minimum(np.rint(x * _inverse(y)), 63) for x, y in ((scales, d), (minima, dmin)))
    q = np.rint((groups + (dmin * mn)[:, :, None]) * _inverse(d * sc)[:, :, None]).clip(0, 15).astype(np.uint8)
    blocks[:, 0:2].view("<f2")[...], blocks[:, 2:4].view("<f2")[...] = d, dmin
    sc, mn = sc.astype(np.uint8), mn.astype(np.uint8)
    blocks[:, 4:8] = sc[:, :4] | sc[:, 4:] >> 4 << 6
    blocks[:, 8:12] = mn[:, :4] | mn[:, 4:] >> 4 << 6
    blocks[:, 12:16] = sc[:, 4:] & 15 | mn[:, 4:] << 4
    pairs = q.reshape(-1, 4, 2, 32)
    blocks[:, 16:] = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)


def q6_k(values: Values, blocks: Blocks) -> None:
    """Sixteen groups of 16 six-bit codes: d * scale * (code - 32), with scales of 8 bits."""
    groups = values.reshape(-1, 16, 16)
    scales = _scale(groups, lowest=-32)
    d = _scale_of_scales(np.abs(scales), 127)
    sc = np.rint(scales * _inverse(d)).clip(-128, 127)
    q = (np.rint(groups * _inverse(d * sc)[:, :, None]).clip(-32, 31) + 32).astype(np.uint8)
    halves = q.reshape(-1, 2, 4, 32)  # of 128 values, in fours of 32
    low, high = halves & 15, halves >> 4
    blocks[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
    blocks[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)
    blocks[:, 192:208].view(np.int8)[...] = sc
    blocks[:, 208:].view("<f2")[...] = d


def _scale_and_minimum(groups: Values, levels: int) -> tuple[Values, Values]:
    """For each group, s and m >= 0 of the least weighted error of s * code - m, with codes from 0 to `levels`."""
    weights = np.sqrt(np.mean(groups * groups, axis=2, keepdims=True)) + np.abs(groups)
    low = np.minimum(groups.min(axis=2, keepdims=True), 0)
    step = (groups.max(axis=2, keepdims=True) - low) / levels
    sum_w, sum_wx = weights.sum(axis=2), (weights * groups).sum(axis=2)

    def error_of(q: Values, scale: Values, minimum: Values) -> Values:
        off = scale[:, :, None] * q - minimum[:, :, None] - groups
        return np.asarray((weights * off * off).sum(axis=2))

    # What stands is the whole range divided evenly, which also holds groups of one and the same value.
    scales, minima = step[:, :, 0], -low[:, :, 0]
    best = error_of(np.rint((groups - low) * _inverse(step)), scales, minima)
    for tried in np.linspace(-1, 1, TRIED, dtype=np.float32):
        q = np.rint((groups - low) * (_inverse(step) * (1 + tried / levels))).clip(0, levels)
        wq = weights * q
        sum_wq, sum_wqq, sum_wqx = wq.sum(axis=2), (wq * q).sum(axis=2), (wq * groups).sum(axis=2)
        inverse = _inverse(sum_w * sum_wqq - sum_wq * sum_wq)
        scale = (sum_w * sum_wqx - sum_wx * sum_wq) * inverse
        minimum = (sum_wq * sum_wqx - sum_wqq * sum_wx) * inverse
        # A minimum above zero cannot be said: then the line through zero fits best.
        scale = np.where(minimum < 0, sum_wqx * _inverse(sum_wqq), scale)
        minimum = np.maximum(minimum, 0)
        error = error_of(q, scale, minimum)
        better = (error < best) & (scale >= 0)
        best = np.where(better, error, best)
        scales, minima = np.where(better, scale, scales), np.where(better, minimum, minima)
    return scales, minima


def _scale(groups: Values, lowest: int) -> Values:
    """For each group, s, of either sign, of the least error of s * code weighed by squares, with codes from `lowest` to
    -lowest - 1."""
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)
    weighted = groups * groups * groups
    best = np.full(groups.shape[:2], -1, np.float32)
    scales = np.zeros_like(best)
    for tried in np.linspace(-1, 1, TRIED, dtype=np.float32):
        q = np.rint(groups * (_inverse(extreme) * (lowest - tried))).clip(lowest, -lowest - 1)
        sum_xq = (weighted * q).sum(axis=2)
        scale = sum_xq * _inverse((groups * groups * q * q).sum(axis=2))
        explained = scale * sum_xq
        better = explained > best
        best, scales = np.where(better, explained, best), np.where(better, scale, scales)
    return scales


def _scale_of_scales(numbers: Values, largest: int) -> Values:
    """The block's scale, a float16 in [n, 1], under which all its groups' scales are at most `largest`.

    Small weights have one of few digits (a subnormal), which is rounded up, so that no group's scale is cut off.
    """
    wanted = numbers.max(axis=1, keepdims=True) / np.float32(largest)
    half = wanted.astype(np.float16)
    half = np.where(half < wanted, np.nextafter(half, np.float16(np.inf)), half)
    return half.astype(np.float32)


def _inverse(numbers: Values) -> Values:
    """1 / x; 0 where x is 0 or so small that 1 / x overflows."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / numbers
    return np.where(np.isfinite(inverse), inverse, np.float32(0))
