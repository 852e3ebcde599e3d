"""`craton prune`, single weights: zeros in the matrices of a model's blocks, chosen a block at a time (see `walk`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from craton.checkpoints.save import save_checkpoint
from craton.checkpoints.weights import QuantizedLinear
from craton.compression.awq import relative_output_error
from craton.compression.blocks import Inputs, Source, plain_linear, weight_of
from craton.compression.job import Job, Outcome, Watch, begin, copy_beside, known_as, reopen, weight_bytes
from craton.compression.layers import choose_layers
from craton.compression.quantize_settings import PruneMethod, PruneSettings
from craton.compression.sparsity import Pattern, parse_pattern, prune_magnitude, prune_sparsegpt, prune_wanda
from craton.compression.walk import Changes, Work, all_changes, hold
from craton.config import parse
from craton.errors import UsageError
from craton.store.runs import Run
from craton.trunk import replace_linears
from craton.trunk.block import Block

KIND: Final = "prune"
METHODS: Final[Mapping[str, Callable[[Tensor, Pattern, Inputs | None], Tensor]]] = {
    "magnitude": prune_magnitude,
    "wanda": prune_wanda,
    "sparsegpt": prune_sparsegpt,
}


def prune(
    model: str, settings: PruneSettings, provenance: Mapping[str, str], name: str, watch: Watch | None = None
) -> Outcome:
    """Set a share of the weights of a model (a name or a path) to 0 and publish it as `name`, a plain checkpoint.

    Raises UsageError for a sparsity that does not fit the matrices, DataError for too little to calibrate with,
    CheckpointError for an adapter.
    """
    pattern = parse_pattern(settings.sparsity)
    watch = watch or Watch()
    job = begin(
        KIND, model, settings, provenance, name, "pruned_from", lambda source: _check(source, settings, pattern), watch
    )
    return _at_work(job, settings)


def resume(run: Run, watch: Watch | None = None) -> Outcome:
    """Go on with an interrupted run, behind its last whole block."""
    settings = parse(PruneSettings, run.config()["settings"], where=str(run.folder))
    return _at_work(reopen(run, watch or Watch()), settings)


def _check(source: Source, settings: PruneSettings, pattern: Pattern) -> list[str]:
    chosen = choose_layers(source, settings.keep)
    odd = [one for one in chosen.matrices if pattern.of and one.shape[1] % pattern.of]
    if odd:
        raise UsageError(
            f"rows of {odd[0].shape[1]} weights are not whole groups of {pattern.of}",
            where=odd[0].published,
            remedy=f"leave it as it is: --keep {odd[0].published.rpartition('.')[2]}",
        )
    weights = sum(one.size for one in chosen.matrices if one.name != "head")
    said = [f"{pattern.share:.0%} of {weights / 1e6:.4g}M weights in the blocks become 0"]
    if source.kinds:
        said.append(
            f"the weights are quantised ({'/'.join(source.kinds)}): the result is plain numbers ({source.dtype})"
        )
    return said


def block_work(source: Source, method: PruneMethod, pattern: Pattern, published: Mapping[str, str]) -> Work:
    """What `walk` does to each block. published: of the matrices to prune, by name, their names for people."""
    solve = METHODS[method]

    def work(name: str, block: Block, inputs: dict[str, Inputs]) -> Changes:
        changes = Changes()
        for full in published:
            if not full.startswith(f"{name}."):
                continue
            local = full.removeprefix(f"{name}.")
            weight_OI, read = weight_of(block, local), inputs.get(local)
            made_OI = solve(weight_OI, pattern, read).to(source.dtype)
            changes.plain[f"{full}.weight"] = made_OI
            error_OI = weight_OI - made_OI.float()
            error = None
            if read is not None and method == "sparsegpt":  # which alone needs all second moments
                error = relative_output_error(error_OI, weight_OI, read)
            row = {
                "matrix": published[full],
                "weights": made_OI.numel(),
                "zeros": int((made_OI == 0).sum()),
                "tokens": read.tokens if read is not None else None,
            }
            lost = float(error_OI.norm() / weight_OI.norm().clamp(min=1e-30))
            changes.rows.append(row | {"weight_error": lost, "output_error": error})
        return changes

    return work


def _at_work(job: Job, settings: PruneSettings) -> Outcome:
    with job.run.lock():
        outcome = _Pruner(job, settings).carry_out()
        metrics = {"zeros": outcome.facts["zeros"], **outcome.measured.as_dict()}
        job.run.finish("done", {"model": outcome.model, "metrics": metrics})
        job.clear()
        return outcome


class _Pruner:
    def __init__(self, job: Job, settings: PruneSettings) -> None:
        self.job, self.settings, self.source = job, settings, job.source
        self.pattern = parse_pattern(settings.sparsity)
        self.names = {
            one.name: one.published for one in choose_layers(job.source, settings.keep).matrices if one.name != "head"
        }

    def carry_out(self) -> Outcome:
        started = time.perf_counter()
        job = self.job
        before_bytes = weight_bytes(job.base.path)
        job.before()
        job.walk(
            block_work(self.source, self.settings.method, self.pattern, self.names),
            calibrated=self.settings.method != "magnitude",
            gram=self.settings.method == "sparsegpt",
        )
        rows: list[dict[str, Any]] = []
        changes = list(all_changes(job.blocks_folder, self.source.blocks))
        expected = job.material.expected(self.source.model, job.passed)
        self._unpack()
        for one in changes:
            hold(self.source.model, one.plain)
            rows += one.rows
        made, measured, difference, after_bytes = job.publish(self._write, expected, "pruned_from")
        weights = sum(row["weights"] for row in rows)
        zeros = sum(row["zeros"] for row in rows) / weights
        return Outcome(
            model=made.id,
            run=job.run.id,
            base=known_as(job.base),
            measured=measured,
            bytes_before=before_bytes,
            bytes_after=after_bytes,
            bits=8.0 * self.source.dtype.itemsize,
            seconds=time.perf_counter() - started,
            difference=difference,
            calibration=dict(job.material.facts),
            rows=tuple(rows),
            notes=(
                "zeros are stored as numbers: the file is no smaller, and these kernels are no faster for them",
                *self._notes(rows),
            ),
            facts={"zeros": zeros, "pattern": self.settings.sparsity},
        )

    def _notes(self, rows: list[dict[str, Any]]) -> list[str]:
        unread = sum(row["tokens"] is None for row in rows) if self.settings.method != "magnitude" else 0
        if not unread:
            return []
        return [f"{unread} matrices read nothing of what calibrates: their smallest weights went"]

    def _unpack(self) -> None:
        """Make plain numbers of what is still packed: matrices that are kept, and places of those that were pruned."""

        def make(name: str, module: nn.Module) -> nn.Module:
            assert isinstance(module, QuantizedLinear)
            if name in self.names:
                return plain_linear(torch.empty(module.quantized.shape, device="meta"), module.bias)
            return plain_linear(module.quantized.dequantize(self.source.dtype), module.bias)

        replace_linears(self.source.model, lambda _, module: isinstance(module, QuantizedLinear), make)

    def _write(self, folder: Path) -> Path:
        checkpoint = self.source.checkpoint
        written = save_checkpoint(
            self.source.model,
            checkpoint.family,
            folder,
            tokenizer=self.source.tokenizer,
            pooling=checkpoint.pooling,
        )
        copy_beside(self.source, written)
        return written
