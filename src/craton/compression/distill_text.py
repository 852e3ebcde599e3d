"""Text that models write for a distillation: the teacher's, for a student with another tokeniser, and the student's
own, which the teacher then judges."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from craton.checkpoints.disk import disk_errors, replace_file
from craton.compression.distill_objective import SAMPLED
from craton.data.batch import Batch
from craton.data.example import UNTRAINED, Example, Ids, TokenSequence
from craton.data.loader import ListSource, Loader
from craton.data.records import read_records
from craton.data.schema import check_schema
from craton.errors import DataError, UsageError
from craton.inference.engine import Engine, Request
from craton.inference.model import Model
from craton.inference.settings import SamplingSettings
from craton.models import CausalLM

# Of plain text, the teacher reads this share of a piece and writes the rest.
READ_SHARE: Final = 0.25
FEWEST: Final = 8  # tokens that a continuation must have behind it


# --- the student's own text ----------------------------------------------------------------------------------------


class OnPolicyData:
    """The loader's steps, where a share of the examples is continued by the student as it then is (GKD, arXiv
    2306.13649): the beginning of a text or a chat's prompt stays, what follows is the student's.

    One round of writing serves `every` steps. It is drawn with seeds of its own and kept in `folder`, so that a resumed
    run learns from the same texts. Such examples carry the label `SAMPLED`.
    """

    def __init__(
        self, loader: Loader, student: CausalLM, tokenizer: Any, folder: Path, *, share: float, every: int, steps: int
    ) -> None:
        self._loader, self._student, self._tokenizer, self._folder = loader, student, tokenizer, folder
        self._share, self._every, self._steps = share, every, steps
        self._round: tuple[int, list[list[Example]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass."""
        return self._loader.steps_per_epoch

    def step(self, index: int) -> list[Batch]:
        """The micro-batches of a step."""
        number, within = divmod(index, self._every)
        if self._round is None or self._round[0] != number:
            self._round = (number, self._written(number))
        examples = self._given(index) + self._round[1][within]
        mixed = Loader(
            ListSource(examples), batch=len(examples), micro_tokens=self._loader.micro_tokens, seed=0, shuffle=False
        )
        return mixed.step(0)

    def _given(self, index: int) -> list[Example]:
        chosen = self._loader.indices(index)
        return [self._loader.source[int(i)] for i in chosen[self._count(len(chosen)) :]]

    def _count(self, examples: int) -> int:
        return round(self._share * examples)

    def _written(self, number: int) -> list[list[Example]]:
        """The student's examples of each step of a round."""
        path = self._folder / f"round-{number:06}.json"
        first = number * self._every
        steps = range(first, min(first + self._every, self._steps))
        if not path.exists():
            prompts = [
                (step, _longest(self._loader.source[int(i)]))
                for step in steps
                for i in self._loader.indices(step)[: self._count(len(self._loader.indices(step)))]
            ]
            self._write(path, prompts)
        rows = json.loads(path.read_bytes())
        examples: list[list[Example]] = [[] for _ in range(self._every)]
        for step, prompt, ids in rows:
            targets = [UNTRAINED] * (prompt - 1) + ids[prompt:] + [UNTRAINED]
            sequence = TokenSequence(np.array(ids, np.int32), np.array(targets, np.int32))
            examples[step - first].append(Example((sequence,), label=SAMPLED))
        return examples

    def _write(self, path: Path, prompts: list[tuple[int, TokenSequence]]) -> None:
        student = self._student
        training = student.training
        student.eval()
        try:
            dtype = student.compute_dtype or student.embedding.weight.dtype
            engine = Engine(student, self._tokenizer, dtype=dtype, native_threads=None)
            with torch.inference_mode():
                running = []
                for number, (step, sequence) in enumerate(prompts):
                    prompt = prompt_of(sequence)
                    room = min(max(FEWEST, len(sequence) - len(prompt)), student.config.context - len(prompt))
                    seed = (step * 1_000_003 + number) % 2**62
                    settings = SamplingSettings(max_tokens=room, temperature=1.0, seed=seed)
                    running.append((step, len(prompt), engine.submit(Request(prompt, settings))))
                rows = [(step, length, generation.wait().ids) for step, length, generation in running]
        finally:
            student.train(training)
        with disk_errors("write the student's texts", path):
            path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(rows).encode())


def prompt_of(sequence: TokenSequence) -> list[int]:
    """The tokens that a sequence is continued from: all before the first that is trained, or half of a text that is
    trained from its beginning."""
    ids: Ids = sequence.ids
    trained = np.flatnonzero(sequence.targets != UNTRAINED)
    first = int(trained[0]) + 1 if len(trained) else 1
    return [int(token) for token in (ids[:first] if first > FEWEST else ids[: max(1, len(ids) // 2)])]


def _longest(example: Example) -> TokenSequence:
    return max(example.sequences, key=len)


# --- the teacher's text --------------------------------------------------------------------------------------------


def write_texts(
    teacher: Model,
    sources: Sequence[str],
    path: Path,
    *,
    context: int,
    temperature: float,
    seed: int,
    most: int | None,
    seconds: float | None,
    on_progress: Callable[[str], None],
) -> Path:
    """Let the teacher write the answers or the rest of the data's texts, as records that any tokeniser can read
    (sequence-level distillation, Kim & Rush 2016, arXiv 1606.07947): samples at `temperature`.

    context: tokens of a piece of plain text. most: so many records; seconds: for so long. What was written is kept, and
    an interrupted call goes on behind it. Raises DataError for data that gives no prompt.
    """
    part = path.with_suffix(".part")
    if path.exists():
        return path
    lines = part.read_text(encoding="utf-8").splitlines() if part.exists() else []
    whole = [line for line in lines if _is_record(line)]
    replace_file(part, "".join(f"{line}\n" for line in whole).encode())
    began = time.monotonic()
    written = len(whole)
    with disk_errors("write the teacher's texts", path), part.open("a", encoding="utf-8") as file:
        for number, record in enumerate(_prompts(teacher, sources, context)):
            if (most is not None and number >= most) or (seconds and time.monotonic() - began > seconds):
                break
            if number < written:
                continue
            on_progress(f"the teacher writes text {number + 1}{f' of {most}' if most else ''}")
            answered = _answered(teacher, record, context, temperature, seed + number)
            file.write(json.dumps(answered, ensure_ascii=False) + "\n")
            file.flush()
            written = number + 1
    if not written:
        raise DataError("the data gives the teacher nothing to write on", where=", ".join(sources))
    part.rename(path)
    return path


def _is_record(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _prompts(teacher: Model, sources: Sequence[str], context: int) -> Iterator[dict[str, Any]]:
    """Records that lack what the teacher shall write: {"read": ids} of plain text, or chats without the last answer."""
    checked = check_schema(read_records(list(sources)), expected=("messages", "prompt", "text"))
    for record in checked:
        value = record.value
        if checked.schema == "text":
            ids = teacher.tokenizer.encode(value["text"], add_special_tokens=False)
            for begin in range(0, len(ids), context):
                piece = ids[begin : begin + context]
                if len(piece) >= 4 * FEWEST:
                    yield {"read": piece[: int(READ_SHARE * len(piece))], "room": len(piece)}
        elif checked.schema == "messages":
            messages = list(value["messages"])
            while messages and messages[-1].get("role") == "assistant":
                messages.pop()
            if messages:
                yield {"messages": messages}
        else:
            yield {"prompt": value["prompt"]}


def _answered(teacher: Model, record: Mapping[str, Any], context: int, temperature: float, seed: int) -> dict[str, Any]:
    sampling: dict[str, Any] = {"temperature": temperature, "seed": seed}
    if "read" in record:
        room = record["room"] - len(record["read"])
        text = teacher.generate(record["read"], max_tokens=room, **sampling).text
        return {"text": teacher.tokenizer.decode(record["read"]) + text}
    prompt = record.get("messages", record.get("prompt"))
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": teacher.generate(prompt, max_tokens=context, **sampling).text}
    if not isinstance(prompt, list):
        raise UsageError("a prompt is text or a list of messages")
    answer = {"role": "assistant", "content": teacher.chat(prompt, max_tokens=context, **sampling).text}
    if "messages" in record:
        return {"messages": [*prompt, answer]}
    return {"prompt": prompt, "completion": [answer]}
