"""What quantising and pruning share around the walk: the run, what calibrates, the figures before, the file, and the
proof that it is right."""

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
from craton.checkpoints.families.whisper_generation import read_generation, write_generation
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.checkpoints.save import copy_preprocessing
from craton.compression.blocks import Flow, Source, Tower, linear_names, open_source
from craton.compression.material import Material, TextMaterial
from craton.compression.material_pictures import PictureMaterial
from craton.compression.material_sounds import SoundMaterial
from craton.compression.measure import Measured, compared
from craton.compression.quantize_settings import CalibrationSettings
from craton.compression.walk import Refine, Work, walk
from craton.errors import CheckpointError, UsageError
from craton.inference.images import SeeingConfig
from craton.models import Seq2Seq, Seq2SeqConfig
from craton.store import find
from craton.store.artifacts import check_model_name, publish_model
from craton.store.cards import model_card
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.run_files import json_bytes, read_object
from craton.store.runs import Run

SAME: Final = 1e-4  # the largest relative difference of the outputs of what was written from what was made
CALIBRATION_NAME: Final = "calibration.safetensors"
FACTS_NAME: Final = "calibration.json"


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
        # By the tower's name, the hidden states behind its last block: of what judges, and of what calibrates.
        self.passed: dict[str, Flow] = {}
        self.calibration: dict[str, Flow] = {}

    @cached_property
    def material(self) -> Material:
        """What the model is calibrated with and judged by, as the run keeps it."""
        kept = SafetensorsFile.open(self.run.folder / CALIBRATION_NAME)
        tensors = {name: kept.tensor(name) for name in kept.tensors}
        kind = material_kind(self.source.checkpoint)
        return kind(self.source.checkpoint, tensors, read_object(self.run.folder / FACTS_NAME))

    def before(self) -> dict[str, Tensor]:
        """What the model was: see `Material.judge`. Measured once in a run."""
        path = self.run.folder / "before.safetensors"
        if not path.exists():
            self.watch.on_progress("measuring the model as it is")
            write_safetensors(path, self.material.judge(self.source.model))
        kept = SafetensorsFile.open(path)
        return {name: kept.tensor(name) for name in kept.tensors}

    def walk(
        self,
        work: Work,
        *,
        calibrated: bool,
        gram: bool,
        int8_inputs: bool = False,
        refine: Refine | None = None,
    ) -> None:
        """Walk through all towers. Behind it stand `passed` and `calibration`."""
        for tower in self.source.towers:
            self.watch.on_progress("reading what the model is calibrated with and judged by")
            calibration = self._flow(tower, held_out=False) if calibrated else None
            follower = self._flow(tower, held_out=True)
            assert follower is not None
            walk(
                self.source,
                self.blocks_folder,
                work,
                calibration,
                [follower],
                tower=tower,
                names_of=linear_names,
                gram=gram,
                int8_inputs=int8_inputs,
                on_progress=self.watch.on_progress,
                refine=refine,
            )
            self.passed[tower.name] = follower
            if calibration is not None:
                self.calibration[tower.name] = calibration

    def _flow(self, tower: Tower, *, held_out: bool) -> Flow | None:
        done = self.passed if held_out else self.calibration
        return self.material.flow(self.source, tower, held_out=held_out, done=done)

    def clear(self) -> None:
        """Remove what was only kept to go on from."""
        shutil.rmtree(self.blocks_folder, ignore_errors=True)

    def publish(
        self,
        write: Callable[[Path], Path],
        expected: list[Tensor],
        relation: str,
        *,
        prepare: Callable[[Any], None] = lambda model: None,
        tolerance: float = SAME,
    ) -> tuple[StoredModel, Measured, float, int]:
        """Write the model, read it again, compare it, measure it, and only then publish it.

        write: writes into a folder and gives what a loader opens. expected: see `Material.expected`. prepare: what the
        reading program is to do with the model, such as to round its inputs. Gives the model, what was measured, the
        relative difference of its outputs, and its weights' bytes.
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
            differences = list(map(_difference, self.material.given(model), expected))
            wrong = [difference for difference in differences if not difference <= tolerance]  # NaN is wrong as well
            if wrong:
                raise CheckpointError(
                    f"the model that was written gives other outputs than the one that was made: relative difference "
                    f"{wrong[0]:.2g}",
                    where=str(self.run.folder),
                    remedy="nothing was published; please report this with the name of the model",
                )
            self.watch.on_progress("measuring it on what was held out")
            measured = compared(before, self.material.judge(model))
            found.append((measured, max(differences), weight_bytes(path)))
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


def material_kind(checkpoint: Checkpoint) -> type[TextMaterial | PictureMaterial | SoundMaterial]:
    """What a model is calibrated with."""
    if isinstance(checkpoint.config, SeeingConfig):
        return PictureMaterial
    return SoundMaterial if isinstance(checkpoint.config, Seq2SeqConfig) else TextMaterial


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
    """A new run with what it is calibrated with. check: refuses what cannot be done, and says what was decided.

    Raises UsageError for a name or settings that cannot be used, DataError for too little text, CheckpointError for an
    adapter and what else is no model.
    """
    check_model_name(name)
    base = find(model)
    checkpoint = Checkpoint.open(base.path)
    source = open_source(checkpoint)
    decided = check(source)
    material = material_kind(checkpoint).read(checkpoint, settings)
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
    write_safetensors(run.folder / CALIBRATION_NAME, material.tensors)
    replace_file(run.folder / FACTS_NAME, json_bytes(material.facts))
    job = Job(run, base, source, watch)
    watch.on_begin(run, decided)
    return job


def reopen(run: Run, watch: Watch) -> Job:
    """The job of an interrupted run. Raises UsageError where it was stopped before it had what calibrates."""
    if not (run.folder / FACTS_NAME).exists():
        raise UsageError("the run was stopped before anything was kept", where=str(run.folder), remedy="start anew")
    base = find(run.config()["model"])
    job = Job(run, base, open_source(Checkpoint.open(base.path)), watch)
    watch.on_begin(run, [])
    return job


def copy_beside(source: Source, folder: Path) -> None:
    """What a model's folder says beside its weights, config and tokeniser: how pictures and sounds are prepared, and
    how speech is written down. Raises StoreError if it cannot be written."""
    copy_preprocessing(source.checkpoint.folder, folder)
    if isinstance(source.model, Seq2Seq):
        assert source.tokenizer is not None
        facts, config = read_generation(source.checkpoint.folder), source.model.config
        write_generation(folder, config, facts.tokens(source.tokenizer, config.vocab), facts.alignment_heads)


def weight_bytes(path: Path) -> int:
    """The bytes of the files of weights at a path."""
    if path.is_file():
        return path.stat().st_size
    weights = (file for file in path.iterdir() if file.suffix in (".safetensors", ".gguf", ".bin"))
    return sum(file.stat().st_size for file in weights)


def known_as(model: StoredModel) -> str:
    """The name in a lineage."""
    return model.id if model.folder is not None else model.source


def _difference(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = (outputs - outputs.mean(-1, keepdim=True) for outputs in (ours.float(), theirs.float()))
    return float((ours - theirs).norm() / theirs.norm())
