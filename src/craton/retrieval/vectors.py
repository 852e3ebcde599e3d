"""Search by vectors: exact cosine over one byte per dimension in memory and the stored vectors on disk.

The matrix in memory holds every vector rounded to 8 bits, with a bound of what the rounding changed. A first pass over
it (an integer product, 1 ms for 100,000 vectors of 384 dimensions) leaves the few rows that can still be among the
best k; those are read from the collection and scored in float32. So the answer is that of a search over all stored
vectors, with less than half of their memory: D + 16 bytes for each, 40 MB for 100,000 of 384 dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from craton.errors import DataError, UsageError

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

BLOCK: Final = 65_536  # rows of one matrix: adding a few never copies all the others
SLACK: Final = 1e-5  # what float32 arithmetic itself may change in a cosine of unit vectors


class VectorStore(Protocol):
    """Where vectors are searched. Ids are those of the chunks; vectors have length 1 and are float32, [N, D]."""

    def ids(self) -> Ids:
        """All ids that are there, ascending."""
        ...

    def add(self, ids: Ids, vectors_ND: Vectors) -> None:
        """Add vectors whose ids are not there yet."""
        ...

    def remove(self, ids: Ids) -> None:
        """Remove these ids; those that are not there are no error."""
        ...

    def search(self, vector_D: Vectors, k: int, allowed: Ids | None = None) -> tuple[Ids, Vectors]:
        """The k nearest by cosine, best first, equals by ascending id; only those in `allowed` (ascending) if given."""
        ...

    def close(self) -> None:
        """Give up what is held."""
        ...


class ExactVectors:
    """A `VectorStore` in memory. `stored` gives the vectors of ascending ids, as the collection's file holds them."""

    def __init__(self, width: int, stored: Callable[[Ids], Vectors]) -> None:
        self._width, self._stored = width, stored
        self._blocks: list[_Block] = []

    def ids(self) -> Ids:
        """All ids that are there, ascending."""
        parts = [block.ids for block in self._blocks]
        return np.sort(np.concatenate(parts)) if parts else np.empty(0, dtype=np.int64)

    def add(self, ids: Ids, vectors_ND: Vectors) -> None:
        """Add vectors whose ids are not there yet."""
        for start in range(0, len(ids), BLOCK):
            block = _Block.of(ids[start : start + BLOCK], vectors_ND[start : start + BLOCK])
            if self._blocks and len(self._blocks[-1].ids) + len(block.ids) <= BLOCK:
                block = self._blocks.pop().joined(block)
            self._blocks.append(block)

    def remove(self, ids: Ids) -> None:
        """Remove these ids; those that are not there are no error."""
        kept = [block.without(ids) for block in self._blocks]
        self._blocks = [block for block in kept if len(block.ids)]

    def search(self, vector_D: Vectors, k: int, allowed: Ids | None = None) -> tuple[Ids, Vectors]:
        """The k nearest by cosine, best first, equals by ascending id; only those in `allowed` (ascending) if given."""
        blocks = self._blocks if allowed is None else [block.only(allowed) for block in self._blocks]
        blocks = [block for block in blocks if len(block.ids)]
        if not blocks or k < 1:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        ids_N = np.concatenate([block.ids for block in blocks])
        with one_thread():
            query = _Query(unit(vector_D[None], self._width)[0])
            score_N = torch.cat([block.scores(query) for block in blocks])
            error_N = torch.cat([block.errors for block in blocks]) + query.error
            # The k-th of what all rows have at least: a row that cannot reach it is not among the best k.
            floor = torch.topk(score_N - error_N, min(k, len(ids_N))).values[-1]
            near = np.sort(ids_N[(score_N + error_N >= floor).numpy()])
        exact = cosines(self._stored(near), query.vector)
        order = np.lexsort((near, -exact))[:k]
        return near[order], exact[order]

    def close(self) -> None:
        """Give up what is held."""
        self._blocks = []


class _Query:
    """A unit vector as the sum of two of 8 bits each, which is within 0.0001 of it."""

    def __init__(self, vector_D: Vectors) -> None:
        self.vector = vector_D
        whole = torch.from_numpy(vector_D)
        self.coarse, coarse_scale = _rounded(whole[None])
        rest = whole[None] - self.coarse * coarse_scale[:, None]
        self.fine, fine_scale = _rounded(rest)
        self.scales = (float(coarse_scale), float(fine_scale))
        left = rest - self.fine * fine_scale[:, None]
        self.error = float(left.norm()) * 1.05 + SLACK  # rounded rows are a little longer than 1 at most


class _Block:
    """Some rows, rounded. errors: how much the rounding of each row can change its cosine with any unit vector."""

    def __init__(self, ids: Ids, codes: Tensor, scales: Tensor, errors: Tensor) -> None:
        self.ids, self.codes, self.scales, self.errors = ids, codes, scales, errors

    @staticmethod
    def of(ids: Ids, vectors_ND: Vectors) -> _Block:
        exact = torch.from_numpy(np.ascontiguousarray(vectors_ND))
        codes, scales = _rounded(exact)
        return _Block(ids, codes, scales, (exact - codes * scales[:, None]).norm(dim=1))

    def scores(self, query: _Query) -> Tensor:
        # Two products with one column each are twice as fast as one with two columns.
        coarse, fine = (torch._int_mm(self.codes, part.T)[:, 0].float() for part in (query.coarse, query.fine))
        return (coarse * query.scales[0] + fine * query.scales[1]) * self.scales

    def only(self, allowed: Ids) -> _Block:
        place = np.searchsorted(allowed, self.ids)
        place[place == len(allowed)] = 0
        return self._at(allowed[place] == self.ids if len(allowed) else np.zeros(len(self.ids), dtype=bool))

    def without(self, ids: Ids) -> _Block:
        gone = np.isin(self.ids, ids)
        return self._at(~gone) if gone.any() else self

    def joined(self, other: _Block) -> _Block:
        pairs = ((self.codes, other.codes), (self.scales, other.scales), (self.errors, other.errors))
        codes, scales, errors = (torch.cat(pair) for pair in pairs)
        return _Block(np.concatenate([self.ids, other.ids]), codes, scales, errors)

    def _at(self, mask: NDArray[np.bool_]) -> _Block:
        rows = torch.from_numpy(np.flatnonzero(mask))
        return _Block(self.ids[mask], self.codes[rows], self.scales[rows], self.errors[rows])


def unit(vectors_ND: Vectors, width: int | None = None) -> Vectors:
    """These vectors with length 1, float32; one of zeros stays as it is.

    Raises:
        UsageError: they do not have `width` dimensions.
        DataError: one is not finite.
    """
    vectors_ND = np.asarray(vectors_ND, dtype=np.float32)
    if width is not None and vectors_ND.shape[-1] != width:
        raise UsageError(
            f"a vector of {vectors_ND.shape[-1]} dimensions for a collection of {width}",
            remedy="use the encoder that the collection was made with, or rebuild it for this one",
        )
    length_N = np.linalg.norm(vectors_ND.astype(np.float64), axis=-1, keepdims=True)
    if not np.isfinite(length_N).all():
        raise DataError("a vector is not finite", remedy="the encoder gave NaN or infinity: use another dtype or model")
    return (vectors_ND / np.where(length_N > 0, length_N, 1)).astype(np.float32)


def cosines(vectors_ND: Vectors, vector_D: Vectors) -> Vectors:
    """The dot products of unit vectors, so exact that equal vectors get equal ones wherever in the matrix they are."""
    return (vectors_ND.astype(np.float64) @ vector_D.astype(np.float64)).astype(np.float32)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """One thread for the tensors in the block.

    Each step takes a millisecond at most. A second thread would save half of it, and on a busy machine each step was
    seen to wait 8 ms for it: a search over 100,000 vectors took 100 ms instead of 4.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _rounded(exact: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, D] and a scale for each row, so that codes * scale is near `exact`."""
    scales = exact.abs().amax(dim=1) / 127
    return (exact / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8), scales
