"""A question to passages: words and vectors, a filter before both, their fusion, then reranking and variety."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from craton.errors import UsageError
from craton.retrieval.filters import Filter
from craton.retrieval.fusion import DENSE, LEXICAL, Fusion, Run
from craton.retrieval.lexical import LexicalSearch
from craton.retrieval.mmr import maximal_marginal_relevance
from craton.retrieval.vectors import ExactVectors, Ids, Vectors, VectorStore, cosines, unit

POOL: Final = 100
"""Candidates that each side gives to a fusion, and that variety chooses from."""
RERANKED: Final = 50
"""Candidates that a reranker reads."""

Rerank = Callable[[str, Sequence[str]], Sequence[float]]
StoreMaker = Callable[[int], VectorStore]

_READ_AT_ONCE: Final = 8_192  # vectors of float32 that are held at a time


@dataclass(frozen=True)
class Hit:
    """A passage that was found: `text` is exactly the characters [start, end) of the document's text.

    score orders the hits (the fusion's, or the reranker's); lexical is BM25 and dense the cosine, None where that side
    was not asked or did not find it. chunk_id changes when, and only when, the document or the span does.
    """

    document: str
    title: str
    text: str
    start: int
    end: int
    page: int | None
    heading: str
    score: float
    lexical: float | None
    dense: float | None
    chunk_id: str


@dataclass(frozen=True)
class _Candidate:
    id: int
    document: str
    start: int
    score: float
    lexical: float | None
    dense: float | None


class Searcher:
    """Both searches over one connection to a collection, and what they keep in memory.

    The vectors are read at the first search that needs them. Later ones bring them up to date if the file has changed:
    only new chunks are read. Every method expects to be called within a transaction, so that it sees one state.
    """

    def __init__(self, connection: sqlite3.Connection, make_store: StoreMaker | None = None) -> None:
        self._connection = connection
        self._make_store = make_store or (lambda width: ExactVectors(width, self.vectors))
        self._lexical = LexicalSearch(connection)
        self._store: VectorStore | None = None
        self._width: int | None = None
        self._state: tuple[int, int] | None = None
        self._store_state: tuple[int, int] | None = None
        self._keys: frozenset[str] | None = None
        self._allowed: tuple[Filter, Ids] | None = None
        self.writes = 0  # how often our own connection has written: data_version counts only the others

    def close(self) -> None:
        """Give up what is in memory."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def search(
        self,
        query: str,
        vector: NDArray[np.float32] | None,
        *,
        k: int,
        where: Filter | None,
        fusion: Fusion,
        mmr: float | None,
        rerank: Rerank | None,
    ) -> list[Hit]:
        """The best k passages; see `Collection.search`."""
        if k < 1:
            raise UsageError(f"{k} passages were asked for", remedy="ask for at least one")
        if mmr is not None and not 0 <= mmr <= 1:
            raise UsageError(f"the trade-off of variety is {mmr}", remedy="0 is variety alone, 1 is relevance alone")
        wanted = k if mmr is None and rerank is None else max(k, POOL)
        ranked = self._ranked(query, vector, fusion, wanted, where)
        if rerank is not None:
            ranked = self._reranked(query, ranked[: max(k, RERANKED)], rerank)
        if mmr is not None and ranked:
            # Vectors are read in the order of the ids.
            ranked = sorted(ranked[: max(k, POOL)], key=lambda one: one.id)
            vectors_ND = self.vectors(np.array([one.id for one in ranked], dtype=np.int64))
            by_score = sorted(range(len(ranked)), key=lambda i: _order(ranked[i]))
            relevance_N = np.array([ranked[i].score for i in by_score], dtype=np.float32)
            chosen = maximal_marginal_relevance(relevance_N, vectors_ND[by_score], k, mmr)
            ranked = [ranked[by_score[i]] for i in chosen]
        return self._hits(ranked[:k])

    def run(self, query: str, vector: NDArray[np.float32], *, depth: int = POOL, where: Filter | None = None) -> Run:
        """What a fusion is tuned on: both searches' candidates with their scores, by document."""
        lexical, dense = self._candidates(query, vector, depth, where)
        documents = {chunk: name for chunk, name, _ in self._places({**lexical, **dense})}
        return Run.of(lexical, dense, documents)

    def vectors(self, ids: Ids) -> Vectors:
        """The stored vectors of these ascending ids, float32 [N, D]."""
        parts = [self._read_vectors(ids[i : i + _READ_AT_ONCE]) for i in range(0, len(ids), _READ_AT_ONCE)]
        return np.concatenate(parts) if parts else np.empty((0, self._stored_width() or 0), dtype=np.float32)

    def keys(self) -> frozenset[str]:
        """The keys that filters may name: those that some document has."""
        self._follow()
        if self._keys is None:
            # From key to key through the index; DISTINCT would walk all of it.
            rows = self._connection.execute(
                """WITH RECURSIVE keys (key) AS (
                    SELECT min(key) FROM metadata
                    UNION ALL
                    SELECT (SELECT min(key) FROM metadata WHERE key > keys.key) FROM keys WHERE key IS NOT NULL)
                SELECT key FROM keys WHERE key IS NOT NULL"""
            )
            self._keys = frozenset(key for (key,) in rows)
        return self._keys

    def _ranked(
        self, query: str, vector: NDArray[np.float32] | None, fusion: Fusion, wanted: int, where: Filter | None
    ) -> list[_Candidate]:
        if vector is None and fusion.kind != "lexical":
            raise UsageError(
                f"the fusion {fusion} needs the question's vector", remedy="give one, or search words alone"
            )
        lexical: dict[int, float] = {}
        dense: dict[int, float] = {}
        if fusion.kind == "lexical" or vector is None:
            lexical = self._find_words(query, wanted, where)
        elif fusion.kind == "dense":
            dense = self._find_vectors(vector, wanted, where)
        else:
            lexical, dense = self._candidates(query, vector, max(wanted, POOL), where)
        ids = list(dict.fromkeys([*dense, *lexical]))
        score_N = fusion.fuse(_column(lexical, ids), _column(dense, ids))
        scores = dict(zip(ids, score_N.tolist(), strict=True))
        found = (
            _Candidate(chunk, name, start, scores[chunk], lexical.get(chunk), dense.get(chunk))
            for chunk, name, start in self._places(ids)
        )
        return sorted(found, key=_order)[:wanted]

    def _candidates(
        self, query: str, vector: NDArray[np.float32], depth: int, where: Filter | None
    ) -> tuple[dict[int, float], dict[int, float]]:
        """Both sides' best `depth`; what only the words have found has its cosine too."""
        lexical = self._find_words(query, depth, where)
        dense = self._find_vectors(vector, depth, where)
        missing = np.array(sorted(lexical.keys() - dense.keys()), dtype=np.int64)
        if len(missing):
            cosine_N = cosines(self.vectors(missing), unit(vector, self._width))
            dense |= zip(missing.tolist(), cosine_N.tolist(), strict=True)
        return lexical, dense

    def _find_words(self, query: str, depth: int, where: Filter | None) -> dict[int, float]:
        self._follow()
        (total,) = self._connection.execute("SELECT count(*) FROM chunks").fetchone()
        return self._lexical.search(query, depth, total, None if where is None else self._chunks_sql(where))

    def _find_vectors(self, vector: NDArray[np.float32], depth: int, where: Filter | None) -> dict[int, float]:
        store = self._fresh_store()
        if store is None:
            return {}
        ids, cosines = store.search(
            unit(vector, self._width), depth, None if where is None else self._allowed_ids(where)
        )
        return dict(zip(ids.tolist(), cosines.tolist(), strict=True))

    def _chunks_sql(self, where: Filter) -> tuple[str, list[object]]:
        where.check(self.keys())
        condition, parameters = where.sql()
        documents = f"SELECT documents.id FROM documents WHERE {condition}"
        return f"SELECT chunks.id FROM chunks WHERE document IN ({documents})", [*parameters]

    def _allowed_ids(self, where: Filter) -> Ids:
        self._follow()
        if self._allowed is None or self._allowed[0] != where:
            sql, parameters = self._chunks_sql(where)
            self._allowed = where, np.sort(_ids(self._connection.execute(sql, parameters)))
        return self._allowed[1]

    def _follow(self) -> None:
        """Forget what was counted in another state of the file."""
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if self._state != (version, self.writes):
            self._state = version, self.writes
            self._lexical.forget()
            self._keys = self._allowed = None

    def _fresh_store(self) -> VectorStore | None:
        """The vectors as the file has them now; None if it has none."""
        self._follow()
        if self._store is not None and self._store_state == self._state:
            return self._store
        width = self._stored_width()
        if width != self._width:
            self.close()
            self._width = width
        if width is None:
            return None
        store = self._store = self._store or self._make_store(width)
        there = np.sort(_ids(self._connection.execute("SELECT id FROM chunks")))
        known = store.ids()
        if len(gone := np.setdiff1d(known, there, assume_unique=True)):
            store.remove(gone)
        new = np.setdiff1d(there, known, assume_unique=True)
        for i in range(0, len(new), _READ_AT_ONCE):
            store.add(new[i : i + _READ_AT_ONCE], self._read_run(new[i : i + _READ_AT_ONCE]))
        self._store_state = self._state
        return store

    def _stored_width(self) -> int | None:
        fact = self._connection.execute("SELECT value FROM facts WHERE key = 'width'").fetchone()
        return int(fact[0]) if fact else None

    def _read_vectors(self, ids: Ids) -> Vectors:
        rows = self._connection.execute(
            "SELECT vector FROM chunks WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
            (json.dumps(ids.tolist()),),
        )
        return _vectors((vector for (vector,) in rows), len(ids), self._stored_width())

    def _read_run(self, ids: Ids) -> Vectors:
        """As `vectors`, for ids with few others between them: the table is read straight through."""
        wanted = set(ids.tolist())
        rows = self._connection.execute(
            "SELECT id, vector FROM chunks WHERE id BETWEEN ? AND ? ORDER BY id", (int(ids[0]), int(ids[-1]))
        )
        return _vectors((vector for chunk, vector in rows if chunk in wanted), len(ids), self._stored_width())

    def _places(self, ids: Iterable[int]) -> list[tuple[int, str, int]]:
        """(id, document, start) of chunks."""
        return self._connection.execute(
            """SELECT chunks.id, documents.name, chunks.start FROM chunks JOIN documents ON documents.id = document
            WHERE chunks.id IN (SELECT value FROM json_each(?))""",
            (json.dumps(list(ids)),),
        ).fetchall()

    def _reranked(self, query: str, ranked: list[_Candidate], rerank: Rerank) -> list[_Candidate]:
        if not ranked:
            return []
        scores = [float(score) for score in rerank(query, [hit.text for hit in self._hits(ranked)])]
        if len(scores) != len(ranked):
            raise UsageError(f"the reranker gave {len(scores)} scores for {len(ranked)} passages")
        again = [
            _Candidate(one.id, one.document, one.start, score, one.lexical, one.dense)
            for one, score in zip(ranked, scores, strict=True)
        ]
        return sorted(again, key=_order)

    def _hits(self, ranked: Sequence[_Candidate]) -> list[Hit]:
        rows = self._connection.execute(
            """SELECT id, document, start, "end", page, heading FROM chunks
            WHERE id IN (SELECT value FROM json_each(?))""",
            (json.dumps([one.id for one in ranked]),),
        ).fetchall()
        chunks = {row[0]: row[1:] for row in rows}
        # A document's text is read once, however many of its passages were found, and cut here: SQLite's own substr
        # ends at a NUL.
        rows = self._connection.execute(
            "SELECT id, title, digest, text FROM documents WHERE id IN (SELECT value FROM json_each(?))",
            (json.dumps(sorted({document for document, *_ in chunks.values()})),),
        ).fetchall()
        documents = {row[0]: row[1:] for row in rows}
        hits = []
        for one in ranked:
            document, start, end, page, heading = chunks[one.id]
            title, digest, text = documents[document]
            identity = hashlib.sha256(json.dumps([one.document, digest, start, end]).encode()).hexdigest()[:16]
            hits.append(
                Hit(
                    *(one.document, title, text[start:end], start, end, page, heading),
                    *(one.score, one.lexical, one.dense, identity),
                )
            )
        return hits


def default_fusion(tuned: Fusion | None, vector: NDArray[np.float32] | None) -> Fusion:
    """Words alone without a vector; else what was tuned for this collection, or vectors alone."""
    return LEXICAL if vector is None else tuned or DENSE


def _order(one: _Candidate) -> tuple[float, str, int]:
    return -one.score, one.document, one.start


def _column(scores: dict[int, float], ids: Sequence[int]) -> NDArray[np.float64]:
    return np.array([scores.get(chunk, np.nan) for chunk in ids], dtype=np.float64)


def _ids(rows: Iterable[tuple[int]]) -> Ids:
    return np.fromiter((chunk for (chunk,) in rows), dtype=np.int64)


def _vectors(blobs: Iterable[bytes], count: int, width: int | None) -> Vectors:
    data = b"".join(blobs)
    if len(data) != 2 * count * (width or 0):
        raise sqlite3.DatabaseError("vectors are missing, or have another width than the collection's")
    return np.frombuffer(data, dtype="<f2").reshape(count, -1).astype(np.float32)
