"""What a distillation learns on, and a student that is cut from its teacher by what that shows of its parts."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.disk import replace_file
from craton.checkpoints.save import copy_preprocessing
from craton.compression.distill_settings import DistillSettings
from craton.compression.structured import check_family, check_prunable, cut, save_cut
from craton.compression.structured_settings import StructuredSettings
from craton.data.loader import ExampleSource, ListSource
from craton.data.mixture import window_source
from craton.data.prepare import PrepareSettings, prepare
from craton.data.records import read_records
from craton.data.schema import check_schema
from craton.data.shard_files import MANIFEST_NAME
from craton.data.shards import WindowSource, open_shards
from craton.errors import UsageError
from craton.finetuning.examples import read_examples
from craton.finetuning.settings import FinetuneSettings
from craton.modalities.text import Tokenizer
from craton.training.ranks import Ranks
from craton.training.session import Hooks

# A student that is cut from its teacher: the share of the layers, or of the feed-forward's channels, that stays.
CUT: Final = re.compile(r"(depth|width):(0?\.\d+)")
STUDENT_NAME: Final = "student"
STUDENT_FACTS: Final = "student.json"
PROGRESS_SECONDS: Final = 5.0
CALIBRATION_WINDOW: Final = 256
CALIBRATION_WINDOWS: Final = 8


@dataclass(frozen=True)
class Data:
    """training, held_out: examples. digest: of what is not kept in the run. decisions: how it was understood."""

    training: ExampleSource
    held_out: ExampleSource | None
    digest: str
    decisions: tuple[str, ...]


def read_data(
    sources: Sequence[str],
    settings: DistillSettings,
    tokenizer: Tokenizer,
    context: int,
    folder: Path,
    ranks: Ranks,
    hooks: Hooks,
) -> Data:
    """Windows of plain text, or conversations."""
    prepared = len(sources) == 1 and (Path(sources[0]) / MANIFEST_NAME).is_file()
    wanted = ("messages", "prompt", "text")
    if not prepared and check_schema(read_records(list(sources)), expected=wanted).schema != "text":  # type: ignore[arg-type]
        chats = FinetuneSettings(
            max_tokens=settings.max_tokens,
            # What the teacher wrote may be longer in the student's tokens: its beginning is as good.
            overlong="truncate" if settings.bridge else settings.overlong,
            holdout=settings.holdout,
            training=settings.training,
        )
        examples = read_examples(sources, chats, tokenizer, context, hooks.on_progress)
        return Data(
            ListSource(examples.training), ListSource(examples.held_out), examples.digest, tuple(examples.decisions)
        )
    window = min(settings.context, context)
    target = Path(sources[0]) if prepared else folder / "data"
    if ranks.is_first and not target.exists():
        hooks.on_progress("data")
        chosen = PrepareSettings(sources=tuple(sources), holdout=settings.holdout, context=window)
        prepare(chosen, tokenizer, target, name="the student's")
    ranks.wait()
    shards = open_shards(target, tokenizer)
    held_out = None
    if shards.heldout is not None and shards.heldout.tokens > window:
        held_out = WindowSource(shards.heldout, window)
    return Data(window_source(shards, window), held_out, "", (f"windows of {window} tokens of plain text",))


def cut_student(
    teacher: Checkpoint,
    student: str,
    data: Data,
    folder: Path,
    ranks: Ranks,
    hooks: Hooks,
) -> Path:
    """The folder of a student that is cut from the teacher, by what the training data shows of its parts."""
    target = folder / STUDENT_NAME
    match = CUT.fullmatch(student)
    assert match is not None
    share = float(match[2])
    if ranks.is_first and not target.exists():
        model = teacher.load(torch.float32)
        layers = round((1 - share) * len(model.config.trunk.layers))
        if match[1] == "depth" and layers < 1:
            raise UsageError(f"{student} of {len(model.config.trunk.layers)} layers removes none", where=student)
        chosen = StructuredSettings(layers=layers) if match[1] == "depth" else StructuredSettings(channels=1 - share)
        ids_NT = _calibration_windows(data, min(CALIBRATION_WINDOW, teacher.text_config.context))
        done = cut(check_prunable(model, chosen), chosen, ids_NT, now_and_then(hooks.on_progress))
        check_family(done.model.config, teacher.family)
        part = folder / f".{STUDENT_NAME}.part"
        shutil.rmtree(part, ignore_errors=True)
        save_cut(done.model, teacher.family, part, teacher.tokenizer(), torch.float32)
        copy_preprocessing(teacher.folder, part)
        replace_file(folder / STUDENT_FACTS, json.dumps(", ".join(done.decisions)).encode())
        os.rename(part, target)
    ranks.wait()
    return target


def _calibration_windows(data: Data, window: int) -> torch.Tensor:
    """Windows of the training data's first examples, laid one after another [N, T]."""
    ids: list[int] = []
    for index in range(len(data.training)):
        ids += [int(token) for sequence in data.training[index].sequences for token in sequence.ids]
        if len(ids) >= CALIBRATION_WINDOWS * window:
            break
    window = min(window, len(ids))
    count = min(CALIBRATION_WINDOWS, len(ids) // window)
    return torch.tensor(ids[: count * window]).view(count, window)


def now_and_then(say: Callable[[str], None]) -> Callable[[str], None]:
    """The same words, at most every few seconds."""
    said = -PROGRESS_SECONDS

    def some(doing: str) -> None:
        nonlocal said
        if time.monotonic() - said >= PROGRESS_SECONDS:
            said = time.monotonic()
            say(doing)

    return some
