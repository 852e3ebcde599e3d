"""The ladder of `craton shrink`: which smaller models are tried, and how each is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf_architectures import ARCHITECTURES
from craton.compression.calibration import Calibration, read_calibration
from craton.compression.distill import distill
from craton.compression.distill_settings import DistillSettings
from craton.compression.job import Watch, known_as
from craton.compression.pareto import BASE
from craton.compression.quantize import quantize
from craton.compression.quantize_settings import QuantizeSettings
from craton.compression.shrink_settings import ShrinkSettings
from craton.compression.structured import prune_structured
from craton.compression.structured_settings import StructuredSettings
from craton.errors import CheckpointError, DataError, UsageError
from craton.modalities.text import Tokenizer, gguf_metadata_from_tokenizer
from craton.models import CausalLMConfig
from craton.store import find
from craton.store.models import StoredModel
from craton.store.publishing import remove

WINDOW: Final = 256
# Windows to calibrate with and to recover on: as many as the text has, of these numbers.
TEXT_WINDOWS: Final = (2048, 1024, 512, 256, 128)
SAMPLES: Final = 64
FEWEST_LAYERS: Final = 8  # a model with fewer loses none


@dataclass(frozen=True)
class RungPlan:
    """A model to make from the one called `of`: with `removed` layers less, distilled from the base; or of `bits`."""

    label: str
    of: str
    removed: int = 0
    bits: Literal[3, 4, 8] | None = None
    method: Literal["rtn", "awq"] = "awq"


@dataclass(frozen=True)
class Ladder:
    """rungs: in the order in which they are made. held_out: text to judge by; text: the rest, to calibrate with and to
    recover on."""

    base: StoredModel
    rungs: tuple[RungPlan, ...]
    held_out: str
    text: str
    gguf: bool


def plan_ladder(base: StoredModel, settings: ShrinkSettings) -> Ladder:
    """The ladder for a model. Raises UsageError for one that writes no text, DataError for too little text."""
    checkpoint = Checkpoint.open(base.path)
    if not isinstance(checkpoint.config, CausalLMConfig):
        raise UsageError(f"{base.id} writes no text, and a task is answered in text", remedy="use craton quantize")
    layers = len(checkpoint.config.trunk.layers)
    rungs = [
        RungPlan("8 bits", BASE, bits=8, method="rtn"),
        RungPlan("4 bits, nearest", BASE, bits=4, method="rtn"),
        RungPlan("4 bits", BASE, bits=4),
        RungPlan("3 bits", BASE, bits=3),
    ]
    if settings.minutes and layers >= FEWEST_LAYERS:
        for share in (8, 4):
            removed = max(1, round(layers / share))
            label = f"{layers - removed} of {layers} layers"
            rungs += [RungPlan(label, BASE, removed=removed), RungPlan(f"{label}, 4 bits", label, bits=4)]
    tokenizer = checkpoint.tokenizer()
    calibration = _calibration(tokenizer, settings)
    return Ladder(
        base,
        tuple(rungs),
        _text(tokenizer, calibration.heldout_MT),
        _text(tokenizer, calibration.ids_NT),
        _has_gguf(checkpoint, tokenizer),
    )


def make_rung(
    plan: RungPlan,
    ladder: Ladder,
    made: Mapping[str, StoredModel],
    settings: ShrinkSettings,
    text: Path,
    on_progress: Callable[[str], None],
) -> StoredModel:
    """Make one rung from those already made and publish it under a name of its own. text: the file of the ladder's."""
    name = f"{settings.name}-{'-'.join(plan.label.replace(',', '').split())}"
    source = known_as(made[plan.of])
    if plan.bits is not None:
        chosen = QuantizeSettings(
            bits=plan.bits,
            method=plan.method,
            format="gguf" if ladder.gguf and plan.bits >= 4 else "safetensors",
            calibration=(str(text),),
            samples=SAMPLES,
            window=WINDOW,
            seed=settings.seed,
        )
        return find(quantize(source, chosen, {}, name, Watch(on_progress=on_progress)).model)
    cut = prune_structured(
        source,
        StructuredSettings(layers=plan.removed),
        name=f"{name}-cut",
        sources=(str(text),),
        measure_speed=False,
        on_progress=on_progress,
    )
    on_progress(f"distilling for {settings.minutes:g} minutes")
    recovered = distill(
        known_as(ladder.base), cut.model, [str(text)], DistillSettings(minutes=settings.minutes, name=name), {}
    )
    assert recovered is not None
    assert recovered.model is not None
    remove(cut.model)  # the distilled one says what it was made from
    return recovered.model


def _has_gguf(checkpoint: Checkpoint, tokenizer: Tokenizer) -> bool:
    """Whether GGUF has words for the model: there its embedding has few bits, too."""
    known = {name for architecture in ARCHITECTURES for name in architecture.hf_architectures}
    with contextlib.suppress(CheckpointError):
        gguf_metadata_from_tokenizer(tokenizer)
        return checkpoint.hf["architectures"][0] in known
    return False


def _calibration(tokenizer: Tokenizer, settings: ShrinkSettings) -> Calibration:
    *more, fewest = TEXT_WINDOWS
    for windows in more:
        with contextlib.suppress(DataError):
            return read_calibration(tokenizer, settings.text, window=WINDOW, samples=windows, seed=settings.seed)
    return read_calibration(tokenizer, settings.text, window=WINDOW, samples=fewest, seed=settings.seed)


def _text(tokenizer: Tokenizer, ids_NT: Tensor) -> str:
    return "\n\n".join(tokenizer.decode(ids_T.tolist(), skip_special_tokens=True) for ids_T in ids_NT)
