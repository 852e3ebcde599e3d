"""The vectors of a collection in Qdrant Edge: the engine of the Qdrant server, in this process (`craton[qdrant]`).

    Collection.open(path, lambda width: QdrantVectors(folder, width))

The SQLite file stays the truth: text, words, filters and vectors are in it, and at the first search after a change the
folder is given what it lacks and loses what is gone, so it may be deleted at any time. It pays where vectors should not
take this process's memory, or where its approximate index (HNSW, beyond 20,000 vectors by its own rules) is quicker
than an exact pass; with `exact` the answers are those of `ExactVectors`.

A Qdrant server is reached by the same five methods over `qdrant_client.QdrantClient(url, api_key=...)` (install
qdrant-client; it is not needed here): `upsert`, `delete`, `scroll` and `query_points` take the same points and filters,
and Edge's data format is the server's.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from craton.checkpoints.disk import disk_errors
from craton.errors import StoreError, UsageError
from craton.retrieval.vectors import Ids, Vectors, unit

if TYPE_CHECKING:
    import qdrant_edge

_AT_ONCE: Final = 4096  # points in one update or page


class QdrantVectors:
    """A `VectorStore` in a folder of its own. exact: compare with every vector instead of asking the index."""

    def __init__(self, folder: str | Path, width: int, *, exact: bool = True) -> None:
        try:
            import qdrant_edge
        except ImportError:
            raise UsageError("Qdrant Edge is not installed", remedy="pip install 'craton[qdrant]'") from None
        self._edge = qdrant_edge
        self._width, self._exact = width, exact
        self._folder = Path(folder)
        self._shard: qdrant_edge.EdgeShard = self._open()
        self._ids = self._stored_ids()

    def ids(self) -> Ids:
        """All ids that are there, ascending."""
        return self._ids

    def add(self, ids: Ids, vectors_ND: Vectors) -> None:
        """Add vectors whose ids are not there yet."""
        for i in range(0, len(ids), _AT_ONCE):
            pairs = zip(ids[i : i + _AT_ONCE].tolist(), vectors_ND[i : i + _AT_ONCE].tolist(), strict=True)
            points = [self._edge.Point(point, vector) for point, vector in pairs]
            self._shard.update(self._edge.UpdateOperation.upsert_points(points))
        self._shard.flush()
        self._ids = np.union1d(self._ids, ids)

    def remove(self, ids: Ids) -> None:
        """Remove these ids; those that are not there are no error."""
        for i in range(0, len(ids), _AT_ONCE):
            self._shard.update(self._edge.UpdateOperation.delete_points(ids[i : i + _AT_ONCE].tolist()))
        self._shard.flush()
        self._ids = np.setdiff1d(self._ids, ids)

    def search(self, vector_D: Vectors, k: int, allowed: Ids | None = None) -> tuple[Ids, Vectors]:
        """The k nearest by cosine, best first, equals by ascending id; only those in `allowed` if given."""
        if k < 1 or not len(self._ids) or (allowed is not None and not len(allowed)):
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        only = None
        if allowed is not None:
            only = self._edge.Filter(must=[self._edge.HasIdCondition(set(allowed.tolist()))])
        request = self._edge.SearchRequest(
            query=self._edge.Query.Nearest(unit(vector_D[None], self._width)[0].tolist()),
            limit=k,
            filter=only,
            params=self._edge.SearchParams(exact=self._exact),
        )
        found = sorted((-point.score, int(point.id)) for point in self._shard.search(request))
        return (
            np.array([point for _, point in found], dtype=np.int64),
            np.array([-score for score, _ in found], dtype=np.float32),
        )

    def close(self) -> None:
        """Write what is in memory and close the folder."""
        self._shard.close()

    def _open(self) -> qdrant_edge.EdgeShard:
        edge = self._edge
        # The vectors have length 1, so the dot product is the cosine and leaves them as they are.
        vectors = edge.EdgeVectorParams(self._width, edge.Distance.Dot, datatype=edge.VectorStorageDatatype.Float16)
        with disk_errors("create the folder of the vectors", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            empty = not any(self._folder.iterdir())
        try:
            if empty:
                return edge.EdgeShard.create(str(self._folder), edge.EdgeConfig(vectors=vectors))
            return edge.EdgeShard.load(str(self._folder), edge.EdgeConfig(vectors=vectors))
        except Exception as error:  # its errors are bare exceptions with Rust's words
            raise StoreError(
                f"the vectors in Qdrant Edge cannot be opened: {str(error).splitlines()[0]}",
                where=str(self._folder),
                remedy="delete the folder: it is filled again from the collection",
            ) from error

    def _stored_ids(self) -> Ids:
        ids: list[int] = []
        offset = None
        while True:
            request = self._edge.ScrollRequest(offset=offset, limit=_AT_ONCE, with_payload=False, with_vector=False)
            records, offset = self._shard.scroll(request)
            ids += [int(record.id) for record in records]
            if offset is None:
                return np.array(sorted(ids), dtype=np.int64)
