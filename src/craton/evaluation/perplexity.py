"""How well a model foretells a text: bits per byte, which no tokeniser can flatter, and perplexity beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from craton.checkpoints.disk import disk_errors
from craton.errors import DataError, FileFormatError
from craton.evaluation.intervals import Estimate, estimate_ratio
from craton.inference.model import Model
from craton.inference.scoring import rolling_windows

MOST_WINDOW: Final = 1024


def text_figures(
    model: Model,
    path: Path,
    *,
    limit: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> dict[str, Estimate]:
    """Bits per byte (of the raw bytes) and perplexity per token of a text file, in windows as lm-eval makes them.

    limit: windows to score at most. Intervals resample windows. Raises DataError for an empty file, FileFormatError for
    one that is not UTF-8.
    """
    with disk_errors("read the text", path):
        raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FileFormatError("the text is not UTF-8", where=str(path)) from None
    ids = model.tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise DataError("there is no text in the file", where=str(path))
    tokenizer = model.tokenizer
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_ids[0]
    windows = rolling_windows(ids, min(MOST_WINDOW, model.context - 1), start)[:limit]
    nats, sizes, tokens = [], [], []
    for number, (context, target) in enumerate(windows, 1):
        on_progress(f"{path.name}: window {number} of {len(windows)}")
        [score] = model.score([(context, target)])
        nats.append(-score.logprob)
        tokens.append(float(len(target)))
        sizes.append(float(byte_count(model, target)))
    found = estimate_ratio(nats, sizes, seed=seed)
    per_token = estimate_ratio(nats, tokens, seed=seed)
    return {
        "bits_per_byte": _scaled(found, lambda value: value / math.log(2)),
        "perplexity": _scaled(per_token, math.exp),
    }


def byte_count(model: Model, ids: Sequence[int]) -> int:
    """The bytes of text that these tokens stand for."""
    return sum(len(model.tokenizer.token_bytes(token)) for token in ids if token not in model.tokenizer.special_ids)


def _scaled(one: Estimate, scale: Callable[[float], float]) -> Estimate:
    low, high = (scale(v) if math.isfinite(v) else v for v in (one.low, one.high))
    return Estimate(scale(one.value), low, high, one.n, one.clusters, one.method)
