"""Bits for each matrix under a budget: what each costs in quality, measured, and the choice that costs least.

A matrix is rounded alone, to three bits, and the shift of the outputs on a few windows is measured: the divergence of
the next-token distributions, or of an encoder the turn of its vectors. For other bits this is scaled by the squared
error of the weights, as the shift is quadratic in a small error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.checkpoints.bit_packing import packed_words
from craton.checkpoints.disk import replace_file
from craton.compression.blocks import HEAD, Source, Stream, in_fp32
from craton.compression.grids import Form
from craton.compression.layers import Matrix
from craton.compression.rtn import quantize_rtn
from craton.errors import UsageError
from craton.models import CausalLM
from craton.store.run_files import json_bytes, read_object

PROBE_BITS: Final = 3
PROBE_WINDOWS, PROBE_TOKENS = 2, 128


@dataclass(frozen=True)
class Cost:
    """A matrix at so many bits: bytes in the file, and the shift of the outputs that is expected."""

    bits: int
    bytes: int
    shift: float


def file_bytes(shape: tuple[int, int], form: Form, kind: str) -> int:
    """Of a matrix in a file of this format."""
    rows, columns = shape
    groups = -(-columns // form.group)
    if kind == "gguf":
        block = 34 if form.bits == 8 else 18 if form.symmetric else 20
        return rows * (columns // 32) * block
    zeros = 0 if form.symmetric else 4 * packed_words(rows, form.bits) * groups
    return rows * packed_words(columns, form.bits) * 4 + 2 * rows * groups + zeros


def measure_shifts(
    source: Source,
    ids_NT: Tensor,
    matrices: Sequence[Matrix],
    forms: Mapping[int, Form],
    kept: Path,
    on_progress: Callable[[str], None],
) -> dict[str, dict[int, float]]:
    """By name and bits: the shift that rounding only this matrix brings. forms: by bits, `PROBE_BITS` among them.
    kept: a file of what was measured before."""
    found: dict[str, dict[str, float]] = read_object(kept) if kept.exists() else {}
    layers = source.backbone.trunk.layers
    stream = Stream(source.backbone, ids_NT[:PROBE_WINDOWS, :PROBE_TOKENS].contiguous())
    with torch.no_grad():
        reference = _outputs(source, stream, 0)
        for number, stored in enumerate(layers):
            name = source.towers[0].block_name(number)
            wanted = [one for one in matrices if one.name.startswith(f"{name}.")]
            block = in_fp32(stored)  # type: ignore[arg-type]
            before_TD = stream.hidden_TD.clone()
            for one in wanted:
                if one.name in found:
                    continue
                on_progress(f"measuring what each matrix can bear: block {number + 1} of {len(layers)}")
                linear = block.get_submodule(one.name.removeprefix(f"{name}."))
                assert isinstance(linear, nn.Linear)
                weight_OI = linear.weight.data
                linear.weight.data, errors = _rounded(weight_OI, forms)
                stream.advance(block, number)
                shift = _shift(source, reference, _outputs(source, stream, number + 1))
                stream.hidden_TD.copy_(before_TD)
                linear.weight.data = weight_OI
                found[one.name] = {str(bits): shift * error for bits, error in errors.items()}
            replace_file(kept, json_bytes(found))
            stream.advance(block, number)
        if any(one.name == HEAD for one in matrices) and HEAD not in found:
            assert isinstance(source.model, CausalLM)
            weight_OI = source.model.head.weight.float()
            rounded_OI, errors = _rounded(weight_OI, forms)
            norm = source.backbone.trunk.final_norm
            hidden_TD = stream.hidden_TD if norm is None else norm(stream.hidden_TD)
            shift = _shift(source, reference, F.linear(hidden_TD, rounded_OI).log_softmax(-1))
            found[HEAD] = {str(bits): shift * error for bits, error in errors.items()}
            replace_file(kept, json_bytes(found))
    return {name: {int(bits): shift for bits, shift in shifts.items()} for name, shifts in found.items()}


def allocate(
    matrices: Sequence[Matrix],
    shifts: Mapping[str, Mapping[int, float]],
    form_of: Callable[[int], Form],
    *,
    choices: Sequence[int],
    kind: str,
    budget: int,
    fixed: int,
) -> dict[str, int]:
    """Bits by name: from the fewest on, the step that saves most for its bytes is taken while there is room.

    fixed: bytes of all that is kept. Matrices that are one in the file get the same bits. Raises UsageError with the
    smallest possible size where the budget is below it.
    """
    units: dict[int, list[Matrix]] = {}
    for one in matrices:
        units.setdefault(one.entry, []).append(one)
    costs = {
        entry: [
            Cost(
                bits,
                sum(file_bytes(one.shape, form_of(bits), kind) for one in members),
                sum(shifts[one.name][bits] for one in members),
            )
            for bits in sorted(choices)
        ]
        for entry, members in units.items()
    }
    at = dict.fromkeys(costs, 0)
    room = budget - fixed - sum(options[0].bytes for options in costs.values())
    if room < 0:
        raise UsageError(
            f"{budget / 1e6:.4g} MB are too few: what is kept takes {fixed / 1e6:.4g} MB, and with {min(choices)} bits "
            f"for every matrix it is {(budget - room) / 1e6:.4g} MB",
            where="--size",
            remedy=f"ask for --size {-(-(budget - room) // 10**5) / 10:g}MB or more, or keep less",
        )
    while True:
        best: tuple[float, int, int] | None = None
        for entry, options in costs.items():
            now = options[at[entry]]
            for place in range(at[entry] + 1, len(options)):
                more = options[place].bytes - now.bytes
                gain = (now.shift - options[place].shift) / max(more, 1)
                if more <= room and gain > 0 and (best is None or gain > best[0]):
                    best = (gain, entry, place)
        if best is None:
            return {one.name: costs[entry][at[entry]].bits for entry, members in units.items() for one in members}
        _, entry, place = best
        room -= costs[entry][place].bytes - costs[entry][at[entry]].bytes
        at[entry] = place


def _rounded(weight_OI: Tensor, forms: Mapping[int, Form]) -> tuple[Tensor, dict[int, float]]:
    """The matrix at `PROBE_BITS`, and by bits its squared error as a multiple of the error there."""
    by_bits = {bits: quantize_rtn(weight_OI, form).dequantize() for bits, form in forms.items()}
    errors = {bits: float((weight_OI - rounded_OI).square().sum()) for bits, rounded_OI in by_bits.items()}
    return by_bits[PROBE_BITS], {bits: error / max(errors[PROBE_BITS], 1e-30) for bits, error in errors.items()}


def _outputs(source: Source, stream: Stream, first: int) -> Tensor:
    """What the model makes of hidden states before its block `first`: log-probabilities, or unit vectors."""
    rest = stream.copy()
    layers = source.backbone.trunk.layers
    for number in range(first, len(layers)):
        rest.advance(layers[number], number)  # type: ignore[arg-type]
    norm = source.backbone.trunk.final_norm
    hidden_TD = rest.hidden_TD if norm is None else norm(rest.hidden_TD)
    if isinstance(source.model, CausalLM):
        return source.model.logits(hidden_TD).float().log_softmax(-1)
    return F.normalize(hidden_TD.view(rest.count, rest.window, -1).mean(1), dim=-1)


def _shift(source: Source, before: Tensor, after: Tensor) -> float:
    """The mean KL divergence of log-probabilities; of vectors, 1 - cosine."""
    if isinstance(source.model, CausalLM):
        return max(0.0, float((before.exp() * (before - after)).sum(-1).mean()))
    return max(0.0, float(1 - (before * after).sum(-1).mean()))
