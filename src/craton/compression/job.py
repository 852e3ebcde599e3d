"""What quantising and pruning share around the walk: the run, the text, the figures before, the file, and the proof
that it is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.compression.blocks import Source, Stream, backbone, open_source
from craton.compression.calibration import HELD_OUT, read_calibration
from craton.compression.measure import Measured, compared, judge
from craton.compression.quantize_settings import CalibrationSettings
from craton.errors import CheckpointError, UsageError
from craton.models import CausalLM
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run

SAME: Final = 1e-4  # the largest relative difference of the outputs of what was written from what was made
CALIBRATION_NAME: Final = "calibration.safetensors"


@dataclass
class Watch:
    """How a caller follows. on_begin: the run and what was decided. on_progress: what is being done."""

    on_begin: Callable[[Run, list[str]], None] = lambda run, decided: None
    on_progress: Callable[[str], None] = lambda doing: None


@dataclass(frozen=True)
class Outcome:
    """What was made. measured: on the held-out windows of `calibration`. bytes_*: of the weights' files. rows: a fact
    sheet of each matrix. notes: what a user should know."""

    model: str
    run: str
    base: str
    measured: Measured
    bytes_before: int
    bytes_after: int
    bits: float
    seconds: float
    difference: float
    calibration: dict[str, Any]
    rows: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values = asdict(self)
        return {key: value for key, value in values.items() if key not in ("rows", "measured")} | {
            "measured": self.measured.as_dict(),
            "matrices": list(self.rows),
        }


class Job:
    """A model being compressed in a run."""

    def __init__(self, run: Run, base: StoredModel, source: Source, watch: Watch) -> None:
        self.run, self.base, self.source, self.watch = run, base, source, watch
        self.blocks_folder = run.folder / "blocks"
        self.blocks_folder.mkdir(exist_ok=True)

    @cached_property
    def _text(self) -> SafetensorsFile:
        return SafetensorsFile.open(self.run.folder / CALIBRATION_NAME)

    @property
    def calibration_facts(self) -> dict[str, Any]:
        """What the text is."""
        return read_object(self.run.folder / "calibration.json")

    @property
    def windows(self) -> Tensor:
        """The windows to calibrate with, [N, T]."""
        return self._text.tensor("calibration")

    @property
    def heldout(self) -> Tensor:
        """The windows to judge by, [M, T]."""
        return self._text.tensor("held_out")

    def before(self) -> Tensor:
        """What the model was: see `judge`. Measured once in a run."""
        path = self.run.folder / "before.safetensors"
        if not path.exists():
            self.watch.on_progress("measuring the model as it is")
            found = judge(self.source.model, self.heldout, self.source.checkpoint.pooling)
            write_safetensors(path, {"before": found.reshape(-1) if found.dim() == 0 else found})
        kept = SafetensorsFile.open(path).tensor("before")
        return kept[0] if kept.dim() == 1 else kept

    def streams(self, calibrated: bool) -> tuple[Stream | None, Stream]:
        """Hidden states before the first block: of the windows to calibrate with, and of those to judge by."""
        self.watch.on_progress("embedding the text")
        body = self.source.backbone
        return Stream(body, self.windows) if calibrated else None, Stream(body, self.heldout)

    def outputs(self, stream: Stream) -> Tensor:
        """What the model would give for the first held-out window, from its hidden states after the last block."""
        norm, body = self.source.backbone.trunk.final_norm, self.source.model
        hidden_TD = stream.hidden_TD[: stream.window]
        with torch.inference_mode():
            hidden_TD = hidden_TD if norm is None else norm(hidden_TD)
            return body.logits(hidden_TD) if isinstance(body, CausalLM) else hidden_TD

    def clear(self) -> None:
        """Remove what was only kept to go on from."""
        shutil.rmtree(self.blocks_folder, ignore_errors=True)

    def publish(
        self,
        write: Callable[[Path], Path],
        expected: Tensor,
        relation: str,
        *,
        prepare: Callable[[Any], None] = lambda model: None,
        tolerance: float = SAME,
    ) -> tuple[StoredModel, Measured, float, int]:
        """Write the model, read it again, compare it, measure it, and only then publish it.

        write: writes into a folder and gives what a loader opens. expected: see `outputs`. prepare: what the reading
        program is to do with the model, such as to round its inputs. Gives the model, what was measured, the relative
        difference of its outputs, and its weights' bytes.
        """
        before = self.before()
        found: list[tuple[Measured, float, int]] = []
        assert self.run.name is not None
        name = self.run.name

        def build(folder: Path) -> None:
            self.watch.on_progress("writing")
            path = write(folder)
            self.watch.on_progress("reading it again")
            checkpoint = Checkpoint.open(path)
            model = checkpoint.load(torch.float32, packed=True)
            prepare(model)
            difference = _difference(_first_outputs(model, self.heldout[0]), expected)
            if not difference <= tolerance:
                raise CheckpointError(
                    f"the model that was written gives other outputs than the one that was made: relative difference "
                    f"{difference:.2g}",
                    where=str(self.run.folder),
                    remedy="nothing was published; please report this with the name of the model",
                )
            self.watch.on_progress("measuring it on held-out text")
            measured = compared(before, judge(model, self.heldout, self.source.checkpoint.pooling))
            found.append((measured, difference, weight_bytes(path)))
            card = model_card(self.run, name=name, licence=self.base.licence, metrics=measured.as_dict())
            replace_file(folder / "README.md", card.encode())

        made = publish_model(
            name,
            build,
            source=f"run:{self.run.id}",
            parents=(Parent(relation=relation, name=known_as(self.base)),),
            licence=self.base.licence,
        )
        return made, *found[0]


def begin(
    kind: str,
    model: str,
    settings: CalibrationSettings,
    provenance: Mapping[str, str],
    name: str,
    relation: str,
    check: Callable[[Source], list[str]],
    watch: Watch,
) -> Job:
    """A new run with its text. check: refuses what cannot be done, and says what was decided.

    Raises UsageError for a name or settings that cannot be used, DataError for too little text, CheckpointError for an
    adapter and what else is no model.
    """
    check_model_name(name)
    base = find(model)
    checkpoint = Checkpoint.open(base.path)
    source = open_source(checkpoint)
    decided = check(source)
    if settings.window > checkpoint.text_config.context:
        raise UsageError(
            f"the model reads {checkpoint.text_config.context} tokens at most",
            where="--window",
            remedy=f"ask for --window {checkpoint.text_config.context}",
        )
    text = read_calibration(
        checkpoint.tokenizer(),
        settings.calibration,
        window=settings.window,
        samples=settings.samples,
        seed=settings.seed,
        held_out=HELD_OUT,
    )
    # To be found again from any folder.
    findable = base.id if base.folder is not None else str(base.path.absolute())
    config = {"model": findable, "settings": settings.model_dump(mode="json"), "name": name}
    run = Run.create(
        kind,
        config=config,
        provenance={f"settings.{key}": origin for key, origin in provenance.items()},
        parents=(Parent(relation=relation, name=known_as(base)),),
        name=name,
    )
    write_safetensors(run.folder / CALIBRATION_NAME, {"calibration": text.ids_NT, "held_out": text.heldout_MT})
    replace_file(run.folder / "calibration.json", json_bytes(text.facts))
    job = Job(run, base, source, watch)
    watch.on_begin(run, decided)
    return job


def reopen(run: Run, watch: Watch) -> Job:
    """The job of an interrupted run. Raises UsageError where it was stopped before it had its text."""
    if not (run.folder / "calibration.json").exists():
        raise UsageError("the run was stopped before anything was kept", where=str(run.folder), remedy="start anew")
    base = find(run.config()["model"])
    job = Job(run, base, open_source(Checkpoint.open(base.path)), watch)
    watch.on_begin(run, [])
    return job


def weight_bytes(path: Path) -> int:
    """The bytes of the files of weights at a path."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))


def known_as(model: StoredModel) -> str:
    """The name in a lineage."""
    return model.id if model.folder is not None else model.source


@torch.inference_mode()
def _first_outputs(model: Any, ids_T: Tensor) -> Tensor:
    body = backbone(model)
    read = body.hidden if isinstance(body, CausalLM) else body
    hidden_TD: Tensor = read(ids_T, torch.arange(len(ids_T)))
    return model.logits(hidden_TD) if isinstance(model, CausalLM) else hidden_TD


def _difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = (outputs - outputs.mean(-1, keepdim=True) for outputs in (ours.float(), theirs.float()))
    return float((ours - theirs).norm() / theirs.norm())
