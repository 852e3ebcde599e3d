"""How fast a collection is searched, built and brought up to date, beside bm25s, NumPy and Qdrant Edge in the same run.

Cases
    query/lexical/chunks=N  ms of a search by words (BM25), the best 10: p50; peer: bm25s with PyStemmer
    query/dense/chunks=N    ms of an exact search by vectors, the best 10: p50; peers: NumPy's float32 product over all
                            vectors, and Qdrant Edge, exact
    query/hybrid/chunks=N   ms of both, fused, from 100 candidates of each: p50; peer: bm25s and NumPy, fused alike;
                            limit: 20 ms, the promise for 100,000 passages
    build/chunks=N          s from nothing, without the encoder's work; peer: bm25s, in memory, which keeps no documents
    update/chunks=N         s to bring it up to date when 1 % of the files have changed; peer: building it from nothing
    memory/chunks=N         MB by which a process grows that opens it and searches both ways; peer: bm25s's index and
                            a float32 matrix

How the figures are made
    The corpus is synthetic and always the same: files of ten passages of 40 words, drawn from 30,000 words by Zipf's
    law (exponent 1.05). A vector of 384 dimensions is the sum of its words' random vectors, weighted by how rare they
    are, so texts that share rare words are near, as an encoder's are. A question is six words of one passage.
    Craton's figures are those of `Collection.search`: parsing the question, ranking, reading the passages found and
    making the hits. The peers run their bare search: they return numbers of passages, and read nothing.
    A turn asks the same questions of one contender and gives the median of their times; turns interleave, and the
    figure is the median of the rounds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Case, ContenderError, Document, case, interleave, machine, parser, report
from numpy.typing import NDArray

from craton.errors import UsageError
from craton.retrieval import documents
from craton.retrieval.chunking import ChunkSettings
from craton.retrieval.collection import Collection, CollectionSettings
from craton.retrieval.fusion import DENSE, LEXICAL, Fusion
from craton.retrieval.qdrant import QdrantVectors
from craton.retrieval.vectors import unit

PACKAGES = ("craton", "torch", "numpy", "bm25s", "PyStemmer", "qdrant-edge-py")
BM25S, NUMPY, QDRANT, BOTH = "bm25s", "NumPy", "Qdrant Edge", "bm25s + NumPy"
HYBRID = Fusion(kind="linear", weight=0.6)

VOCABULARY, WIDTH = 30_000, 384
PASSAGES, WORDS = 10, 40  # of a file, of a passage
K, POOL = 10, 100


@dataclass(frozen=True)
class Scope:
    """What a run measures: passages, questions in a turn, rounds."""

    sizes: tuple[int, ...]
    questions: int
    rounds: int


FULL = Scope((10_000, 100_000, 1_000_000), questions=60, rounds=9)
QUICK = Scope((10_000, 100_000), questions=30, rounds=5)


class Corpus:
    """Synthetic files of passages, their vectors, and questions."""

    def __init__(self, chunks: int) -> None:
        dice = np.random.default_rng(0)
        share_V = 1 / np.arange(1, VOCABULARY + 1) ** 1.05
        share_V /= share_V.sum()
        self.chunks = chunks
        self.ids_NW = dice.choice(VOCABULARY, size=(chunks, WORDS), p=share_V).astype(np.int32)
        syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
        self.words = ["".join(syllables[i // 70**place % 70] for place in range(3)) + "x" for i in range(VOCABULARY)]
        self._number = {word: i for i, word in enumerate(self.words)}
        rarity_V = (-np.log(share_V)) ** 2
        self._table_VD = dice.standard_normal((VOCABULARY, WIDTH)).astype(np.float32) * rarity_V[:, None].astype(
            np.float32
        )

    def passage(self, number: int) -> str:
        """The text of a passage."""
        return " ".join(self.words[i] for i in self.ids_NW[number])

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The vectors of texts, [B, D]."""
        numbers = ([self._number[word] for word in text.split() if word in self._number] for text in texts)
        return np.stack([self._table_VD[ids].sum(axis=0) for ids in numbers])

    def files(self, edition: int = 1) -> list[File]:
        """All files; in a later edition 1 % of them have changed."""
        count = self.chunks // PASSAGES
        return [File(self, i, edition if i % 100 == 0 else 1) for i in range(count)]

    def questions(self, count: int) -> list[tuple[str, NDArray[np.float32]]]:
        """Questions and their vectors."""
        dice = np.random.default_rng(1)
        texts = []
        for _ in range(count):
            words = dice.choice(self.ids_NW[dice.integers(self.chunks)], 6, replace=False)
            texts.append(" ".join(self.words[i] for i in words))
        return list(zip(texts, unit(self.embed(texts)), strict=True))


@dataclass(frozen=True)
class File:
    """A file of the corpus, as `Collection.sync` takes them."""

    corpus: Corpus
    number: int
    edition: int
    kind: str = "text"
    path: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.number}.txt"

    @property
    def digest(self) -> str:
        return f"{self.number} {self.edition}"

    def documents(self) -> Iterator[documents.Document]:
        first = self.number * PASSAGES
        passages = [self.corpus.passage(i) for i in range(first, first + PASSAGES)]
        if self.edition > 1:  # one of its passages is another one
            passages[0] = " ".join(reversed(passages[0].split()))
        yield documents.Document(self.name, "", "\n\n".join(passages), "text")


class Peers:
    """The peers' indexes over the passages of a collection. Those that are not installed are named in `absent`."""

    def __init__(self, corpus: Corpus, matrix_ND: NDArray[np.float32], folder: Path) -> None:
        self.matrix_ND = matrix_ND
        self.absent: dict[str, str] = {}
        self.build_seconds: float | None = None
        self._bm25: Any = None
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            self.absent |= dict.fromkeys((BM25S, BOTH), f"{error.name} is not installed")
        else:
            self._bm25s, self._stemmer = bm25s, Stemmer.Stemmer("english")
            started = time.perf_counter()
            self._bm25 = bm25s.BM25()
            texts = [corpus.passage(i) for i in range(corpus.chunks)]
            tokens = bm25s.tokenize(texts, stemmer=self._stemmer, show_progress=False)
            self._bm25.index(tokens, show_progress=False)
            self.build_seconds = time.perf_counter() - started
            self._bm25.save(str(folder / "bm25s"))
        try:
            self._qdrant = QdrantVectors(folder / "qdrant", WIDTH)
            self._qdrant.add(np.arange(corpus.chunks), matrix_ND)
        except UsageError as error:
            self.absent[QDRANT] = error.what

    def words(self, query: str, k: int = K) -> dict[int, float]:
        """bm25s."""
        tokens = self._bm25s.tokenize([query], stemmer=self._stemmer, show_progress=False)
        found, scores = self._bm25.retrieve(tokens, k=k, show_progress=False)
        return dict(zip(found[0].tolist(), scores[0].tolist(), strict=True))

    def vectors(self, vector_D: NDArray[np.float32], k: int = K) -> dict[int, float]:
        """NumPy."""
        score_N = self.matrix_ND @ vector_D
        best = np.argpartition(score_N, -k)[-k:]
        best = best[np.argsort(-score_N[best])]
        return dict(zip(best.tolist(), score_N[best].tolist(), strict=True))

    def both(self, query: str, vector_D: NDArray[np.float32]) -> list[int]:
        """bm25s and NumPy, fused as Craton does."""
        lexical, dense = self.words(query, POOL), self.vectors(vector_D, POOL)
        ids = list(dict.fromkeys([*lexical, *dense]))
        columns = (np.array([side.get(i, np.nan) for i in ids]) for side in (lexical, dense))
        order = np.argsort(-HYBRID.fuse(*columns))[:K]
        return [ids[i] for i in order]

    def qdrant(self, vector_D: NDArray[np.float32]) -> Any:
        """Qdrant Edge."""
        return self._qdrant.search(vector_D, K)

    def close(self) -> None:
        """Close what is open."""
        if QDRANT not in self.absent:
            self._qdrant.close()


def main() -> None:
    """Measure, print the table, write the JSON."""
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--resident", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if arguments.resident:
        print(resident(arguments.resident[0], Path(arguments.resident[1])))
        return
    facts = machine(PACKAGES)
    cases: dict[str, Case] = {}
    scope = QUICK if arguments.quick else FULL
    for size in scope.sizes:
        with tempfile.TemporaryDirectory() as folder:
            cases |= measure(size, scope, Path(folder))
    order = ("query", "build", "update", "memory")
    cases = dict(sorted(cases.items(), key=lambda item: order.index(item[0].partition("/")[0])))
    report(Document(machine=facts, cases=cases), arguments.json)


def measure(size: int, scope: Scope, folder: Path) -> dict[str, Case]:
    """All cases of one size."""
    say(f"{size} passages: building ...")
    corpus = Corpus(size)
    encoder = Encoder(corpus)
    settings = CollectionSettings(encoder="synthetic", chunking=ChunkSettings(size=WORDS + 4, overlap=0))
    name = f"chunks={size}"
    with Collection.create(folder / "c.sqlite", settings) as collection:
        build = encoder.seconds_without(lambda: collection.sync(corpus.files(), encoder, count_words))
        assert collection.chunk_count == size, collection.chunk_count
        with collection._transaction("read the vectors"):
            matrix_ND = collection._searcher.vectors(np.arange(1, size + 1))
        peers = Peers(corpus, matrix_ND, folder)
        np.save(folder / "matrix.npy", matrix_ND)
        say(f"{size} passages: asking ...")
        cases = query_cases(name, collection, peers, corpus.questions(scope.questions), scope.rounds)
        peers.close()
        built = {BM25S: peers.build_seconds} if peers.build_seconds is not None else {}
        cases[f"build/{name}"] = case(build, built, "s", less_is_better=True, absent=only(peers.absent, BM25S))
        update = encoder.seconds_without(lambda: collection.sync(corpus.files(edition=2), encoder, count_words))
        cases[f"update/{name}"] = case(update, {"from nothing": build}, "s", less_is_better=True)
    np.savez(folder / "question.npz", text=corpus.questions(1)[0][0], vector=corpus.questions(1)[0][1])
    figures, failed = interleave(
        {what: lambda what=what: grown(what, folder) for what in ("craton", *([BOTH] if built else []))}, rounds=1
    )
    if "craton" in failed:
        raise ContenderError(failed["craton"])
    cases[f"memory/{name}"] = case(
        figures.pop("craton"), figures, "MB", less_is_better=True, absent=failed | only(peers.absent, BOTH)
    )
    return cases


class Encoder:
    """The corpus's vectors, and the time that making them has taken."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._seconds = corpus, 0.0

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        started = time.perf_counter()
        vectors_BD = self._corpus.embed(texts)
        self._seconds += time.perf_counter() - started
        return vectors_BD

    def seconds_without(self, work: Callable[[], object]) -> float:
        """How long `work` takes, the encoder's share left out."""
        before, started = self._seconds, time.perf_counter()
        work()
        return time.perf_counter() - started - (self._seconds - before)


def query_cases(
    name: str,
    collection: Collection,
    peers: Peers,
    questions: Sequence[tuple[str, NDArray[np.float32]]],
    rounds: int,
) -> dict[str, Case]:
    """The times of searches, in ms."""

    def ours(fusion: Fusion) -> Callable[[str, NDArray[np.float32]], object]:
        return lambda query, vector: collection.search(query, vector, k=K, fusion=fusion)

    contenders: dict[tuple[str, str], Callable[[str, NDArray[np.float32]], object]] = {
        ("lexical", "craton"): ours(LEXICAL),
        ("lexical", BM25S): lambda query, vector: peers.words(query),
        ("dense", "craton"): ours(DENSE),
        ("dense", NUMPY): lambda query, vector: peers.vectors(vector),
        ("dense", QDRANT): lambda query, vector: peers.qdrant(vector),
        ("hybrid", "craton"): ours(HYBRID),
        ("hybrid", BOTH): lambda query, vector: peers.both(query, vector),
    }

    def turn(search: Callable[[str, NDArray[np.float32]], object]) -> float:
        times = []
        for query, vector in questions:
            started = time.perf_counter()
            search(query, vector)
            times.append(time.perf_counter() - started)
        return 1000 * float(np.median(times))

    running = {key: search for key, search in contenders.items() if key[1] not in peers.absent}
    for search in running.values():
        search(*questions[0])  # the vectors are read at the first search
    figures, _ = interleave({key: lambda search=search: turn(search) for key, search in running.items()}, rounds)
    cases = {}
    for kind in ("lexical", "dense", "hybrid"):
        sides = {peer: figure for (what, peer), figure in figures.items() if what == kind}
        rivals = [peer for what, peer in contenders if what == kind]
        cases[f"query/{kind}/{name}"] = case(
            sides.pop("craton"),
            sides,
            "ms",
            less_is_better=True,
            limit=20.0 if kind == "hybrid" and name == "chunks=100000" else None,
            absent=only(peers.absent, *rivals),
        )
    return cases


def grown(what: str, folder: Path) -> float:
    """MB by which a process of its own has grown after its first search."""
    command = [sys.executable, __file__, "--resident", what, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContenderError(done.stderr.strip().rpartition("\n")[2])
    return float(done.stdout.split()[-1])


def resident(what: str, folder: Path) -> float:
    """In the process of its own: open, search, and see how much more memory is resident."""
    import torch

    torch._int_mm(torch.zeros(64, 64, dtype=torch.int8), torch.zeros(64, 1, dtype=torch.int8))  # loads its libraries
    question = np.load(folder / "question.npz")
    query, vector = str(question["text"]), question["vector"]
    if what == "craton":
        before = resident_megabytes()
        with Collection.open(folder / "c.sqlite") as collection:
            collection.search(query, vector, fusion=HYBRID)
            return resident_megabytes() - before
    import bm25s
    import Stemmer

    before = resident_megabytes()
    index, matrix_ND = bm25s.BM25.load(str(folder / "bm25s")), np.load(folder / "matrix.npy")
    tokens = bm25s.tokenize([query], stemmer=Stemmer.Stemmer("english"), show_progress=False)
    index.retrieve(tokens, k=K, show_progress=False)
    np.argpartition(matrix_ND @ vector, -K)
    return resident_megabytes() - before


def resident_megabytes() -> float:
    """What this process holds in memory now."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError as error:
        raise SystemExit("memory is only measured on Linux") from error
    return pages * 4096 / 1e6


def only(absent: dict[str, str], *names: str) -> dict[str, str]:
    """Those of the absent peers."""
    return {name: reason for name, reason in absent.items() if name in names}


def count_words(text: str) -> int:
    """The length of a text for cutting."""
    return len(text.split())


def say(what: str) -> None:
    """Progress, to stderr."""
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
