"""What the teacher thinks of the data, computed once and kept on disk, so that no teacher is in memory in training.

Of each trained position the k likeliest tokens: ids and log-probabilities, and the mass of all others. For 64 of them
that is 260 bytes a token. Sequences are found by their content, as the order of the data changes from epoch to epoch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from craton.checkpoints.disk import disk_errors, replace_file, sync_folder
from craton.compression.distill_objective import TopK, captured
from craton.data.batch import Batch
from craton.data.example import UNTRAINED
from craton.errors import TrainingError
from craton.models import CausalLM
from craton.training.cross_entropy import chunk_rows

INDEX_NAME: Final = "index.json"
KEY_BYTES: Final = 16


class LiveTeacher:
    """A teacher in memory, which can be asked about any batch and shows its hidden states."""

    def __init__(
        self, model: CausalLM, *, top_k: int, temperature: float, dtype: torch.dtype, vocab: int | None = None
    ) -> None:
        """vocab: tokens that the student knows, where the teacher's matrix has spare rows behind them."""
        self.model = model.requires_grad_(False).eval()
        self.model.compute_dtype = dtype
        self.layers = len(model.trunk.layers)
        self.vocab = vocab or model.config.vocab
        self.top_k, self.temperature = min(top_k, self.vocab), temperature

    @torch.no_grad()
    def __call__(self, batch: Batch) -> TopK:
        hidden_TD = self.model.hidden(batch.ids_T, batch.positions_T, batch.segments_T, row=batch.row)
        return self._top(hidden_TD[batch.targets_T != UNTRAINED])

    @torch.no_grad()
    def with_hidden(self, batch: Batch, layers: Sequence[int]) -> tuple[TopK, list[Tensor]]:
        """Its opinion, and the outputs of these layers at the trained positions [N, width]."""
        trained_T = batch.targets_T != UNTRAINED
        # A layer may be wanted twice, where the student has more of them.
        wanted = sorted(set(layers))
        with captured(self.model, wanted) as outputs:
            hidden_TD = self.model.hidden(batch.ids_T, batch.positions_T, batch.segments_T, row=batch.row)
        states = {layer: output[trained_T] for layer, output in zip(wanted, outputs, strict=True)}
        return self._top(hidden_TD[trained_T]), [states[layer] for layer in layers]

    def _top(self, hidden_ND: Tensor) -> TopK:
        parts = [self._top_of(chunk) for chunk in hidden_ND.split(chunk_rows(self.model.config.vocab, torch.float32))]
        ids, log_p, rest = zip(*parts, strict=True)
        return TopK(torch.cat(ids), torch.cat(log_p), torch.cat(rest))

    def _top_of(self, hidden_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_CV = self.model.logits(hidden_CD)[:, : self.vocab].float() / self.temperature
        top_CK, ids_CK = logits_CV.topk(self.top_k, -1)
        masses_CV = logits_CV.sub_(top_CK[:, :1]).exp_()
        sum_C1 = masses_CV.sum(-1, keepdim=True)
        # The others are summed by themselves: 1 - the known ones would lose them in their rounding.
        rest_C = masses_CV.scatter_(-1, ids_CK, 0.0).sum(-1) / sum_C1[:, 0]
        return ids_CK, top_CK - top_CK[:, :1] - sum_C1.log(), rest_C


class TeacherTable:
    """A table that `build` wrote, mapped. Call it with a batch."""

    def __init__(self, folder: Path) -> None:
        with disk_errors("read the teacher's table", folder):
            facts: dict[str, Any] = json.loads((folder / INDEX_NAME).read_bytes())
            keys, firsts = np.load(folder / "keys.npy"), np.load(folder / "firsts.npy")
            self._ids_NK: npt.NDArray[Any] = np.load(folder / "ids.npy", mmap_mode="r")
            self._log_p_NK: npt.NDArray[np.float16] = np.load(folder / "log_p.npy", mmap_mode="r")
            self._rest_N: npt.NDArray[np.float32] = np.load(folder / "rest.npy", mmap_mode="r")
        self.positions, self.top_k = int(facts["positions"]), int(facts["top_k"])
        self._first = {key.tobytes(): int(first) for key, first in zip(keys, firsts, strict=True)}
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    def __call__(self, batch: Batch) -> TopK:
        """The teacher's opinion of a batch. Raises TrainingError for a sequence that the teacher has not read."""
        rows: list[npt.NDArray[np.int64]] = []
        for key, count in _sequences(batch):
            first = self._first.get(key, 0 if count == 0 else None)
            if first is None:
                raise TrainingError("the teacher has not read a sequence of this batch", remedy="start a new run")
            rows.append(np.arange(first, first + count))
        at_N = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        device = batch.ids_T.device
        log_p_NK = torch.from_numpy(self._log_p_NK[at_N].astype(np.float32)).to(device)
        rest_N = torch.from_numpy(self._rest_N[at_N]).to(device)
        # In half precision the masses of a position no longer add up to 1 exactly: what is left is shared out.
        if len(at_N):
            log_p_NK += ((1 - rest_N).log() - log_p_NK.logsumexp(-1))[:, None]
        ids_NK = torch.from_numpy(self._ids_NK[at_N].astype(np.int64)).to(device)
        return TopK(ids_NK, log_p_NK, rest_N)


def build_table(
    folder: Path,
    teacher: LiveTeacher,
    batches: Iterable[Batch],
    device: torch.device,
    on_progress: Callable[[int], None] = lambda positions: None,
) -> TeacherTable:
    """Let the teacher read `batches` and write what it thinks into `folder`, which appears whole or not at all.

    Raises StoreError where the disk refuses.
    """
    part = folder.with_name(f".{folder.name}.part")
    with disk_errors("write the teacher's table", folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        _write(part, teacher, batches, device, on_progress)
        with disk_errors("write the teacher's table", folder):
            os.rename(part, folder)
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return TeacherTable(folder)


def _write(
    folder: Path,
    teacher: LiveTeacher,
    batches: Iterable[Batch],
    device: torch.device,
    on_progress: Callable[[int], None],
) -> None:
    keys: list[bytes] = []
    firsts: list[int] = []
    seen: set[bytes] = set()
    positions = 0
    ids_dtype = np.uint16 if teacher.vocab <= 2**16 else np.int32
    kinds = {"ids": (ids_dtype, teacher.top_k), "log_p": (np.float16, teacher.top_k), "rest": (np.float32, None)}
    with disk_errors("write the teacher's table", folder):
        files = {name: (folder / f"{name}.raw").open("wb") for name in kinds}
        try:
            for batch in batches:
                if all(key in seen for key, count in _sequences(batch) if count):
                    continue
                top = teacher(batch.to(device))
                values = {"ids": top.ids_NK, "log_p": top.log_p_NK, "rest": top.rest_N}
                begin = 0
                for key, count in _sequences(batch):
                    end = begin + count
                    if key not in seen and count:
                        seen.add(key)
                        keys.append(key)
                        firsts.append(positions)
                        positions += count
                        for name, (dtype, _) in kinds.items():
                            files[name].write(values[name][begin:end].cpu().numpy().astype(dtype).tobytes())
                    begin = end
                on_progress(positions)
        finally:
            for file in files.values():
                file.close()
        for name, (dtype, columns) in kinds.items():
            shape = (positions,) if columns is None else (positions, columns)
            _as_array(folder, name, dtype, shape)
        np.save(folder / "keys.npy", np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES))
        np.save(folder / "firsts.npy", np.array(firsts, np.int64))
    facts = {"positions": positions, "top_k": teacher.top_k, "temperature": teacher.temperature}
    replace_file(folder / INDEX_NAME, json.dumps(facts).encode())


def _as_array(folder: Path, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Put numpy's header before raw numbers, whose count is only known when all are written."""
    raw = folder / f"{name}.raw"
    with (folder / f"{name}.npy").open("wb") as target, raw.open("rb") as source:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(target, header)
        shutil.copyfileobj(source, target)
        target.flush()
        os.fsync(target.fileno())
    raw.unlink()


def _sequences(batch: Batch) -> Iterator[tuple[bytes, int]]:
    """(a digest of its tokens and of where it is trained, its trained positions) of each sequence."""
    ids_T, targets_T = batch.ids_T.cpu().numpy().astype(np.int32), batch.targets_T.cpu().numpy().astype(np.int32)
    begin = 0
    for length in batch.lengths:
        ids, trained = ids_T[begin : begin + length], targets_T[begin : begin + length] != UNTRAINED
        state = hashlib.blake2b(ids.tobytes(), digest_size=KEY_BYTES)
        state.update(trained.tobytes())
        yield state.digest(), int(trained.sum())
        begin += length
