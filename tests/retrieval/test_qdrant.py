"""Qdrant Edge answers as the exact search over the file does."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from craton.errors import StoreError, UsageError
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.documents import Document
from craton.retrieval.filters import parse_filters
from craton.retrieval.qdrant import QdrantVectors
from craton.retrieval.vectors import ExactVectors, unit

pytest.importorskip("qdrant_edge", reason="needs qdrant-edge-py")

WIDTH = 24


def test_add_search_remove_and_filter_agree_with_the_exact_search(tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    stored = unit(dice.standard_normal((500, WIDTH)).astype(np.float32)).astype(np.float16).astype(np.float32)
    ids = np.arange(500, dtype=np.int64) + 1
    exact = ExactVectors(WIDTH, lambda some: stored[some - 1])
    store = QdrantVectors(tmp_path / "q", WIDTH)
    for one in (exact, store):
        one.add(ids[:300], stored[:300])
        one.add(ids[300:], stored[300:])
        one.remove(np.array([5, 6, 7, 9999]))
        assert one.ids().tolist() == [i for i in ids.tolist() if i not in (5, 6, 7)]
    for allowed in (None, ids[::50], np.array([6]), np.empty(0, dtype=np.int64)):
        for query in (*stored[4:7], *dice.standard_normal((5, WIDTH)).astype(np.float32)):
            expected, found = exact.search(query, 10, allowed), store.search(query, 10, allowed)
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_allclose(found[1], expected[1], atol=1e-3)
    store.close()
    again = QdrantVectors(tmp_path / "q", WIDTH)
    assert len(again.ids()) == 497
    again.close()


def test_folders_of_another_width_are_refused(tmp_path: Path) -> None:
    QdrantVectors(tmp_path / "q", WIDTH).close()
    with pytest.raises(StoreError) as refused:
        QdrantVectors(tmp_path / "q", WIDTH + 1)
    assert refused.value.remedy


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    with pytest.raises(UsageError, match="not installed"):
        QdrantVectors(tmp_path / "q", WIDTH)


@dataclass
class Source:
    name: str
    edition: int = 1
    kind: str = "text"
    path: Path | None = None

    @property
    def digest(self) -> str:
        return f"{self.name} {self.edition}"

    def documents(self) -> Iterator[Document]:
        yield Document(
            self.name, "", f"{self.name} in edition {self.edition}", "text", metadata={"half": int(self.name) % 2}
        )


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
    return np.stack([np.random.default_rng(seed).standard_normal(WIDTH) for seed in seeds]).astype(np.float32)


def test_a_collection_keeps_the_folder_in_step(tmp_path: Path) -> None:
    path = tmp_path / "c.sqlite"

    def store(width: int) -> QdrantVectors:
        return QdrantVectors(tmp_path / "q", width)

    def count(text: str) -> int:
        return len(text.split())

    Collection.create(path, CollectionSettings(encoder="toy")).close()
    for edition, names in ((1, range(60)), (2, range(30, 80))):
        with Collection.open(path, store) as with_qdrant, Collection.open(path) as plain:
            with_qdrant.sync([Source(str(i), edition) for i in names], embed, count)
            for query in embed(["a", "b", "40 in edition 2"]):
                for where in (None, parse_filters(["half=1"])):
                    expected = plain.search("", query, where=where)
                    found = with_qdrant.search("", query, where=where)
                    assert [hit.chunk_id for hit in found] == [hit.chunk_id for hit in expected]
