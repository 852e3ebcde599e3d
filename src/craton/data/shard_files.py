"""The files of a shard folder: a manifest, and for each shard its tokens and a table of its documents, memory-mapped.

manifest.json         tokeniser, parts with weights, counts, sizes and SHA-256 of every file, how it was prepared
token_bytes.bin       uint16[vocabulary]: bytes of text that each token stands for, 0 for special tokens
tokens-00000.bin      uint16 (vocabularies below 65536) or uint32, little-endian: documents one after another
documents-00000.bin   int64[documents, 3]: first token, bytes of its text, bytes that its tokens stand for
trained-00000.bin     uint8[tokens], only where not every token is to be learnt (rendered chats and prompts)
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, ValidationError

from craton.checkpoints.disk import disk_errors, sha256_of, write_synced
from craton.config import Settings
from craton.errors import FileFormatError

MANIFEST_NAME: Final = "manifest.json"
TOKEN_BYTES_NAME: Final = "token_bytes.bin"
VERSION: Final = 1
FIRST, TEXT_BYTES, TOKEN_BYTES = range(3)
"""Columns of a table of documents."""

TokenType = Literal["uint16", "uint32"]
Tokens = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Shard:
    """Documents one after another, in memory or mapped. tokens[T]; documents[N, 3]; trained[T], None where all are."""

    tokens: Tokens
    documents: npt.NDArray[np.int64]
    trained: npt.NDArray[np.uint8] | None


class FileEntry(Settings):
    """A file as it was written."""

    name: str = Field(pattern=r"^[a-z_]+(-\d{5,})?\.bin$", description="its name in the folder")
    size: int = Field(ge=0, description="bytes")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of its content, in hex")


class ShardEntry(Settings):
    """One shard."""

    tokens: int = Field(ge=1, description="tokens")
    documents: int = Field(ge=1, description="documents")
    files: tuple[FileEntry, ...] = Field(description="tokens, documents and, where some are not learnt, trained")


class PartEntry(Settings):
    """What was prepared as one: a source of a mixture, all sources, or the held-out documents."""

    name: str = Field(description="what to call it in reports")
    weight: float = Field(gt=0, description="its share in a mixture, relative to those of the other parts")
    tokens: int = Field(ge=0, description="tokens")
    documents: int = Field(ge=0, description="documents")
    bytes: int = Field(ge=0, description="bytes of the documents' text")
    shards: tuple[ShardEntry, ...] = Field(description="its shards in order")


class TokenizerEntry(Settings):
    """The tokeniser whose ids the shards hold."""

    name: str = Field(description="where it came from")
    sha256: str = Field(description="of its tokenizer.json")
    vocab_size: int = Field(ge=1, description="ids are smaller than this")
    end_id: int = Field(ge=0, description="the token that ends each document of text")


class ShardsManifest(Settings):
    """What a shard folder holds."""

    format: Literal["craton-shards"] = Field("craton-shards", description="what this file is")
    version: int = Field(VERSION, description="of the format")
    created: str = Field(description="when, in UTC")
    tokenizer: TokenizerEntry = Field(description="whose ids these are")
    dtype: TokenType = Field(description="of the tokens")
    token_bytes: FileEntry = Field(description="the table of the tokens' bytes")
    parts: tuple[PartEntry, ...] = Field(min_length=1, description="what to train on")
    heldout: PartEntry | None = Field(description="what to evaluate on, never trained")
    prepared: dict[str, Any] = Field(default_factory=dict, description="settings and counts of the preparation")


def token_type(vocab_size: int) -> TokenType:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size < 65536 else "uint32"


def write_array(folder: Path, name: str, array: npt.NDArray[Any]) -> FileEntry:
    """Write a new file, to the disk. Raises StoreError."""
    data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).data.cast("B")
    path = folder / name
    with disk_errors(f"write {name}", path):
        write_synced(path, [data])
    return FileEntry(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_shard(folder: Path, number: int, shard: Shard) -> ShardEntry:
    """Write the files of a shard. Raises StoreError."""
    files = [
        write_array(folder, f"tokens-{number:05}.bin", shard.tokens),
        write_array(folder, f"documents-{number:05}.bin", shard.documents),
    ]
    if shard.trained is not None:
        files.append(write_array(folder, f"trained-{number:05}.bin", shard.trained))
    return ShardEntry(tokens=len(shard.tokens), documents=len(shard.documents), files=tuple(files))


def map_shard(folder: Path, entry: ShardEntry, dtype: TokenType) -> Shard:
    """Map the files of a shard. Raises FileFormatError for a missing file or a wrong size."""
    n, m = entry.tokens, entry.documents
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "tokens": (dtype, (n,)),
        "documents": ("int64", (m, 3)),
        "trained": ("uint8", (n,)),
    }
    arrays: dict[str, npt.NDArray[Any]] = {}
    for file in entry.files:
        kind = file.name.split("-")[0]
        if kind not in shapes:
            raise damaged(folder / MANIFEST_NAME, f"it lists {file.name}, which no shard has")
        arrays[kind] = map_array(folder, file, *shapes[kind])
    for kind in ("tokens", "documents"):
        if kind not in arrays:
            raise damaged(folder / MANIFEST_NAME, f"a shard has no {kind} file")
    return Shard(arrays["tokens"], arrays["documents"], arrays.get("trained"))


def map_array(folder: Path, file: FileEntry, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Map a file as an array. Raises FileFormatError where it is missing or its size is not what it should be."""
    path, kind = folder / file.name, np.dtype(dtype).newbyteorder("<")
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise damaged(path, "the file is missing") from None
    wanted = int(np.prod(shape)) * kind.itemsize
    if size != file.size or size != wanted:
        raise damaged(path, f"{size} bytes, but the manifest says {file.size} and its counts make {wanted}")
    with disk_errors(f"open {file.name}", path):
        return np.memmap(path, kind, "r", shape=shape)


def check_digests(folder: Path, manifest: ShardsManifest) -> None:
    """Read every file and compare its SHA-256. Raises FileFormatError for the first that differs."""
    parts = [*manifest.parts, *([manifest.heldout] if manifest.heldout else [])]
    files = [file for part in parts for shard in part.shards for file in shard.files]
    for file in [manifest.token_bytes, *files]:
        if sha256_of(folder / file.name) != file.sha256:
            raise damaged(folder / file.name, "its SHA-256 is not that of the manifest")


def write_manifest(folder: Path, manifest: ShardsManifest) -> None:
    """Write the manifest, which is written last. Raises StoreError."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    path = folder / MANIFEST_NAME
    with disk_errors(f"write {MANIFEST_NAME}", path):
        write_synced(path, [text.encode()])


def read_manifest(folder: Path) -> ShardsManifest:
    """The manifest of a shard folder. Raises FileFormatError for a folder without one, or one that is damaged."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        what = "there is no such folder" if not folder.exists() else "this is no folder of shards: it has no manifest"
        raise FileFormatError(what, where=os.fspath(folder), remedy="make one with `craton data prepare`")
    with disk_errors(f"read {MANIFEST_NAME}", path):
        raw = path.read_bytes()
    try:
        values = json.loads(raw)
        if not isinstance(values, dict) or values.get("format") != "craton-shards":
            raise damaged(path, "it is not the manifest of a shard folder")
        if values.get("version") != VERSION:
            raise FileFormatError(
                f"the shards have format version {values.get('version')}, this Craton reads {VERSION}",
                where=str(path),
                remedy="update Craton, or prepare the data again",
            )
        return ShardsManifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"no JSON ({error})") from None


def damaged(path: Path, why: str) -> FileFormatError:
    """The error for a shard folder that is not what it was when it was written."""
    return FileFormatError(f"the shards are damaged: {why}", where=str(path), remedy="prepare the data again")
