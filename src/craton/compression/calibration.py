"""Text to calibrate with and text to judge by: chosen, cut into windows, and written down.

Windows are cut from one stream of shuffled documents. Those at its end are held out: nothing is calibrated on them, and
the loss before and after is measured on them.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.checkpoints.disk import sha256_of
from craton.data.documents import clean
from craton.data.records import Reading, read_records
from craton.errors import DataError
from craton.modalities.text import Tokenizer
from craton.models import CausalLM
from craton.retrieval.reading.docstrings import find_modules
from craton.trunk.trunk import sequence_layout

HELD_OUT: Final = 16  # windows
READ_FACTOR: Final = 8  # of a large source, so many times the text that is needed is read and drawn from
LOGIT_ROWS: Final = 512  # of logits at once: 100 MB in fp32 with a vocabulary of 49k
BUILT_IN: Final = "the docstrings of Python's standard library"
MODULES: Final = (
    *("argparse", "asyncio", "calendar", "codecs", "collections", "configparser", "csv", "datetime", "decimal"),
    *("difflib", "doctest", "email", "enum", "functools", "heapq", "html", "http", "imaplib", "inspect", "io"),
    *("itertools", "json", "logging", "math", "multiprocessing", "os", "pathlib", "pickle", "random", "re", "socket"),
    *("ssl", "statistics", "string", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "typing"),
    *("unittest", "urllib", "zipfile"),
)


@dataclass(frozen=True)
class Calibration:
    """ids_NT: int64, the windows to calibrate with. heldout_MT: those to judge by, none of whose text is in `ids_NT`.
    facts: what they are, for the run's record."""

    ids_NT: Tensor
    heldout_MT: Tensor
    facts: dict[str, Any]


def read_calibration(
    tokenizer: Tokenizer, sources: Sequence[str], *, window: int, samples: int, seed: int, held_out: int = HELD_OUT
) -> Calibration:
    """`samples` windows of `window` tokens of the text in `sources` (as `read_records` takes them: a text file, or
    records with a "text"; none: Python's docstrings, which are on every machine), and `held_out` more to judge by.

    Each window is framed as the tokeniser frames a text. Raises DataError where there is too little text, or records
    without text.
    """
    needed = (samples + held_out) * window
    documents = list(_documents(sources, READ_FACTOR * needed))
    random.Random(seed).shuffle(documents)
    text = "\n\n".join(documents)
    before, after = _frame(tokenizer)
    stream = tokenizer.encode(text, add_special_tokens=False)
    room = window - len(before) - len(after)
    count = len(stream) // room
    if count < samples + held_out:
        raise DataError(
            f"the text makes {count} windows of {window} tokens; {samples} to calibrate with and {held_out} to judge "
            "by are needed",
            where=", ".join(sources) or BUILT_IN,
            remedy=f"give text of about {(samples + held_out) * room:,} tokens (there are {len(stream):,}), or "
            "lower --samples or --window",
        )
    windows_CT = torch.tensor(
        [[*before, *stream[i * room : (i + 1) * room], *after] for i in range(count)], dtype=torch.int64
    )
    border = count - held_out
    chosen = sorted(random.Random(seed + 1).sample(range(border), samples))
    facts = {
        "text": list(sources) or BUILT_IN,
        "files": _files(sources),
        "python": None if sources else sys.version.split()[0],
        "documents": len(documents),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "windows": samples,
        "held_out_windows": held_out,
        "window": window,
        "tokens": samples * window,
        "held_out_tokens": held_out * window,
        "seed": seed,
    }
    return Calibration(windows_CT[chosen], windows_CT[border:], facts)


@torch.inference_mode()
def heldout_loss(model: CausalLM, ids_NT: Tensor) -> float:
    """The mean loss in nats a token over the windows, each read on its own."""
    total, count = 0.0, 0
    for ids_T in ids_NT:
        hidden_TD = model.hidden(ids_T, *sequence_layout([len(ids_T)], ids_T.device))
        for rows_SD, targets_S in zip(hidden_TD[:-1].split(LOGIT_ROWS), ids_T[1:].split(LOGIT_ROWS), strict=True):
            total += float(F.cross_entropy(model.logits(rows_SD).float(), targets_S, reduction="sum"))
        count += len(ids_T) - 1
    return total / count


def _documents(sources: Sequence[str], tokens: int) -> Iterator[str]:
    """The texts, until there are surely enough: a token has rarely more than eight characters."""
    characters = 0
    for text in _texts(sources):
        cleaned = clean(text)
        if cleaned.strip():
            yield cleaned
        characters += len(cleaned)
        if characters > 8 * tokens:
            return


def _texts(sources: Sequence[str]) -> Iterator[str]:
    if not sources:
        for name in MODULES:
            for module in find_modules(name):
                yield from (document.text for document in module.documents())
        return
    for record in read_records(list(sources), reading=Reading()):
        text = record.value.get("text")
        if not isinstance(text, str):
            raise DataError(
                "a record has no text to calibrate with",
                where=record.origin,
                remedy='give text files, or records with a "text"',
            )
        yield text


def _files(sources: Sequence[str]) -> list[dict[str, Any]]:
    """Path, bytes and SHA-256 of each file that was named (of a folder or a pattern the text's own hash speaks)."""
    paths = [path for source in sources if (path := Path(source).expanduser()).is_file()]
    return [{"path": str(path.absolute()), "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths]


def _frame(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the tokeniser puts before and behind a text."""
    bare, full = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]
