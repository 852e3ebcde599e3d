"""From documents to shards, in memory or in a folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import numpy as np

from craton.checkpoints.disk import disk_errors, sync_folder
from craton.data.documents import Document, DocumentEncoder, chunked, clean, digest, fingerprint, token_bytes
from craton.data.shard_files import (
    TOKEN_BYTES_NAME,
    PartEntry,
    Shard,
    ShardEntry,
    ShardsManifest,
    TokenizerEntry,
    token_type,
    write_array,
    write_manifest,
    write_shard,
)
from craton.data.shards import Shards, open_shards
from craton.errors import DataError, UsageError
from craton.modalities.text.tokenizer import Tokenizer
from craton.store.locks import held

SHARD_TOKENS: Final = 1 << 25
CHUNK_CHARACTERS: Final = 1 << 20
"""So much text goes through the tokeniser at a time: enough for its threads, little to hold."""

S = TypeVar("S")


@dataclass
class Collected(Generic[S]):
    """What has become of one part: its shards, stored, and its counts."""

    name: str
    weight: float
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    shards: list[S] = field(default_factory=list)
    pending: list[Document] = field(default_factory=list)
    pending_tokens: int = 0


class Collector(Generic[S]):
    """Cuts documents into shards and hands each to `store`; keeps a share of the documents apart.

    holdout: the share. Whether a document is held out depends on its text alone, so that it is in every preparation,
    and duplicates stay on one side. Where that chooses none, as there are few documents, the end of the longest text
    is.
    """

    def __init__(
        self, store: Callable[[Shard], S], tokenizer: Tokenizer, holdout: float, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self._store, self._holdout, self._shard_tokens = store, holdout, shard_tokens
        self.dtype = token_type(tokenizer.vocab_size)
        self.token_bytes = token_bytes(tokenizer)
        self.parts: list[Collected[S]] = []
        self.heldout: Collected[S] = Collected("held out", 1.0)
        self._longest: tuple[Document, Collected[S]] | None = None

    @property
    def tokens(self) -> int:
        """Tokens taken so far, but for a document that waits to the end."""
        return sum(part.tokens for part in [*self.parts, self.heldout])

    def begin(self, name: str, weight: float = 1.0) -> None:
        """What follows belongs to a new part."""
        if self.parts:
            self._flush(self.parts[-1])
        self.parts.append(Collected(name, weight))

    def add(self, document: Document, digest: bytes) -> None:
        """Take a document; `digest` is that of its text."""
        if int.from_bytes(digest[:8], "big") < self._holdout * 2**64:
            self._put(document, self.heldout)
            return
        part = self.parts[-1]
        may_be_cut = self._holdout > 0 and document.trained is None
        if may_be_cut and (self._longest is None or len(document.ids) > len(self._longest[0].ids)):
            if self._longest is not None:
                self._put(*self._longest)
            self._longest = document, part
        else:
            self._put(document, part)

    def finish(self) -> None:
        """Store what is left. Raises DataError where a part holds nothing to train on."""
        if self._longest is not None:
            document, part = self._longest
            if not self.heldout.documents:
                total = len(document.ids) + sum(one.tokens for one in self.parts)
                document, end = self._split(document, math.ceil(self._holdout * total))
                self._put(end, self.heldout)
            self._put(document, part)
        for one in [*self.parts, self.heldout]:
            self._flush(one)
        for part in self.parts:
            if not part.documents:
                raise DataError("no document is left to train on", where=part.name)

    def _put(self, document: Document, part: Collected[S]) -> None:
        if not len(document.ids):
            return
        part.tokens += len(document.ids)
        part.documents += 1
        part.bytes += document.text_bytes
        part.pending.append(document)
        part.pending_tokens += len(document.ids)
        if part.pending_tokens >= self._shard_tokens:
            self._flush(part)

    def _flush(self, part: Collected[S]) -> None:
        if not part.pending:
            return
        lengths = np.array([len(document.ids) for document in part.pending])
        tokens = np.concatenate([document.ids for document in part.pending]).astype(self.dtype)
        first = np.cumsum(lengths) - lengths
        text_bytes = [document.text_bytes for document in part.pending]
        told = np.add.reduceat(self.token_bytes[tokens].astype(np.int64), first)
        trained = None
        if any(document.trained is not None for document in part.pending):
            masks = [np.ones(len(d.ids), np.bool_) if d.trained is None else d.trained for d in part.pending]
            trained = np.concatenate(masks).astype(np.uint8)
        documents = np.stack([first, np.array(text_bytes), told], axis=1).astype(np.int64)
        part.shards.append(self._store(Shard(tokens, documents, trained)))
        part.pending, part.pending_tokens = [], 0

    def _split(self, document: Document, wanted: int) -> tuple[Document, Document]:
        """The document without its last `wanted` tokens (half of them at most), and these."""
        cut = len(document.ids) - min(wanted, len(document.ids) // 2)
        told = self.token_bytes[document.ids].astype(np.int64)
        head_bytes = round(document.text_bytes * int(told[:cut].sum()) / max(int(told.sum()), 1))
        return (
            Document(document.ids[:cut], head_bytes),
            Document(document.ids[cut:], document.text_bytes - head_bytes),
        )


class FolderCollector(Collector[ShardEntry]):
    """Collects into a folder, which becomes one of shards by `publish`."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, holdout: float, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._written = folder, 0
        super().__init__(self._write, tokenizer, holdout, shard_tokens)

    def write_manifest(self, tokenizer: TokenizerEntry, prepared: dict[str, Any]) -> ShardsManifest:
        """Write the manifest, after `finish`: with it the folder is complete."""

        def entry(part: Collected[ShardEntry]) -> PartEntry:
            return PartEntry(
                name=part.name,
                weight=part.weight,
                tokens=part.tokens,
                documents=part.documents,
                bytes=part.bytes,
                shards=tuple(part.shards),
            )

        manifest = ShardsManifest(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            tokenizer=tokenizer,
            dtype=self.dtype,
            token_bytes=write_array(self._folder, TOKEN_BYTES_NAME, self.token_bytes),
            parts=tuple(entry(part) for part in self.parts),
            heldout=entry(self.heldout) if self.heldout.documents else None,
            prepared=prepared,
        )
        write_manifest(self._folder, manifest)
        return manifest

    def _write(self, shard: Shard) -> ShardEntry:
        self._written += 1
        return write_shard(self._folder, self._written - 1, shard)


def shards_from_documents(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: str | Path | None = None,
    *,
    name: str = "the documents",
    holdout: float = 0.0,
) -> Shards:
    """Shards of texts, in memory, or in a new folder if one is given.

    name: of the tokeniser, for errors. Empty texts are left out. Raises DataError where no text is left, UsageError for
    a tokeniser without an end token or a folder that exists, StoreError where the disk refuses.
    """
    encoder, entry = DocumentEncoder(tokenizer), tokenizer_entry(tokenizer, name)

    def fill(collector: Collector[Any]) -> None:
        collector.begin("documents")
        for texts in chunked(filter(None, map(clean, documents)), CHUNK_CHARACTERS):
            for text, document in zip(texts, encoder.encode(texts), strict=True):
                collector.add(document, digest(text))
        collector.finish()

    if folder is not None:
        with new_folder(Path(folder)) as unfinished:
            on_disk = FolderCollector(unfinished, tokenizer, holdout)
            fill(on_disk)
            on_disk.write_manifest(entry, {})
        return open_shards(folder)
    in_memory = Collector[Shard](lambda shard: shard, tokenizer, holdout)
    fill(in_memory)

    def stream(part: Collected[Shard]) -> Shards:
        return Shards(part.shards, entry, in_memory.token_bytes, name=part.name)

    [part] = in_memory.parts
    heldout = stream(in_memory.heldout) if in_memory.heldout.documents else None
    return Shards(part.shards, entry, in_memory.token_bytes, name=part.name, heldout=heldout)


def tokenizer_entry(tokenizer: Tokenizer, name: str) -> TokenizerEntry:
    """What shards remember of their tokeniser. Raises UsageError for one without an end token."""
    return TokenizerEntry(
        name=name,
        sha256=fingerprint(tokenizer),
        vocab_size=tokenizer.vocab_size,
        end_id=DocumentEncoder(tokenizer).end_id,
    )


@contextlib.contextmanager
def new_folder(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder to fill that takes its name, `folder`, when the block ends well; otherwise nothing is there.

    Until then it is a hidden folder beside it, under a lock. What a killed process left there is cleared; while another
    is at work, this one waits (`on_wait` is called). Raises UsageError if `folder` exists, StoreError where the disk
    refuses.
    """
    folder = folder.absolute()
    # A name of its own: who holds a lock that was removed meanwhile may fail by it, but two folders never mix.
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    lock = folder.with_name(f".{folder.name}.lock")
    _refuse_existing(folder)
    with disk_errors("create the folder", folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with held(lock, on_wait):
            _refuse_existing(folder)  # the process that was waited for may have made it
            with disk_errors("create the folder", part):
                for left in folder.parent.glob(f".{glob.escape(folder.name)}.????????.part"):
                    shutil.rmtree(left)
                part.mkdir()
            yield part
            with disk_errors("finish the folder", folder):
                sync_folder(part)
                os.rename(part, folder)
                sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        lock.unlink(missing_ok=True)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise UsageError(f"{folder} exists already", remedy="choose another name, or remove it first")
