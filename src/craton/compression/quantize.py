"""`craton quantize`: a model's matrices as integers of few bits, read again and compared before it counts.

A block at a time (see `walk`): what the layers of a block read, once the blocks before it are quantised, tells what its
rounding may cost. Everything is kept in the run, so an interrupted one goes on behind the last whole block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from craton.checkpoints.compressed_tensors import save_quantized
from craton.checkpoints.disk import replace_file
from craton.checkpoints.gguf_architectures import ARCHITECTURES
from craton.checkpoints.gguf_export import GGUFKind, save_gguf
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.weights import QuantizedLinear
from craton.compression.allocation import allocate, measure_shifts
from craton.compression.awq import fold_scales, quantize_awq, relative_output_error
from craton.compression.blocks import HEAD, Inputs, Source, Stream, plain_linear, weight_of
from craton.compression.gptq import quantize_gptq
from craton.compression.grids import Form
from craton.compression.hqq import quantize_hqq
from craton.compression.job import SAME, Job, Outcome, Watch, begin, copy_beside, known_as, reopen, weight_bytes
from craton.compression.layers import Chosen, check_groups, choose_layers
from craton.compression.quantize_settings import Method, QuantizeSettings, parse_bytes
from craton.compression.rtn import quantize_rtn
from craton.compression.tuning import tune_block
from craton.compression.walk import Changes, Refine, Work, all_changes, block_path, hold, round_inputs
from craton.config import parse
from craton.errors import CheckpointError, UsageError
from craton.modalities.text import gguf_metadata_from_tokenizer
from craton.models import (
    AnyModel,
    CausalLM,
    Classifier,
    DualEncoder,
    Encoder,
    ImageChat,
    ImageClassifier,
    Seq2Seq,
    VisionTransformer,
)
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run
from craton.trunk import replace_linears
from craton.trunk.block import Block

KIND: Final = "quantize"
ROUNDED: Final = 0.02  # as `SAME`, where numbers are rounded on the way through the file
METHODS: Final[Mapping[str, Callable[[Tensor, Form, Inputs | None], IntWeight]]] = {
    "rtn": quantize_rtn,
    "gptq": quantize_gptq,
    "awq": quantize_awq,
    "hqq": quantize_hqq,
}


def quantize(
    model: str,
    settings: QuantizeSettings,
    provenance: Mapping[str, str],
    name: str,
    watch: Watch | None = None,
) -> Outcome:
    """Quantise a model (a name or a path) and publish it as `name`.

    Raises UsageError for what cannot be done (groups that do not fit, a size below the smallest), DataError for too
    little to calibrate with, CheckpointError for an adapter, for a layout that cannot hold the model, and where what
    was written does not do what was made; then nothing is published.
    """
    _check_format(settings)
    watch = watch or Watch()
    job = begin(
        KIND, model, settings, provenance, name, "quantised_from", lambda source: _check(source, settings), watch
    )
    return _at_work(job, settings)


def resume(run: Run, watch: Watch | None = None) -> Outcome:
    """Go on with an interrupted run, behind its last whole block."""
    settings = parse(QuantizeSettings, run.config()["settings"], where=str(run.folder))
    return _at_work(reopen(run, watch or Watch()), settings)


def block_work(source: Source, method: Method, forms: Mapping[str, Form], published: Mapping[str, str]) -> Work:
    """What `walk` does to each block. forms: of the matrices to quantise, by name; published: their names in files."""
    solve, dtype = METHODS[method], source.dtype

    def work(name: str, block: Block, inputs: dict[str, Inputs]) -> Changes:
        inside = {full.removeprefix(f"{name}."): form for full, form in forms.items() if full.startswith(f"{name}.")}
        changes = Changes()
        if method == "awq":
            folded = fold_scales(block, inputs, inside.get, dtype)
            changes.plain = {f"{name}.{local}": tensor.to(dtype) for local, tensor in folded.items()}
        for local, form in inside.items():
            full, weight_OI = f"{name}.{local}", weight_of(block, local)
            changes.quantized[full] = made = solve(weight_OI, form, inputs.get(local))
            changes.rows.append(_row(published[full], weight_OI, made, inputs.get(local)))
        return changes

    return work


def block_tuning(steps: int, published: Mapping[str, str]) -> Refine | None:
    """What `walk` does to a rounded block: so many steps of training (see `tuning`)."""
    if steps == 0:
        return None

    def refine(
        name: str,
        number: int,
        block: Block,
        changes: Changes,
        inputs: dict[str, Inputs],
        read: Stream,
        wanted: Stream,
    ) -> None:
        start = {full.removeprefix(f"{name}."): weight for full, weight in changes.quantized.items()}
        changes.rows.clear()
        for local, made in tune_block(block, number, start, read, wanted, steps).items():
            full = f"{name}.{local}"
            changes.quantized[full] = made
            changes.rows.append(_row(published[full], weight_of(block, local), made, inputs.get(local)))

    return refine


def _row(published: str, weight_OI: Tensor, made: IntWeight, inputs: Inputs | None) -> dict[str, Any]:
    """The fact sheet of a matrix. Errors are relative: of the weights, and of the outputs on what was read."""
    error_OI = weight_OI - made.dequantize()
    return {
        "matrix": published,
        "bits": made.bits,
        "stored_bits": made.stored_bits,
        "weights": made.codes_OI.numel(),
        "weight_error": float(error_OI.norm() / weight_OI.norm().clamp(min=1e-30)),
        "output_error": relative_output_error(error_OI, weight_OI, inputs) if inputs is not None else None,
        "tokens": inputs.tokens if inputs is not None else None,
    }


def _check_format(settings: QuantizeSettings) -> None:
    """Refuse what a GGUF file cannot say."""
    if settings.format != "gguf":
        return
    what = None
    if settings.act is not None:
        what = "a GGUF file cannot ask for int8 activations"
    elif settings.size is None and settings.bits < 4:
        what = f"GGUF's plain blocks have 4 or 8 bits: {settings.bits} would take the room of 4"
    elif settings.zeros and (settings.bits == 8 or settings.size is not None):
        what = "GGUF's blocks of 8 bits have no zeros"
    if what is not None:
        raise UsageError(what, where="--format gguf", remedy="choose --format safetensors, or --bits 4")


def _check_text_only(source: Source, settings: QuantizeSettings) -> None:
    """Refuse what is known of models that read text alone, for all others."""
    if isinstance(source.model, CausalLM | Encoder | Classifier):
        return
    asked = {
        "--tune": settings.tune > 0,
        "--size": settings.size is not None,
        "--format gguf": settings.format == "gguf",
    }
    for flag, is_asked in asked.items():
        if is_asked:
            raise UsageError(
                f"{flag} is for models of text, and this is a {type(source.model).__name__}",
                where=flag,
                remedy="leave it out: --bits and --method do for all of them",
            )


def _check(source: Source, settings: QuantizeSettings) -> list[str]:
    _check_text_only(source, settings)
    if settings.format == "gguf":
        _check_architecture(source)
        gguf_metadata_from_tokenizer(source.checkpoint.tokenizer())  # refuses one that the file cannot describe
    chosen = choose_layers(source, settings.keep)
    check_groups(chosen.matrices, settings.group)
    if settings.format == "safetensors":
        turned = {
            number: entry
            for number, entry in enumerate(source.checkpoint.family.entries(source.checkpoint.config))
            if not entry.by_rows
        }
        odd = [one for one in chosen.matrices if one.entry in turned]
        if odd:
            raise CheckpointError(
                f"{odd[0].published!r} lies with inputs and outputs exchanged in this family's files, which "
                "compressed-tensors cannot say",
                where=str(source.checkpoint.path),
                remedy="say --format gguf",
            )
    said = [
        f"{len(chosen.matrices)} matrices of {sum(one.size for one in chosen.matrices) / 1e6:.4g}M weights; "
        f"kept as they are: {_kept(source, chosen)}"
    ]
    if source.kinds:
        said.append(_again(source))
    if settings.method in ("rtn", "hqq") and settings.tune == 0 and settings.size is None:
        said.append(f"{settings.method} looks at no data; what is held out judges it")
    return said


def _check_architecture(source: Source) -> None:
    """Refuse what GGUF has no words for, such as a model that chats about pictures, before the work."""
    name = source.checkpoint.hf["architectures"][0]
    if not any(name in architecture.hf_architectures for architecture in ARCHITECTURES):
        raise CheckpointError(
            f"{name} cannot be written as GGUF",
            where=str(source.checkpoint.path),
            remedy="leave out --format gguf: safetensors holds it",
        )


def _again(source: Source) -> str:
    kinds = "/".join(source.kinds)
    return (
        f"the weights are quantised already ({kinds}): they are dequantised and rounded again, from one grid to another"
    )


def _kept(source: Source, chosen: Chosen) -> str:
    model = source.model
    if isinstance(model, VisionTransformer | ImageClassifier | DualEncoder):
        parts = ["embeddings of patches and texts" if isinstance(model, DualEncoder) else "the embedding of patches"]
        parts.append("what pools and projects" if not isinstance(model, ImageClassifier) else "the head")
    elif isinstance(model, CausalLM | Seq2Seq) and model.config.tied:
        parts = ["the embedding, which is the head as well"]
    else:
        parts = ["the embedding"]
    if isinstance(model, ImageChat):
        parts.append("what it sees with")
    if isinstance(model, Seq2Seq):
        parts.append("convolutions")
    parts += sorted({name if len(chosen.kept) <= 3 else name.rpartition(".")[2] for name in chosen.kept})
    return ", ".join([*parts, "norms and biases"])


def _at_work(job: Job, settings: QuantizeSettings) -> Outcome:
    with job.run.lock():
        outcome = _Quantizer(job, settings).carry_out()
        metrics = {"bits": outcome.bits, "bytes": outcome.bytes_after, **outcome.measured.as_dict()}
        job.run.finish("done", {"model": outcome.model, "metrics": metrics})
        job.clear()
        return outcome


class _Quantizer:
    def __init__(self, job: Job, settings: QuantizeSettings) -> None:
        self.job, self.settings, self.source = job, settings, job.source
        self.chosen = choose_layers(job.source, settings.keep)
        self.published = {one.name: one.published for one in self.chosen.matrices}
        self.calibrated = settings.method in ("gptq", "awq") or settings.tune > 0

    def carry_out(self) -> Outcome:
        started = time.perf_counter()
        job, settings = self.job, self.settings
        before_bytes = weight_bytes(job.base.path)
        job.before()
        self.forms = {name: self._form(bits) for name, bits in self._bits().items()}
        job.walk(
            block_work(self.source, settings.method, self.forms, self.published),
            calibrated=self.calibrated,
            gram=True,
            int8_inputs=settings.act is not None,
            refine=block_tuning(settings.tune, self.published),
        )
        if HEAD in self.forms:
            self._head()
        blocks = job.source.blocks + (HEAD in self.forms)
        changes = list(all_changes(job.blocks_folder, blocks))
        quantized = {name: weight for one in changes for name, weight in one.quantized.items()}
        rows = [row for one in changes for row in one.rows]
        expected = self._expected(quantized)
        for one in changes:
            hold(self.source.model, one.plain)
        self._empty(quantized)
        prepare = (lambda model: round_inputs(model, list(quantized))) if settings.act else _as_it_is
        made, measured, difference, after_bytes = job.publish(
            lambda folder: self._write(folder, quantized),
            expected,
            "quantised_from",
            prepare=prepare,
            tolerance=self._tolerance(quantized),
        )
        sizes = {name: weight.codes_OI.numel() for name, weight in quantized.items()}
        bits = sum(weight.stored_bits * sizes[name] for name, weight in quantized.items()) / sum(sizes.values())
        return Outcome(
            model=made.id,
            run=job.run.id,
            base=known_as(job.base),
            measured=measured,
            bytes_before=before_bytes,
            bytes_after=after_bytes,
            bits=bits,
            seconds=time.perf_counter() - started,
            difference=difference,
            calibration=dict(job.material.facts),
            rows=tuple(rows),
            notes=tuple(self._notes(rows)),
            facts={"matrices_of_bits": _counted(rows), "kept": list(self.chosen.kept)},
        )

    def _form(self, bits: int) -> Form:
        return Form(bits, self.settings.group, self.settings.symmetric(bits))

    def _bits(self) -> dict[str, int]:
        """Of each matrix: the same for all, or chosen under the budget."""
        if self.settings.size is None:
            return {one.name: self.settings.bits for one in self.chosen.matrices}
        kept = self.job.run.folder / "bits.json"
        if not kept.exists():
            forms = {bits: self._form(bits) for bits in (2, 3, 4, 8)}
            budget = parse_bytes(self.settings.size)
            places = {one.name: dict.fromkeys(forms, 0.0) for one in self.chosen.matrices}
            fixed = self._fixed_bytes()

            def choose(shifts: Mapping[str, Mapping[int, float]]) -> dict[str, int]:
                return allocate(
                    self.chosen.matrices,
                    shifts,
                    forms.__getitem__,
                    choices=(4, 8) if self.settings.format == "gguf" else (2, 3, 4, 8),
                    kind=self.settings.format,
                    budget=budget,
                    fixed=fixed,
                )

            choose(places)  # refuses an impossible budget before anything is measured
            shifts = measure_shifts(
                self.source,
                self.job.material.tensors["calibration"],
                self.chosen.matrices,
                forms,
                self.job.run.folder / "shifts.json",
                self.job.watch.on_progress,
            )
            replace_file(kept, json_bytes(choose(shifts)))
        return dict(read_object(kept))

    def _fixed_bytes(self) -> int:
        """Of what stays as it is."""
        names = {f"{one.name}.weight" for one in self.chosen.matrices}
        seen: dict[int, int] = {}
        for name, tensor in self.source.model.state_dict().items():
            if name not in names:
                seen[tensor.data_ptr()] = tensor.nbytes
        return sum(seen.values())

    def _head(self) -> None:
        """The untied head, by what it reads after the last block."""
        path = block_path(self.job.blocks_folder, self.source.blocks)
        if path.exists():
            return
        self.job.watch.on_progress("the head")
        model = self.source.model
        assert isinstance(model, CausalLM)
        weight_OI = model.head.weight.to(torch.float32)
        inputs, calibration = None, self.job.calibration.get(self.source.towers[0].name)
        with torch.no_grad():
            if calibration is not None:
                norm = model.trunk.final_norm
                inputs = Inputs(weight_OI.shape[1], gram=True)
                inputs.add(calibration.hidden_TD if norm is None else norm(calibration.hidden_TD))
            made = METHODS[self.settings.method](weight_OI, self.forms[HEAD], inputs)
            Changes({HEAD: made}, {}, [_row(self.published[HEAD], weight_OI, made, inputs)]).write(path)

    def _expected(self, quantized: Mapping[str, IntWeight]) -> list[Tensor]:
        """What the file must give: see `Material.expected`."""
        model = self.source.model
        if HEAD in quantized:
            assert isinstance(model, CausalLM)
            model.head = plain_linear(quantized[HEAD].dequantize(), model.head.bias)
            if self.settings.act:
                round_inputs(model, [HEAD])
        return self.job.material.expected(model, self.job.passed)

    def _empty(self, quantized: Mapping[str, IntWeight]) -> None:
        """Leave the places of the quantised weights empty, and make plain numbers of the other packed ones."""

        def make(name: str, module: nn.Module) -> nn.Module:
            assert isinstance(module, nn.Linear | QuantizedLinear)
            bias = module.bias
            if name in quantized:
                return plain_linear(torch.empty(quantized[name].shape, device="meta"), bias)
            assert isinstance(module, QuantizedLinear)
            return plain_linear(module.quantized.dequantize(self.source.dtype), bias)

        replace_linears(
            self.source.model, lambda name, module: name in quantized or isinstance(module, QuantizedLinear), make
        )

    def _write(self, folder: Path, quantized: Mapping[str, IntWeight]) -> Path:
        source, checkpoint = self.source, self.source.checkpoint
        if self.settings.format == "safetensors":
            written = save_quantized(
                source.model,
                checkpoint.family,
                folder,
                quantized,
                tokenizer=source.tokenizer,
                pooling=checkpoint.pooling,
                activations=self.settings.act,
            )
            copy_beside(source, written)
            return written
        kind: GGUFKind = "BF16" if source.dtype == torch.bfloat16 else "F16"
        return save_gguf(
            source.model,
            checkpoint.family,
            checkpoint.tokenizer(),
            folder / f"{self.job.run.name}.gguf",
            kind,
            pooling=checkpoint.pooling,
            quantized=quantized,
            ends="Q8_0",  # as such files have them: in a small model they are most of the bytes
        )

    def _tolerance(self, quantized: Mapping[str, IntWeight]) -> float:
        """For the outputs of what is read again: a reader holds zeros as minima in fp16 (see `int_blocks`), and a GGUF
        file has its embedding in 8 bits."""
        return (
            ROUNDED
            if self.settings.format == "gguf" or any(weight.zeros_OG is not None for weight in quantized.values())
            else SAME
        )

    def _notes(self, rows: list[dict[str, Any]]) -> list[str]:
        notes = [_again(self.source)] if self.source.kinds else []
        unread = sum(row["tokens"] is None for row in rows) if self.calibrated else 0
        if unread:
            why = "there were no captions" if isinstance(self.source.model, DualEncoder) else "experts"
            notes.append(f"{unread} matrices read no token of the text ({why}): they were rounded to nearest")
        if self.settings.size is not None:
            counts = ", ".join(f"{count} of {bits} bits" for bits, count in _counted(rows).items())
            notes.append(f"chosen under {self.settings.size}: {counts}")
        return notes


def _counted(rows: list[dict[str, Any]]) -> dict[str, int]:
    bits = sorted({row["bits"] for row in rows})
    return {str(b): sum(row["bits"] == b for row in rows) for b in bits}


def _as_it_is(model: AnyModel) -> None:
    """A reading program that does nothing to the model."""
