"""Searches: exact, filtered before scoring, deterministic, deaf to query syntax; variety and reranking."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from craton.errors import UnknownName, UsageError
from craton.retrieval import lexical
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.documents import Document, MetadataValue
from craton.retrieval.filters import parse_filters
from craton.retrieval.fusion import Fusion
from craton.retrieval.lexical import LexicalSearch, query_terms
from craton.retrieval.mmr import maximal_marginal_relevance
from craton.retrieval.vectors import ExactVectors, Ids, Vectors, cosines, unit

WIDTH = 32
LEXICAL, LINEAR, DENSE = Fusion(kind="lexical"), Fusion(kind="linear"), Fusion(kind="dense")


@dataclass
class Source:
    name: str
    records: list[Document]
    kind: str = "record"
    path: Path | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256("".join(record.digest for record in self.records).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        yield from self.records


def embed(texts: Sequence[str]) -> NDArray[np.float32]:
    """Sums of a random vector for each word, so that texts that share words are near."""
    return np.stack([sum(map(_vector, re.findall(r"\w+", text.lower())), np.zeros(WIDTH)) for text in texts]).astype(
        np.float32
    )


def _vector(word: str) -> NDArray[np.float64]:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(WIDTH)


def words(text: str) -> int:
    return len(text.split())


def filled(
    path: Path, texts: dict[str, str], metadata: dict[str, dict[str, MetadataValue]] | None = None
) -> Collection:
    records = [
        Document(name, "", text, "record", metadata=(metadata or {}).get(name, {})) for name, text in texts.items()
    ]
    collection = Collection.create(path, CollectionSettings(encoder="toy"))
    collection.sync([Source("all", records)], embed, words)
    return collection


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    """2,000 documents of 100 tenants, all about the same few things."""
    dice = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(300)]
    texts = {f"d{i:04}": " ".join(dice.choice(vocabulary, 12)) for i in range(2000)}
    metadata: dict[str, dict[str, MetadataValue]] = {name: {"tenant": i % 100} for i, name in enumerate(texts)}
    with filled(tmp_path_factory.mktemp("tenants") / "c.sqlite", texts, metadata) as collection:
        yield collection


class TestExactVectors:
    def check(self, stored: Vectors, query: Vectors, k: int, allowed: Ids | None = None) -> None:
        ids = np.arange(len(stored), dtype=np.int64) * 3 + 1
        store = ExactVectors(stored.shape[1], lambda some: stored[(some - 1) // 3])
        for part in np.array_split(np.arange(len(stored)), 3):
            store.add(ids[part], stored[part])
        found, scores = store.search(query, k, allowed)
        everything = ids if allowed is None else ids[np.isin(ids, allowed)]
        truth = cosines(stored[(everything - 1) // 3], unit(query[None])[0])
        order = np.lexsort((everything, -truth))[:k]
        np.testing.assert_array_equal(found, everything[order])
        np.testing.assert_array_equal(scores, truth[order])

    @pytest.mark.parametrize("spread", [1.0, 0.05, 0.0])  # random, all alike, all the same
    @pytest.mark.parametrize("k", [1, 10, 100, 9000])
    def test_the_top_k_is_that_of_brute_force(self, spread: float, k: int) -> None:
        dice = np.random.default_rng(1)
        centre = dice.standard_normal(48)
        vectors = unit((centre + spread * 7 * dice.standard_normal((3000, 48))).astype(np.float32))
        stored = vectors.astype(np.float16).astype(np.float32)
        query = (centre + dice.standard_normal(48)).astype(np.float32)
        self.check(stored, query, k)
        self.check(stored, query, k, np.arange(1, 3000, 5, dtype=np.int64))

    @given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.integers(1, 40), st.integers(1, 70))
    @settings(max_examples=60, deadline=None)
    def test_with_few_rows_and_dimensions_and_many_ties(self, seed: int, rows: int, width: int, k: int) -> None:
        dice = np.random.default_rng(seed)
        vectors = unit(dice.integers(-1, 2, (rows, width)).astype(np.float32))  # zeros and duplicates among them
        stored = vectors.astype(np.float16).astype(np.float32)
        query = dice.standard_normal(width).astype(np.float32)
        self.check(stored, query, k)
        self.check(stored, query, k, np.array(sorted(dice.choice(rows * 3, rows, replace=False)), dtype=np.int64))

    def test_removed_rows_are_gone(self) -> None:
        stored = np.eye(8, dtype=np.float32)
        store = ExactVectors(8, lambda some: stored[some])
        store.add(np.arange(8), stored)
        store.remove(np.array([2, 77]))
        assert store.ids().tolist() == [0, 1, 3, 4, 5, 6, 7]
        assert 2 not in store.search(stored[2], 8)[0]
        store.remove(np.arange(8))
        assert len(store.search(stored[2], 8)[0]) == 0

    def test_the_number_of_threads_is_left_alone(self) -> None:
        before = torch.get_num_threads()
        self.check(np.eye(4, dtype=np.float32), np.ones(4, dtype=np.float32), 2)
        assert torch.get_num_threads() == before

    def test_wrong_widths_are_refused(self, tenants: Collection) -> None:
        with pytest.raises(UsageError, match="7 dimensions for a collection of 32"):
            tenants.search("word1", np.ones(7, dtype=np.float32))

    def test_a_collection_finds_what_brute_force_finds(self, tenants: Collection) -> None:
        rows = tenants._connection.execute(
            "SELECT name, vector FROM chunks JOIN documents ON documents.id = document"
        ).fetchall()
        stored = np.stack([np.frombuffer(blob, dtype=np.float16) for _, blob in rows]).astype(np.float32)
        for text in ("word1 word2 word3", "word250", "nothing known"):
            query = embed([text])[0]
            truth = np.argsort(-(stored @ unit(query[None])[0]), kind="stable")[:20]
            hits = tenants.search(text, query, k=20)
            assert [hit.document for hit in hits] == [rows[i][0] for i in truth]
            assert all(hit.score == hit.dense and hit.lexical is None for hit in hits)


class TestFilters:
    @pytest.mark.parametrize("fusion", [DENSE, LINEAR, LEXICAL])
    def test_a_search_in_one_tenant_finds_all_of_it(self, tenants: Collection, fusion: Fusion) -> None:
        mine = {f"d{i:04}" for i in range(2000) if i % 100 == 7}
        query = "word1 word2 word3"
        hits = tenants.search(query, embed([query])[0], k=20, where=parse_filters(["tenant=7"]), fusion=fusion)
        holding = {name for name in mine if set(query.split()) & set(tenants.document(name).text.split())}
        assert {hit.document for hit in hits} == (holding if fusion == LEXICAL else mine)

    def test_it_ranks_as_if_the_others_were_not_there(self, tenants: Collection) -> None:
        query = embed(["word5 word6"])[0]
        everything = tenants.search("", query, k=2000)
        alone = tenants.search("", query, k=5, where=parse_filters(["tenant>=98"]))
        assert alone == [hit for hit in everything if int(hit.document[1:]) % 100 >= 98][:5]

    def test_common_words_are_found_where_the_rare_ones_are_not(
        self, tenants: Collection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lexical, "ROW_BUDGET", 1)
        text = tenants.document("d0007").text.split()
        elsewhere = next(
            w
            for w in (f"word{i}" for i in range(300))
            if not tenants.search(w, None, k=1, where=parse_filters(["tenant=7"]))
        )
        hits = tenants.search(f"{elsewhere} {text[0]}", None, k=20, where=parse_filters(["tenant=7"]))
        assert "d0007" in {hit.document for hit in hits}

    def test_nothing_matches(self, tenants: Collection) -> None:
        for fusion in (DENSE, LINEAR, LEXICAL):
            where = parse_filters(["tenant=1000"])
            assert tenants.search("word1", embed(["word1"])[0], where=where, fusion=fusion) == []

    def test_unknown_keys_are_refused(self, tenants: Collection) -> None:
        with pytest.raises(UnknownName, match="tenant"):
            tenants.search("word1", None, where=parse_filters(["tennant=1"]))
        assert tenants.filter_keys() == {"tenant", "kind", "title", "document"}


HOSTILE = [
    *('" OR 1=1 --', "NEAR(a b)", "*", "", "   ", "😀", "کتاب خوب", "terms : x", "a AND", "NOT b", '"', '""', "x*"),
    *("^a", "a + b", "{terms} : a", "-- ;", "'; DROP TABLE words; --", "\0", "a\0b", "(", "\\", "%", "x" * 100_000),
    *("the " * 5000, "\ud800", "\u202e"),
]


class TestQueries:
    @pytest.mark.parametrize("query", HOSTILE, ids=range(len(HOSTILE)))
    def test_nothing_in_a_question_is_syntax(self, tenants: Collection, query: str) -> None:
        for fusion in (LEXICAL, LINEAR):
            tenants.search(query, np.ones(WIDTH, dtype=np.float32), fusion=fusion)
        assert tenants.search(query, None) == []
        assert tenants.search(f"{query} word1", None)

    @given(st.text(max_size=40))
    @settings(max_examples=150, deadline=None)
    def test_no_text_is(self, text: str) -> None:
        connection = SHARED.connection()
        LexicalSearch(connection).search(text, 5, 3)

    def test_persian_is_found_however_it_is_typed(self, tmp_path: Path) -> None:
        with filled(tmp_path / "c.sqlite", {"a": "كتابخانه‌های تهران", "b": "مدرسه"}) as collection:
            for query in ("کتابخانه", "كتابخانه", "کتابخانه‌های"):
                assert [hit.document for hit in collection.search(query, None)] == ["a"]

    def test_stems_and_names_are_found(self, tmp_path: Path) -> None:
        texts = {"a": "He was running to the café.", "b": "Call shutil.rmtree or parse_args here.", "c": "Else"}
        with filled(tmp_path / "c.sqlite", texts) as collection:
            for query, name in (("runs", "a"), ("cafe", "a"), ("shutil.rmtree", "b"), ("rmtree", "b"), ("args", "b")):
                assert [hit.document for hit in collection.search(query, None)] == [name]

    def test_terms_in_most_chunks_count_only_alone(self, tmp_path: Path) -> None:
        texts = {f"d{i}": f"common thing number{i}" for i in range(40)}
        with filled(tmp_path / "c.sqlite", texts) as collection:
            assert [hit.document for hit in collection.search("common number7", None)] == ["d7"]
            assert len(collection.search("common", None, k=40)) == 40

    @pytest.mark.parametrize("budget", [0, 20, 200])
    def test_scores_are_full_bm25_whatever_the_budget(
        self, tenants: Collection, monkeypatch: pytest.MonkeyPatch, budget: int
    ) -> None:
        query = "word1 word2 word3 word4"
        whole = {hit.document: hit.score for hit in tenants.search(query, None, k=2000)}
        monkeypatch.setattr(lexical, "ROW_BUDGET", budget)
        few = tenants.search(query, None, k=10)
        assert len(few) == 10
        assert all(hit.score == pytest.approx(whole[hit.document], rel=1e-9) for hit in few)
        if budget == 200:
            assert few[0].document == max(whole, key=lambda name: whole[name])

    def test_bm25_is_that_of_the_definition(self, tmp_path: Path) -> None:
        texts = {"a": "whale whale ship", "b": "ship sail sea sea", "c": "sea", "d": "land", "e": "land lake"}
        with filled(tmp_path / "c.sqlite", texts) as collection:
            hits = {hit.document: hit.score for hit in collection.search("whale sail", None)}
        mean = sum(len(text.split()) for text in texts.values()) / 5
        idf = np.log((5 - 1 + 0.5) / (1 + 0.5))
        for name, frequency, length in (("a", 2, 3), ("b", 1, 4)):
            expected = idf * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * length / mean))
            assert hits[name] == pytest.approx(expected, rel=1e-6)

    def test_a_question_is_cut_to_its_rarest_terms(self, tenants: Collection) -> None:
        text = tenants.document("d0042").text
        page = " ".join(f"word{i}" for i in range(300)) + text
        assert len(query_terms(page)) >= 300
        assert tenants.search(page, None)


class _Shared:
    """One small index of words for hypothesis."""

    def __init__(self) -> None:
        self._connection: object = None

    def connection(self) -> object:
        if self._connection is None:
            import sqlite3

            self._connection = sqlite3.connect(":memory:")
            self._connection.execute(lexical.CREATE)
            self._connection.executemany(
                "INSERT INTO words (rowid, terms) VALUES (?, ?)", enumerate(["a b c", "near or not and", "0 1 x"], 1)
            )
        return self._connection


SHARED = _Shared()


class TestRanking:
    def test_ties_are_in_the_order_of_names_however_they_were_added(self, tmp_path: Path) -> None:
        names = ["b", "a", "d", "c"]
        for turn, order in enumerate((names, names[::-1])):
            with filled(tmp_path / f"{turn}.sqlite", dict.fromkeys(order, "the same words")) as collection:
                for fusion in (DENSE, LEXICAL, LINEAR, Fusion(kind="rrf")):
                    hits = collection.search("same", embed(["same"])[0], fusion=fusion)
                    if fusion.kind != "rrf":  # ranks differ where scores do not
                        assert [hit.document for hit in hits] == ["a", "b", "c", "d"]

    def test_chunk_ids_depend_on_content_alone(self, tmp_path: Path) -> None:
        ids = []
        for turn, texts in enumerate(({"a": "one", "b": "two"}, {"c": "x", "b": "two", "a": "one"}, {"a": "one!"})):
            with filled(tmp_path / f"{turn}.sqlite", texts) as collection:
                ids.append({hit.document: hit.chunk_id for hit in collection.search("", embed(["one"])[0])})
        assert ids[0] == {name: ids[1][name] for name in "ab"}
        assert ids[2]["a"] != ids[0]["a"]

    def test_hits_are_exact_spans(self, tmp_path: Path) -> None:
        paragraphs = [f"Paragraph {i} \U0001f40b tells of topic{i}. " + "More words here. " * 60 for i in range(5)]
        text = "\n\n".join(paragraphs)
        with filled(tmp_path / "c.sqlite", {"d": text}) as collection:
            for i in range(5):
                hit = collection.search(f"topic{i}", None, k=1)[0]
                assert hit.text == text[hit.start : hit.end]
                assert f"topic{i}" in hit.text

    def test_hybrid_hits_have_both_scores(self, tenants: Collection) -> None:
        query = "word1 word2"
        hits = tenants.search(query, embed([query])[0], fusion=LINEAR)
        assert all(hit.dense is not None for hit in hits)
        assert any(hit.lexical is not None for hit in hits)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    def test_the_default_is_vectors_alone_or_what_was_tuned(self, tmp_path: Path) -> None:
        with filled(tmp_path / "c.sqlite", {"a": "whale", "b": "ship"}) as collection:
            vector = embed(["whale"])[0]
            assert collection.search("ship", vector)[0].document == "a"
            collection.set_fusion(LEXICAL)
            assert collection.search("ship", vector)[0].document == "b"
            assert collection.search("ship", vector, fusion=DENSE)[0].document == "a"
            collection.set_fusion(LINEAR)
            assert collection.search("ship", None)[0].document == "b"
            with pytest.raises(UsageError, match="needs the question's vector"):
                collection.search("ship", None, fusion=DENSE)

    def test_reranking_reads_texts_and_has_the_last_word(self, tenants: Collection) -> None:
        asked: list[tuple[str, int]] = []

        def by_name(query: str, texts: Sequence[str]) -> list[float]:
            asked.append((query, len(texts)))
            return [float(text.count("word7")) for text in texts]

        hits = tenants.search("word7", embed(["word7"])[0], k=3, rerank=by_name)
        assert asked == [("word7", 50)]
        assert hits[0].score == max(hit.score for hit in hits) == hits[0].text.count("word7")
        with pytest.raises(UsageError, match="1 scores for 50"):
            tenants.search("word7", embed(["word7"])[0], rerank=lambda query, texts: [1.0])

    def test_variety_leaves_out_repetitions(self, tmp_path: Path) -> None:
        texts = {"a": "whale song deep", "b": "whale song deep", "c": "whale song deep", "d": "whale ship harpoon"}
        with filled(tmp_path / "c.sqlite", texts) as collection:
            vector = embed(["whale song"])[0]
            assert [hit.document for hit in collection.search("", vector, k=2)] == ["a", "b"]
            assert [hit.document for hit in collection.search("", vector, k=2, mmr=0.5)] == ["a", "d"]
            assert [hit.document for hit in collection.search("", vector, k=4, mmr=1.0)] == ["a", "b", "c", "d"]

    @pytest.mark.parametrize("mmr", [-0.1, 1.1, float("nan")])
    def test_numbers_out_of_range_are_refused(self, tenants: Collection, mmr: float) -> None:
        with pytest.raises(UsageError):
            tenants.search("word1", None, mmr=mmr)
        with pytest.raises(UsageError):
            tenants.search("word1", None, k=0)

    def test_an_empty_collection_finds_nothing(self, tmp_path: Path) -> None:
        with Collection.create(tmp_path / "c.sqlite", CollectionSettings(encoder="toy")) as collection:
            assert collection.search("a", np.ones(3, dtype=np.float32), fusion=LINEAR, mmr=0.5) == []
            assert collection.search("a", None) == []


class TestVariety:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.floats(0, 1))
    @settings(max_examples=50, deadline=None)
    def test_it_follows_the_definition(self, seed: int, count: int, trade_off: float) -> None:
        dice = np.random.default_rng(seed)
        vectors = unit(dice.standard_normal((count, 5)).astype(np.float32))
        relevance = np.sort(dice.random(count).astype(np.float32))[::-1].copy()
        chosen = maximal_marginal_relevance(relevance, vectors, count, trade_off)
        assert sorted(chosen) == list(range(count))
        scaled = relevance / relevance.max()
        for place in range(count):
            taken = chosen[:place]
            rest = [i for i in range(count) if i not in taken]
            value = {
                i: trade_off * scaled[i]
                - (1 - trade_off) * max((float(vectors[i] @ vectors[j]) for j in taken), default=0)
                for i in rest
            }
            assert value[chosen[place]] >= max(value.values()) - 1e-5

    def test_it_follows_relevance_alone_if_told(self) -> None:
        assert maximal_marginal_relevance(np.array([3, 2, 1], np.float32), np.eye(3, dtype=np.float32), 2, 1.0) == [
            0,
            1,
        ]
