"""What is done to each document on its own, here or in other processes: compare, sign, tokenise."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import tokenizers

from craton.data.decontamination import EvaluationOverlap
from craton.data.deduplication import Signature, signature
from craton.data.documents import Document, DocumentEncoder, rendered_document, token_bytes
from craton.data.records import Record
from craton.data.rendering import Renderer
from craton.data.schema import Schema
from craton.data.words import WordHasher
from craton.errors import CratonError, DataError
from craton.modalities.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record that may become a document. part: of the mixture. text: all that it says; digest: of it. record: None
    where the text is all."""

    part: int
    origin: str
    text: str
    digest: bytes
    record: Record | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What was found out about a candidate. overlap: the evaluation record that it repeats, and then no document."""

    signature: Signature | None
    overlap: str | None
    document: Document | None


@dataclass(frozen=True)
class Task:
    """What to do, in a form that travels to another process. near: whether signatures are wanted."""

    tokenizer_json: str
    special_tokens: Mapping[str, str]
    eos_ids: tuple[int, ...]
    chat_templates: Mapping[str, str]
    near: bool
    overlap: EvaluationOverlap | None

    @classmethod
    def of(cls, tokenizer: Tokenizer, near: bool, overlap: EvaluationOverlap | None) -> Task:
        """The task for documents of `tokenizer`."""
        special, chat = dict(tokenizer.special_tokens), dict(tokenizer.chat_templates)
        return cls(tokenizer.backend.to_str(), special, tokenizer.eos_ids, chat, near, overlap)


Chunk = tuple[Schema, list[Candidate]]


class Worker:
    """Does a `Task` for one chunk of candidates after another."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._tokenizer = Tokenizer(
            tokenizers.Tokenizer.from_str(task.tokenizer_json),
            special_tokens=task.special_tokens,
            eos_ids=task.eos_ids,
            chat_templates=task.chat_templates,
        )
        self._encoder = DocumentEncoder(self._tokenizer)
        self._token_bytes = token_bytes(self._tokenizer)
        self._hasher = WordHasher()

    def __call__(self, chunk: Chunk) -> list[Result]:
        """A result for each candidate. Raises what rendering raises."""
        schema, candidates = chunk
        found = [self._compare(candidate.text) for candidate in candidates]
        wanted = [c for c, (_, overlap) in zip(candidates, found, strict=True) if overlap is None]
        documents = iter(self._documents(schema, wanted))
        return [Result(sig, overlap, None if overlap else next(documents)) for sig, overlap in found]

    def _compare(self, text: str) -> tuple[Signature | None, str | None]:
        overlap = self._task.overlap
        if not self._task.near and overlap is None:
            return None, None
        hashes = self._hasher(text)
        return signature(hashes) if self._task.near else None, overlap.find(hashes) if overlap else None

    def _documents(self, schema: Schema, candidates: Sequence[Candidate]) -> list[Document]:
        if schema == "text":
            return self._encoder.encode([candidate.text for candidate in candidates])
        renderer = Renderer(self._tokenizer, schema)
        records = [candidate.record for candidate in candidates if candidate.record is not None]
        return [rendered_document(renderer.render(record), self._token_bytes) for record in records]


def work_through(task: Task, chunks: Iterable[Chunk], workers: int) -> Iterator[tuple[Chunk, list[Result]]]:
    """Each chunk with its results, in order. With one worker in this process, where the tokeniser uses its own threads;
    else in `workers` processes: with MinHash a third of the work is Python's, which threads would not share.

    Raises what a worker raises, and DataError where a worker process dies.
    """
    if workers == 1:
        worker = Worker(task)
        for chunk in chunks:
            yield chunk, worker(chunk)
        return
    with _processes(task, workers) as pool:
        waiting: deque[tuple[Chunk, Future[list[Result] | _Refusal]]] = deque()
        chunks = iter(chunks)
        while True:
            # A dead worker shows where work is handed in as well as where it is fetched.
            try:
                for chunk in itertools.islice(chunks, 2 * workers - len(waiting)):
                    waiting.append((chunk, pool.submit(_work, chunk)))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                result = future.result()
            except BrokenProcessPool:
                raise DataError(
                    "a worker process died, most likely for want of memory",
                    remedy="use fewer workers, or split documents of many megabytes",
                ) from None
            if isinstance(result, _Refusal):
                raise result.error()
            yield chunk, result


@contextlib.contextmanager
def _processes(task: Task, workers: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end at once with the block, whatever they are at."""
    before = set(multiprocessing.active_children())
    # Spawned and not forked: the threads of the tokeniser and of torch do not survive a fork.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (task,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


@dataclass(frozen=True)
class _Refusal:
    """An error on its way between processes; exceptions with arguments of their own do not survive pickling."""

    kind: type[CratonError]
    what: str
    where: str | None
    remedy: str | None

    def error(self) -> CratonError:
        error = self.kind.__new__(self.kind)
        CratonError.__init__(error, self.what, where=self.where, remedy=self.remedy)
        return error


_worker: Any = None


def _start(task: Task) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process for each core is enough
    _worker = Worker(task)


def _end_with_parent() -> None:
    """A pool's processes would wait for work for ever when its own process was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(chunk: Chunk) -> list[Result] | _Refusal:
    try:
        result: list[Result] = _worker(chunk)
    except CratonError as error:
        return _Refusal(type(error), error.what, error.where, error.remedy)
    return result
