"""Packed weights and the three things done with them: multiply, look rows up, unpack."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from craton.errors import UnknownName, UsageError
from craton.inference.native import library as native

GROUP = 32  # inputs that share a scale
FORMATS = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 8}  # GGML's name and number
_GROUP_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}  # in a GGUF file
_TYPES = {torch.float32: 0, torch.bfloat16: 1}  # craton_type

_threads = torch.get_num_threads()


def set_threads(threads: int) -> None:
    """Use at most `threads` threads in calls that do not say; at first, as many as torch uses."""
    global _threads
    if threads < 1:
        raise UsageError(f"{threads} threads cannot compute anything", remedy="give 1 or more")
    _threads = threads


class PackedWeight:
    """A weight matrix [n, k] in 4 or 8 bits, reordered for the kernels (layout: cpp/layout.h).

    data: uint8 [bytes], in the packed layout. kind: a key of `FORMATS`. The bytes are those of the GGUF blocks, in
    another order, with n rounded up to 16.
    """

    __slots__ = ("_weight", "address", "data", "k", "kind", "n")

    def __init__(self, data: Tensor, n: int, k: int, kind: str) -> None:
        size = packed_bytes(kind, n, k)
        if data.dtype != torch.uint8 or data.device.type != "cpu" or not data.is_contiguous() or data.numel() != size:
            raise UsageError(f"a packed {kind} weight [{n}, {k}] is {size} contiguous bytes, not {_describe(data)}")
        self.data, self.n, self.k, self.kind = data, n, k, kind
        self._weight = native.Weight(data.data_ptr(), n, k, FORMATS[kind])
        self.address = ctypes.addressof(self._weight)

    @classmethod
    def from_gguf_blocks(cls, kind: str, blocks: Tensor) -> PackedWeight:
        """Pack GGUF blocks: uint8 [n, bytes of a row], row i being blocks of 32 inputs one after another.

        Raises UnknownName for a kind that is not in `FORMATS`, UsageError for rows that are not whole blocks.
        """
        if kind not in FORMATS:
            raise UnknownName("packed weight format", kind, FORMATS)
        if blocks.dtype != torch.uint8 or blocks.dim() != 2 or blocks.device.type != "cpu":
            raise UsageError(f"{kind} blocks are uint8 [rows, bytes] on the CPU, not {_describe(blocks)}")
        n, row_bytes = blocks.shape
        if row_bytes == 0 or row_bytes % _GROUP_BYTES[kind]:
            raise UsageError(
                f"a row of {row_bytes} bytes is not whole {kind} blocks of {_GROUP_BYTES[kind]} bytes",
                remedy=f"a row needs a multiple of {GROUP} inputs",
            )
        k = row_bytes // _GROUP_BYTES[kind] * GROUP
        blocks = blocks.contiguous()
        data = torch.empty(packed_bytes(kind, n, k), dtype=torch.uint8)
        _check(
            native.library().craton_pack(FORMATS[kind], n, k, blocks.data_ptr(), row_bytes, data.data_ptr(), _threads)
        )
        return cls(data, n, k, kind)

    def move(self, data: Tensor) -> None:
        """Keep the bytes in `data`, uint8 of the same size, from now on."""
        data.copy_(self.data)
        self.data = data
        self._weight.data = data.data_ptr()

    def __repr__(self) -> str:
        return f"PackedWeight({self.kind} [{self.n}, {self.k}])"


def packed_bytes(kind: str, n: int, k: int) -> int:
    """Bytes of a packed [n, k] weight. Raises UsageError if k is not a positive multiple of 32."""
    if kind not in FORMATS:
        raise UnknownName("packed weight format", kind, FORMATS)
    size: int = native.library().craton_packed_bytes(FORMATS[kind], n, k)
    if size < 0:
        raise UsageError(
            f"a weight of {n} rows and {k} inputs cannot be packed as {kind}",
            remedy=f"inputs must be a positive multiple of {GROUP}; keep this layer in bf16 or fp32",
        )
    return size


def linear(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    threads: int | None = None,
    parts: int = 2,
) -> Tensor:
    """x @ weight.T + bias: [m, k] -> [m, n], with x quantised to int8, one scale for 32 inputs.

    parts: 2 quantises what the first rounding left over as well, on a finer scale, and keeps about 15 bits of each
    activation; 1 keeps 8 and takes half the arithmetic, which shows with many rows (with few, the weights' bytes
    decide). 0, which needs `has_tiles()`, rounds activations and weights to bfloat16: many times faster with many rows.

    x: fp32 or bf16. bias: fp32 [n]. out: fp32 or bf16 [m, n], which must not overlap x; by default new, of x's type.
    Sums are in fp32, and a row's result is the same bits whatever m, threads and instruction set are. A row that holds
    a NaN or an infinity gives a row of NaN.

    Raises UsageError for tensors that do not fit.
    """
    shape = x.shape
    x_type = _TYPES.get(x.dtype)
    if len(shape) != 2 or shape[1] != weight.k or x_type is None or not x.is_cpu:
        raise UsageError(f"{weight} multiplies fp32 or bf16 [m, {weight.k}] on the CPU, not {_describe(x)}")
    x_stride, step = x.stride()
    if step != 1:
        x = x.contiguous()
        x_stride = weight.k
    m = shape[0]
    if out is None:
        out = x.new_empty(m, weight.n)
        out_stride, out_type = weight.n, x_type
    else:
        out_stride, out_type = _check_out(out, m, weight.n)
    status = native.library().craton_linear(
        weight.address,
        x.data_ptr(),
        m,
        x_stride,
        x_type,
        parts,
        None if bias is None else _bias_pointer(bias, weight.n),
        out.data_ptr(),
        out_stride,
        out_type,
        threads or _threads,
    )
    _check(status)
    return out


def rows(weight: PackedWeight, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` [...] of the weight as fp32 or bf16 [..., k]: a look-up in a packed embedding.

    Raises UsageError for ids that are not integers below n.
    """
    if ids.is_floating_point() or ids.is_complex() or not ids.is_cpu:
        raise UsageError(f"row ids are integers on the CPU, not {_describe(ids)}")
    ids = ids.to(torch.int64).contiguous()
    out = torch.empty((*ids.shape, weight.k), dtype=dtype)
    status = native.library().craton_rows(
        weight.address, ids.data_ptr(), ids.numel(), out.data_ptr(), _float_type(dtype), _threads
    )
    if status == native.BAD_ARGUMENT:
        raise UsageError(
            f"row ids from {int(ids.min())} to {int(ids.max())} of {weight}, which has rows 0 to {weight.n - 1}"
        )
    _check(status)
    return out


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The whole weight as fp32 or bf16 [n, k], for a matrix product elsewhere."""
    out = torch.empty((weight.n, weight.k), dtype=dtype)
    _check(native.library().craton_rows(weight.address, None, weight.n, out.data_ptr(), _float_type(dtype), _threads))
    return out


def _float_type(dtype: torch.dtype) -> int:
    if dtype not in _TYPES:
        raise UsageError(f"packed weights unpack to fp32 or bf16, not {dtype}")
    return _TYPES[dtype]


def _check_out(out: Tensor, m: int, n: int) -> tuple[int, int]:
    """The row stride and type of a tensor to write [m, n] to."""
    out_type = _TYPES.get(out.dtype)
    if out_type is None or tuple(out.shape) != (m, n) or (out.stride(1) != 1 and n > 1) or not out.is_cpu:
        raise UsageError(f"the result is fp32 or bf16 [{m}, {n}] on the CPU, contiguous in n; out is {_describe(out)}")
    return out.stride(0), out_type


def _bias_pointer(bias: Tensor, n: int) -> int:
    if bias.dtype != torch.float32 or tuple(bias.shape) != (n,) or not bias.is_contiguous() or not bias.is_cpu:
        raise UsageError(f"the bias is contiguous fp32 [{n}] on the CPU, not {_describe(bias)}")
    return bias.data_ptr()


def _describe(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device.type}"


def _check(status: int) -> None:
    if status == native.NO_MEMORY:
        raise MemoryError("no memory for the quantised activations")
    if status != native.OK:
        raise UsageError(f"the native kernels refused a call (status {status})")
