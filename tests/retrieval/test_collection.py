"""A collection stays in step with its sources, whole through every crash, and forgets what was deleted."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from craton.errors import CratonError, DataError, FileFormatError, StoreError, UnknownName, UsageError
from craton.retrieval import lexical
from craton.retrieval.chunking import ChunkSettings
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.documents import Chunk, Document, Heading, Page
from craton.retrieval.fusion import Fusion
from craton.retrieval.sync import embedded_text

SETTINGS = CollectionSettings(encoder="toy", chunking=ChunkSettings(size=12, overlap=0))
WIDTH = 16


@dataclass
class Source:
    """A source file of one document, or of `records`."""

    name: str
    text: str = ""
    records: list[Document] | None = None
    error: Exception | None = None
    kind: str = "text"
    path: Path | None = None
    reads: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr((self.text, self.records)).encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        self.reads.append(self.name)
        if self.error is not None:
            raise self.error
        yield from self.records or [Document(self.name, "", self.text, "text", metadata={"folder": "notes"})]


class Encoder:
    """Vectors from a hash of the text; remembers what it was given."""

    def __init__(self, width: int = WIDTH) -> None:
        self.width = width
        self.texts: list[str] = []
        self.calls = 0
        self.on_call: Callable[[], object] = lambda: None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.calls += 1
        self.texts += texts
        self.on_call()
        return np.stack([vector_of(text, self.width) for text in texts])


def vector_of(text: str, width: int = WIDTH) -> NDArray[np.float32]:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).standard_normal(width).astype(np.float32)


def words(text: str) -> int:
    return len(text.split())


def sources(count: int, edition: int = 1) -> list[Source]:
    return [Source(f"{i}.txt", f"Paper number{i} edition{edition} speaks of whales.") for i in range(count)]


def found(collection: Collection, query: str) -> set[str]:
    return {hit.document for hit in collection.search(query, None, k=1000)}


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    with Collection.create(tmp_path / "c.sqlite", SETTINGS) as made:
        yield made


class TestSync:
    def test_only_what_changed_is_read_and_embedded(self, collection: Collection) -> None:
        encoder = Encoder()
        first = sources(20)
        report = collection.sync(first, encoder, words)
        assert (len(report.added), report.embedded, len(encoder.texts)) == (20, 20, 20)

        encoder = Encoder()
        again = sources(20)
        again[3].text = "Something else."
        again.append(Source("new.txt", "A new one."))
        report = collection.sync(again, encoder, words)
        assert (report.added, report.changed, report.removed) == (("new.txt",), ("3.txt",), ())
        assert len(report.unchanged) == 19
        assert sorted(encoder.texts) == ["A new one.", "Something else."]
        assert [source.name for source in again if source.reads] == ["3.txt", "new.txt"]

    def test_within_a_changed_file_only_new_text_is_embedded(self, collection: Collection) -> None:
        encoder = Encoder()
        paragraphs = [f"Paragraph {i} has exactly these nine words in it." for i in range(30)]
        collection.sync([Source("a", "\n\n".join(paragraphs))], encoder, words)
        before = collection.chunk_count
        encoder.texts.clear()
        paragraphs[7] = "This one paragraph is now quite another one entirely."
        report = collection.sync([Source("a", "\n\n".join(paragraphs))], encoder, words)
        assert collection.chunk_count == before
        assert encoder.texts == [paragraphs[7]]
        assert (report.changed, report.embedded, report.passages) == (("a",), 1, before)

    def test_records_that_stay_are_not_even_written_again(self, collection: Collection) -> None:
        records = [Document(f"t.csv:{i}", f"Row {i}", f"The value of row {i}.", "record") for i in range(50)]
        encoder = Encoder()
        collection.sync([Source("t.csv", records=records)], encoder, words)
        records[9] = Document("t.csv:9", "Row 9", "Another value.", "record")
        report = collection.sync([Source("t.csv", records=list(records))], encoder, words)
        assert (report.passages, report.embedded) == (1, 1)
        assert collection.document_count == 50
        assert collection.document("t.csv:9") == records[9]

    def test_a_renamed_file_is_not_embedded_again(self, collection: Collection) -> None:
        encoder = Encoder()
        collection.sync([Source("old.txt", "A whale.")], encoder, words)
        report = collection.sync([Source("new.txt", "A whale.")], encoder, words)
        assert (report.added, report.removed, report.embedded) == (("new.txt",), ("old.txt",), 0)

    def test_files_share_calls_of_the_encoder(self, collection: Collection) -> None:
        encoder = Encoder()
        collection.sync(sources(200), encoder, words)
        assert encoder.calls == 4

    def test_without_prune_what_is_not_given_stays(self, collection: Collection) -> None:
        collection.sync(sources(3), Encoder(), words)
        report = collection.sync([Source("x", "A fish.")], Encoder(), words, prune=False)
        assert report.removed == ()
        assert collection.document_count == 4
        report = collection.sync([Source("x", "A fish.")], Encoder(), words)
        assert report.removed == ("0.txt", "1.txt", "2.txt")
        assert [one.name for one in collection.documents()] == ["x"]
        assert found(collection, "whales") == set()

    def test_an_unreadable_file_is_counted_and_its_old_version_stays(self, collection: Collection) -> None:
        collection.sync([Source("a", "Old words."), Source("b", "Others.")], Encoder(), words)
        error = FileFormatError("the file is damaged")
        for _ in range(2):
            report = collection.sync([Source("a", "New.", error=error), Source("b", "Others.")], Encoder(), words)
            assert report.skipped == {"the file is damaged": ("a",)}
            assert report.errors == {"a": error}
        assert found(collection, "old") == {"a"}

    def test_names_are_unique(self, collection: Collection) -> None:
        twice = [Document("same", "", "One.", "record"), Document("same", "", "Two.", "record")]
        report = collection.sync(
            [Source("a", "First."), Source("a", "Second."), Source("b", records=twice)], Encoder(), words
        )
        assert report.added == ("a",)
        assert sum(map(len, report.skipped.values())) == 2
        report = collection.sync(
            [Source("a", "First."), Source("c", records=[Document("a", "", "Thief.", "text")])], Encoder(), words
        )
        assert "'a' is there already, from a" in next(iter(report.skipped))
        assert collection.document("a").text == "First."

    def test_a_document_may_move_to_another_file(self, collection: Collection) -> None:
        document = Document("book#1", "", "A chapter.", "text")
        collection.sync([Source("old", records=[document])], Encoder(), words)
        report = collection.sync([Source("new", records=[document])], Encoder(), words)
        assert (report.added, report.removed, report.skipped) == (("new",), ("old",), {})
        assert [one.source for one in collection.documents()] == ["new"]

    def test_a_failing_encoder_leaves_what_was_committed(self, collection: Collection) -> None:
        encoder = Encoder()

        def fail() -> None:
            if encoder.calls == 2:
                raise RuntimeError("out of memory")

        encoder.on_call = fail
        with pytest.raises(RuntimeError):
            collection.sync(sources(100), encoder, words)
        assert collection.document_count == 64
        assert collection.sync(sources(100), Encoder(), words).embedded == 36

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_vectors_must_be_finite(self, collection: Collection, bad: float) -> None:
        with pytest.raises(DataError, match="not finite"):
            collection.sync(sources(1), lambda texts: np.full((1, WIDTH), bad, dtype=np.float32), words)

    def test_another_width_is_refused(self, collection: Collection) -> None:
        collection.sync(sources(1), Encoder(), words)
        with pytest.raises(UsageError, match="8 dimensions for a collection of 16"):
            collection.sync(sources(2), Encoder(8), words)
        with pytest.raises(UsageError, match="shape"):
            collection.sync(sources(2), lambda texts: np.zeros((7, WIDTH), dtype=np.float32), words)

    @given(st.lists(st.dictionaries(st.sampled_from("abcde"), st.sampled_from("123"), max_size=5), max_size=6))
    @settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_history_ends_as_a_fresh_collection(
        self, tmp_path_factory: pytest.TempPathFactory, history: list[dict[str, str]]
    ) -> None:
        with Collection.create(tmp_path_factory.mktemp("c") / "c.sqlite", SETTINGS) as one:
            for state in history:
                given_now = [Source(name, f"word{text} of version {text}") for name, text in state.items()]
                one.sync(given_now, Encoder(), words)
                assert {d.name: one.document(d.name).text for d in one.documents()} == {
                    source.name: source.text for source in given_now
                }
                for text in "123":
                    assert found(one, f"word{text}") == {name for name, now in state.items() if now == text}
                assert one.chunk_count == len(state)


class TestForgetting:
    def test_deleted_text_is_never_retrievable(self, collection: Collection) -> None:
        secret = "The quokkafied zyzzyvas of Wrocklaw."
        files = [*sources(300), Source("secret.txt", secret)]
        collection.sync(files, Encoder(), words)
        vector = collection.search("quokkafied", vector_of(secret))[0]
        assert vector.document == "secret.txt"
        stored = collection._connection.execute("SELECT vector FROM chunks ORDER BY id DESC").fetchone()[0]
        assert_holds(collection.path, [b"zyzzyva", b"uokkaf", b"secret.txt", stored], True)

        collection.sync(files[:-1], Encoder(), words)
        assert found(collection, secret) <= {source.name for source in files[:-1]}
        near = collection.search("quokkafied", vector_of(secret), k=1000, fusion=Fusion(kind="linear"))
        assert "secret.txt" not in {hit.document for hit in near}
        with pytest.raises(UnknownName):
            collection.document("secret.txt")
        assert_holds(collection.path, [b"zyzzyva", b"uokkaf", b"Wrocklaw", b"secret.txt", stored], False)

    @pytest.mark.parametrize("how", ["change", "remove", "reset"])
    def test_so_is_text_that_changed_or_was_removed(self, collection: Collection, how: str) -> None:
        secret = Source("s", "The quokkafied zyzzyvas.")
        collection.sync([*sources(30), secret], Encoder(), words)
        if how == "change":
            collection.sync([*sources(30), Source("s", "Nothing.")], Encoder(), words)
        elif how == "remove":
            collection.remove(["s"])
        else:
            collection.reset(SETTINGS)
        assert_holds(collection.path, [b"zyzzyva", b"uokkaf"], False)
        assert found(collection, "zyzzyvas") == set()

    def test_remove_says_what_it_does_not_know_before_it_removes(self, collection: Collection) -> None:
        collection.sync(sources(3), Encoder(), words)
        with pytest.raises(UnknownName, match=r"1\.tx") as refused:
            collection.remove(["0.txt", "1.tx"])
        assert "1.txt" in str(refused.value)
        assert collection.document_count == 3
        collection.remove(["0.txt", "1.txt"])
        assert [one.name for one in collection.documents()] == ["2.txt"]


def assert_holds(path: Path, needles: list[bytes], expected: bool) -> None:
    data = b"".join(
        file.read_bytes()
        for file in path.parent.iterdir()
        if file.name.startswith(path.name) and "shm" not in file.name
    )
    assert [needle in data for needle in needles] == [expected] * len(needles)


class TestContents:
    def test_a_document_comes_back_as_it_was(self, collection: Collection) -> None:
        text = "Setup\n\nInstall it.\n\n\U0001f40b Linux needs more. سلام دنیا\n"
        document = Document(
            *("guide/a.pdf", "A Guide", text, "pdf"),
            pages=(Page(1, 0, 20), Page(2, 20, len(text))),
            headings=(Heading(1, "Setup", 0),),
            metadata={"folder": "guide", "year": 2021, "draft": True, "price": 1.5},
        )
        collection.sync([Source("guide/a.pdf", records=[document], kind="pdf")], Encoder(), words)
        assert collection.document("guide/a.pdf") == document
        (facts,) = collection.documents()
        assert (facts.title, facts.kind, facts.characters) == ("A Guide", "pdf", len(text))
        assert dict(facts.metadata) == dict(document.metadata)
        chunks = collection.chunks("guide/a.pdf")
        assert facts.chunks == len(chunks) == collection.chunk_count
        assert all(one.text == text[one.start : one.end] for one in chunks)
        (source,) = collection.sources()
        assert (source.name, source.kind, source.documents) == ("guide/a.pdf", "pdf", 1)

    def test_headings_are_embedded_but_never_quoted(self, collection: Collection) -> None:
        document = Document("d", "Manual", "It hums.", "text")
        assert embedded_text(document, Chunk(0, 8, "It hums.", "Setup > Linux")) == "Manual > Setup > Linux\nIt hums."
        assert embedded_text(document, Chunk(0, 8, "It hums.", "Manual > Linux")) == "Manual > Linux\nIt hums."
        encoder = Encoder()
        collection.sync([Source("d", records=[document])], encoder, words)
        assert encoder.texts == ["Manual\nIt hums."]
        (hit,) = collection.search("manual", None)
        assert (hit.text, hit.title) == ("It hums.", "Manual")

    def test_other_settings_are_said_and_need_a_reset(self, collection: Collection) -> None:
        collection.sync(sources(3), Encoder(), words)
        collection.set_fusion(Fusion(kind="linear"))
        other = CollectionSettings(encoder="other", chunking=ChunkSettings(size=9, overlap=0))
        assert collection.differences(SETTINGS) == []
        assert collection.differences(other) == ["encoder: 'toy' -> 'other'", "chunking.size: 12 -> 9"]
        collection.reset(other)
        assert (collection.document_count, collection.chunk_count, collection.fusion) == (0, 0, None)
        report = collection.sync(sources(3), Encoder(8), words)
        assert (len(report.added), report.embedded, collection.width) == (3, 3, 8)
        with Collection.open(collection.path) as again:
            assert again.settings == other

    def test_the_tuned_fusion_is_kept(self, collection: Collection) -> None:
        assert collection.fusion is None
        fusion = Fusion(kind="linear", weight=0.7, normal="z")
        collection.set_fusion(fusion)
        with Collection.open(collection.path) as again:
            assert again.fusion == fusion


class TestTogether:
    def test_a_second_sync_waits_for_the_first(self, collection: Collection) -> None:
        inside, go_on, said = threading.Event(), threading.Event(), list[str]()
        encoder = Encoder()
        encoder.on_call = lambda: (inside.set(), go_on.wait(10))
        second_done = threading.Event()

        def second() -> None:
            with Collection.open(collection.path) as other:
                other.sync(sources(5, edition=2), Encoder(), words, on_progress=said.append)
            second_done.set()

        first = threading.Thread(target=collection.sync, args=(sources(5), encoder, words))
        first.start()
        assert inside.wait(10)
        waiting = threading.Thread(target=second)
        waiting.start()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said == ["waiting: another program changes this collection"]
        assert not second_done.is_set()
        go_on.set()
        first.join()
        waiting.join()
        assert found(collection, "edition2") == {f"{i}.txt" for i in range(5)}

    def test_searches_go_on_during_a_sync_and_see_what_is_committed(self, collection: Collection) -> None:
        collection.sync(sources(3), Encoder(), words)
        seen: list[set[str]] = []
        encoder = Encoder()
        with Collection.open(collection.path) as reader:
            encoder.on_call = lambda: seen.append(found(reader, "whales"))
            collection.sync(sources(130), encoder, words)
            assert [len(names) for names in seen] == [3, 67]
            assert len(found(reader, "whales")) == 130
            near = reader.search("", vector_of(sources(130)[129].text), k=1)
            assert near[0].document == "129.txt"

    def test_settings_changed_by_another_program_are_noticed(self, collection: Collection) -> None:
        with Collection.open(collection.path) as other:
            other.reset(CollectionSettings(encoder="other"))
        with pytest.raises(StoreError, match="other settings"):
            collection.sync(sources(1), Encoder(), words)

    def test_a_writer_that_never_ends_is_refused_in_words(self, collection: Collection) -> None:
        collection._connection.execute("PRAGMA busy_timeout = 50")
        other = sqlite3.connect(collection.path)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match="another program is writing"):
            collection.sync(sources(1), Encoder(), words)
        other.close()
        assert len(collection.sync(sources(1), Encoder(), words).added) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
class TestKilled:
    """SIGKILL at any moment: every file is as it was or as it is, and the next sync completes."""

    COUNT = 150

    def prepared(self, tmp_path: Path) -> Path:
        path = tmp_path / "c.sqlite"
        with Collection.create(path, SETTINGS) as made:
            made.sync(sources(self.COUNT), Encoder(), words)
        return path

    def check(self, path: Path) -> int:
        with Collection.open(path) as one:
            assert one._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            old, new = found(one, "edition1"), found(one, "edition2")
            assert old | new == {f"{i}.txt" for i in range(self.COUNT)}
            assert not old & new
            assert all(f"edition{2 if name in new else 1}" in one.document(name).text for name in old | new)
            report = one.sync(sources(self.COUNT, edition=2), Encoder(), words)
            assert len(report.changed) == len(old)
            assert len(found(one, "edition2")) == one.chunk_count == self.COUNT
        assert_holds(path, [b"edition1"], False)
        return len(new)

    @pytest.mark.parametrize(
        ("moment", "number"), [("embed", 1), ("embed", 3), ("write", 1), ("write", 70), ("tidy", 1)]
    )
    def test_at_a_chosen_moment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: int
    ) -> None:
        path = self.prepared(tmp_path)
        child = os.fork()
        if child == 0:
            calls = 0

            def count_down(*arguments: object) -> str:
                nonlocal calls
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return "x"

            encoder = Encoder()
            if moment == "embed":
                encoder.on_call = count_down
            elif moment == "write":
                monkeypatch.setattr(lexical, "indexed_terms", count_down)
            else:
                monkeypatch.setattr(Collection, "_tidy", count_down)
            Collection.open(path).sync(sources(self.COUNT, edition=2), encoder, words)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if moment == "write":  # what "x" had replaced is not what is tested
            with sqlite3.connect(path) as fixed:
                fixed.execute("UPDATE sources SET digest = ''")
                fixed.execute("UPDATE documents SET digest = ''")
            with Collection.open(path) as one:
                assert one._connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                changed = sum("edition2" in one.document(d.name).text for d in one.documents())
                assert (one.document_count, changed) == (self.COUNT, number - 1)
                one.sync(sources(self.COUNT, edition=2), Encoder(), words)
        else:
            assert self.check(path) == {"embed": {1: 0, 3: 128}, "tidy": {1: self.COUNT}}[moment][number]

    @pytest.mark.parametrize("seed", range(5))
    def test_at_a_random_moment(self, tmp_path: Path, seed: int) -> None:
        path = self.prepared(tmp_path)
        child = os.fork()
        if child == 0:
            Collection.open(path).sync(sources(self.COUNT, edition=2), Encoder(), words)
            os._exit(0)
        time.sleep(random.Random(seed).uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        self.check(path)


class TestFiles:
    def test_there_is_one_file_when_nobody_is_there(self, tmp_path: Path) -> None:
        with Collection.create(tmp_path / "deep" / "c.sqlite", SETTINGS) as made:
            made.sync(sources(3), Encoder(), words)
        assert sorted(file.name for file in (tmp_path / "deep").iterdir()) == [".c.sqlite.lock", "c.sqlite"]

    def test_a_read_only_copy_can_be_searched(
        self, collection: Collection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        collection.sync(sources(3), Encoder(), words)
        collection.close()
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
        before = sorted(file.name for file in tmp_path.iterdir())
        with Collection.open(collection.path) as one:
            assert len(found(one, "whales")) == 3
            assert sorted(file.name for file in tmp_path.iterdir()) == before
            with pytest.raises(StoreError, match="may not be written to") as refused:
                one.remove(["0.txt"])
            assert refused.value.remedy

    def test_nothing_is_made_over_something(self, tmp_path: Path) -> None:
        path = tmp_path / "c.sqlite"
        path.write_text("mine")
        with pytest.raises(StoreError, match="already"):
            Collection.create(path, SETTINGS)
        assert path.read_text() == "mine"

    @pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0", os.urandom(5000)])
    def test_what_is_no_collection_is_said(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "c.sqlite"
        path.write_bytes(content)
        with pytest.raises(FileFormatError) as refused:
            Collection.open(path)
        assert refused.value.remedy
        assert path.read_bytes() == content

    def test_a_foreign_database_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "c.sqlite"
        with sqlite3.connect(path) as other:
            other.execute("CREATE TABLE t (x)")
        with pytest.raises(FileFormatError, match="no collection"):
            Collection.open(path)

    def test_none_and_folders(self, tmp_path: Path) -> None:
        for path in (tmp_path / "none.sqlite", tmp_path):
            with pytest.raises(StoreError) as refused:
                Collection.open(path)
            assert refused.value.remedy

    @pytest.mark.parametrize("version", [0, 2, 99])
    def test_other_versions_are_refused(self, collection: Collection, version: int) -> None:
        collection._connection.execute(f"PRAGMA user_version = {version}")
        with pytest.raises(FileFormatError, match="newer" if version else "older") as refused:
            Collection.open(collection.path)
        assert refused.value.remedy

    def test_bad_facts_are_refused(self, collection: Collection) -> None:
        collection._connection.execute("UPDATE facts SET value = '{\"encoder\": 3}'")
        with pytest.raises(FileFormatError, match="CollectionSettings"):
            Collection.open(collection.path)

    def test_damage_is_said_wherever_it_is(self, collection: Collection) -> None:
        collection.sync(sources(200), Encoder(), words)
        collection.close()
        whole = collection.path.read_bytes()
        collection.path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FileFormatError, match="cut short"):
            Collection.open(collection.path)
        dice = random.Random(0)
        refused: list[str | None] = []
        for _ in range(25):
            damaged = bytearray(whole)
            for _ in range(40):
                at = dice.randrange(100, len(whole) - 64)
                damaged[at : at + 64] = dice.randbytes(64)
            collection.path.write_bytes(damaged)
            try:
                with Collection.open(collection.path) as one:
                    one.search("whales", vector_of("x"), fusion=Fusion(kind="linear"))
                    one.documents()
            except CratonError as error:
                refused.append(error.remedy)
        assert len(refused) > 5
        assert all(refused)
