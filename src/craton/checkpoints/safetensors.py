"""safetensors files in and out: one file, or shards with their index, read through a private memory map.

The header is checked first (`safetensors_header`) and needs no torch; torch is imported where a tensor is made.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from craton.checkpoints.disk import disk_errors, release_pages, sync_folder, write_synced
from craton.checkpoints.safetensors_header import (
    DTYPES,
    MAX_HEADER_BYTES,
    PICKLE_REMEDY,
    TensorInfo,
    damaged,
    parse_json,
    read_header,
)
from craton.errors import CheckpointError, StoreError, UsageError

if TYPE_CHECKING:
    import torch

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
PICKLE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
DEFAULT_SHARD_BYTES: Final = 5_000_000_000


class SafetensorsFile:
    """One `.safetensors` file. `tensors` and `metadata` are known and checked; the data is mapped when first used."""

    def __init__(self, path: Path, tensors: dict[str, TensorInfo], metadata: dict[str, str], stamp: tuple[int, ...]):
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self._stamp = stamp
        self._map: mmap.mmap | None = None

    @classmethod
    def open(cls, path: str | Path) -> SafetensorsFile:
        """Check the header of `path` against the file.

        Raises:
            UsageError: there is no such file.
            FileFormatError: the file is not safetensors, is cut short, or lies about its sizes.
            StoreError: the file cannot be read.
        """
        path = Path(path)
        if not os.path.isfile(path):
            raise UsageError(f"no such file: {path}", where=str(path))
        with disk_errors(f"read {path.name}", path), path.open("rb") as file:
            stat = os.fstat(file.fileno())
            tensors, metadata = read_header(file, stat.st_size, path)
        return cls(path, tensors, metadata, _stamp(stat))

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor `name` over a private map of the file: no copy, and what is written to it never reaches the disk.

        (A tensor that is not aligned to its element size in the file, as old writers left them, is copied.)

        Raises:
            CheckpointError: no such tensor, or an element type that torch does not have.
            FileFormatError: the file changed after it was opened.
        """
        import torch

        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"no tensor {name!r} in {self.path.name}", where=str(self.path))
        torch_name = DTYPES[info.dtype][1]
        if torch_name is None:
            raise CheckpointError(
                f"tensor {name!r} has packed elements of type {info.dtype}, which are not supported",
                where=str(self.path),
                remedy="use a version of this model in bf16 or fp8",
            )
        dtype = getattr(torch, torch_name)
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=dtype)
        file = self._mapped()
        if info.offset % dtype.itemsize:
            copy = bytearray(file[info.offset : info.offset + info.nbytes])
            return torch.frombuffer(copy, dtype=dtype).reshape(info.shape)
        count = info.nbytes // dtype.itemsize
        return torch.frombuffer(file, dtype=dtype, count=count, offset=info.offset).reshape(info.shape)

    def release(self) -> None:
        """Give back the memory that reading tensors has filled (see `release_pages`); they stay valid."""
        if self._map is not None:
            release_pages(self._map)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with disk_errors(f"map {self.path.name}", self.path), self.path.open("rb") as file:
                # The checks hold for the file that was checked, not for what a download may have put in its place.
                if _stamp(os.fstat(file.fileno())) != self._stamp:
                    raise damaged(self.path, "the file changed after it was opened", "open it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._map


class TensorFolder:
    """The tensors of a model whose weights lie in one file or in several shards, by name."""

    def __init__(self, files: list[SafetensorsFile]):
        self.files = files
        self.metadata = files[0].metadata
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, SafetensorsFile] = {}
        for file in files:
            for name, info in file.tensors.items():
                if name in self._file_of:
                    raise CheckpointError(
                        f"tensor {name!r} is in two shards: {self._file_of[name].path.name} and {file.path.name}",
                        where=str(file.path.parent),
                    )
                self.tensors[name] = info
                self._file_of[name] = file

    def tensor(self, name: str) -> torch.Tensor:
        """See `SafetensorsFile.tensor`."""
        if name not in self._file_of:
            raise CheckpointError(f"no tensor {name!r}", where=str(self.files[0].path.parent))
        return self._file_of[name].tensor(name)


def open_weights(path: str | Path) -> TensorFolder:
    """Open a `.safetensors` file, or a folder with `model.safetensors` or shards and `model.safetensors.index.json`.

    Raises:
        UsageError: nothing is there.
        CheckpointError: no safetensors in the folder (pickles are named and refused), or shards against their index.
        FileFormatError: a file or the index is damaged, or an index or link leads out of the folder.
    """
    path = Path(path)
    if not os.path.isdir(path):
        return TensorFolder([SafetensorsFile.open(path)])
    if os.path.lexists(path / SINGLE_NAME):
        return TensorFolder([SafetensorsFile.open(_inside(path, SINGLE_NAME))])
    if os.path.lexists(path / INDEX_NAME):
        return _open_shards(path)
    with disk_errors("read the folder", path):
        names = sorted(entry.name for entry in path.iterdir())
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    others = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    if pickles and not others:
        raise CheckpointError(f"only pickled weights here: {_some(pickles)}", where=str(path), remedy=PICKLE_REMEDY)
    remedy = f"it holds {_some(others)}: name the file itself" if others else "name a folder that holds a model"
    raise CheckpointError(f"no {SINGLE_NAME} and no {INDEX_NAME} in this folder", where=str(path), remedy=remedy)


def _open_shards(folder: Path) -> TensorFolder:
    index_path = _inside(folder, INDEX_NAME)
    weight_map = _read_index(index_path)
    shards: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        plain = Path(shard).name == shard and "\\" not in shard and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise damaged(index_path, f"the index names {shard!r}, which is not a plain file name")
        if not os.path.lexists(folder / shard):
            count = sum(1 for name in weight_map.values() if name == shard)
            raise CheckpointError(
                f"shard {shard} is missing; the index says that it holds {count} of {len(weight_map)} tensors",
                where=str(folder),
                remedy="fetch the missing file",
            )
        shards[shard] = SafetensorsFile.open(_inside(folder, shard))
    missing = [name for name, shard in weight_map.items() if name not in shards[shard].tensors]
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are not in the shard that the index names: {_some(missing)}",
            where=str(index_path),
            remedy="the index belongs to other shards: fetch the folder again",
        )
    return TensorFolder(list(shards.values()))


def _read_index(path: Path) -> dict[str, str]:
    with disk_errors(f"read {path.name}", path):
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise damaged(path, f"the index is larger than {MAX_HEADER_BYTES:,} bytes")
        raw = path.read_bytes()
    weight_map = parse_json(raw, path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(path, "the index has no weight_map from tensor names to file names")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise damaged(path, "the index's weight_map must map names to file names")
    return weight_map


def _inside(folder: Path, name: str) -> Path:
    """`folder/name`, unless it is a link out of the folder; a hub cache's own link to its `blobs` is followed."""
    real_folder, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    allowed = [real_folder]
    for parent in real_folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            allowed.append(parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        raise damaged(
            folder / name,
            f"{name} is a link that leads out of its folder, to {target}",
            "copy the file into the folder, or name the file it points to",
        )
    return folder / name


# --- writing ------------------------------------------------------------------------------------------------------


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[Path]:
    """Write `tensors` to `path`; if they are larger than `max_shard_bytes`, to shards beside it with an index.

    All or nothing: files appear under their names only when every byte is on the disk. A single file replaces one of
    the same name; shards never overwrite anything, since several files cannot be replaced in one step. Any strides and
    any device are accepted. Returns the files written, the index last.

    Raises:
        CheckpointError: one tensor under two names (tied: the caller knows which name its format keeps), a tensor
            without data, or an element type that the format lacks.
        StoreError: no space, no permission, or shards that are already there.
    """
    path = Path(path)
    _refuse_unwritable(tensors)
    metadata = {"format": "pt", **(metadata or {})}  # transformers refuses files without a "format"
    shards = list(_split(tensors, max_shard_bytes))
    if len(shards) == 1:
        return _publish({path: _file_chunks(shards[0], metadata)})

    stem = path.name.removesuffix(".safetensors")
    names = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    index_path = path.with_name(f"{stem}.safetensors.index.json")
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    contents: dict[Path, Iterable[bytes | memoryview]] = {
        path.with_name(name): _file_chunks(shard, metadata) for name, shard in zip(names, shards, strict=True)
    }
    contents[index_path] = [json.dumps(index, indent=2, ensure_ascii=False).encode()]
    taken = [file.name for file in (path, *contents) if file.exists()]
    if taken:
        raise StoreError(f"already there: {_some(taken)}", where=str(path.parent), remedy="choose an empty folder")
    return _publish(contents)


def _publish(contents: Mapping[Path, Iterable[bytes | memoryview]]) -> list[Path]:
    """Write each file under a temporary name beside its own, then rename them all; on a fault, leave nothing."""
    token = secrets.token_hex(4)
    parts = {file: file.with_name(f".{file.name}.{token}.part") for file in contents}
    folder = next(iter(contents)).parent
    undo = list(parts.values())
    try:
        with disk_errors("write the weights", folder):
            for file, chunks in contents.items():
                write_synced(parts[file], chunks)
            for file, part in parts.items():
                os.replace(part, file)
                if len(contents) > 1:  # one shard is of no use without the others
                    undo.append(file)
            sync_folder(folder)
    except BaseException:
        for leftover in undo:
            with contextlib.suppress(OSError):
                leftover.unlink()
        raise
    return list(contents)


def _refuse_unwritable(tensors: Mapping[str, torch.Tensor]) -> None:
    import torch

    names = _dtype_names()
    seen: dict[tuple[int, ...], str] = {}
    for name, tensor in tensors.items():
        if name == "__metadata__" or not name.isprintable():
            raise CheckpointError(f"{name!r} cannot be a tensor's name")
        if tensor.dtype not in names:
            raise CheckpointError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise CheckpointError(f"tensor {name!r} has no dense data to write: {tensor.layout} on {tensor.device}")
        if tensor.numel() == 0:
            continue
        # Views of different parts of one storage (q, k and v, split) are tensors in their own right.
        part = (tensor.untyped_storage().data_ptr(), int(tensor.storage_offset()), tensor.numel())
        twin = seen.setdefault(part, name)
        if twin != name:
            raise CheckpointError(
                f"{twin!r} and {name!r} are one tensor under two names",
                remedy="leave one out and tie them again after loading, or clone one",
            )


def _split(tensors: Mapping[str, torch.Tensor], limit: int) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _file_chunks(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    import torch

    # Widest elements first, so that every tensor is aligned to its own element size; then by name.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    names = _dtype_names()
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        flat = tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _stamp(stat: os.stat_result) -> tuple[int, ...]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dtype_names() -> dict[torch.dtype, str]:
    import torch

    return {getattr(torch, theirs): ours for ours, (_, theirs) in DTYPES.items() if theirs is not None}
