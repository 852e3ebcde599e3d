"""Random GGUF blocks, their meaning in NumPy, and a choice of instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from craton.errors import UnknownName
from craton.inference import native
from craton.inference.native import library

QUANT_BYTES = {"Q4_0": 16, "Q4_1": 16, "Q8_0": 32}


@pytest.fixture
def kernels() -> Iterator[None]:
    """Skip without the kernels; afterwards, have the best instruction set again."""
    if not native.available():
        pytest.skip(native.reason())
    best = native.isa()
    yield
    library.select_isa(best)


@pytest.fixture(params=library.ISAS)
def isa(request: pytest.FixtureRequest, kernels: None) -> str:
    """Each instruction set that this CPU has."""
    try:
        library.select_isa(request.param)
    except UnknownName:
        pytest.skip(f"this CPU has no {request.param}")
    return str(request.param)


@pytest.fixture
def make_blocks() -> Callable[..., tuple[Tensor, Tensor]]:
    """make_blocks(kind, n, k, seed=0) -> (GGUF blocks uint8 [n, bytes], the weight that they mean fp32 [n, k])."""

    def make(kind: str, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        random = np.random.default_rng(seed)
        shape = (n, k // 32, 1)
        scale = random.normal(size=shape).astype(np.float16)
        packed = random.integers(0, 256, size=(n, k // 32, QUANT_BYTES[kind]), dtype=np.uint8)
        header = [scale]
        if kind == "Q8_0":
            weight = packed.view(np.int8) * scale.astype(np.float32)
        else:
            quants = np.concatenate([packed & 15, packed >> 4], axis=2)
            if kind == "Q4_0":
                weight = (quants.astype(np.float32) - 8) * scale.astype(np.float32)
            else:
                minimum = random.normal(size=shape).astype(np.float16)
                header.append(minimum)
                weight = quants * scale.astype(np.float32) + minimum.astype(np.float32)
        blocks = np.concatenate([*(part.view(np.uint8) for part in header), packed], axis=2)
        return torch.from_numpy(blocks.reshape(n, -1)), torch.from_numpy(weight.astype(np.float32).reshape(n, k))

    return make
