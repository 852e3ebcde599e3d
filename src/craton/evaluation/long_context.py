"""What a model makes of a long text: does it find a fact in it, does it foretell its end as well as its beginning?"""

from __future__ import annotations

import ast
import math
import random
import sysconfig
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

from craton.checkpoints.disk import disk_errors
from craton.errors import DataError, FileFormatError, UsageError
from craton.inference.model import Model
from craton.inference.streaming import StreamWindow, slide
from craton.models import CausalLM
from craton.trunk import KVCache

DEPTHS: Final = (0.1, 0.5, 0.9)
CANDIDATES: Final = 10
TRIALS: Final = 3
# Candidates are of equal numbers of tokens: a word of two is less likely than one of one, whatever stands in the text.
WORDS: Final = (
    "apple bridge candle desert engine forest garden hammer island jacket kettle lantern mirror needle orange pepper "
    "quarry ribbon saddle tunnel umbrella valley window yellow anchor basket copper dragon eagle feather guitar harbor"
)
PLACES: Final = ("Arlen", "Bexford", "Calder", "Dunmore", "Eastwick", "Farnham", "Galway", "Hilton", "Ivybridge")
FILLER: Final = ("argparse", "datetime", "decimal", "inspect", "logging", "pathlib", "random", "statistics", "tarfile")


@dataclass(frozen=True)
class NeedleCell:
    """A fact planted at `depth` (0: the beginning) of a text of `length` tokens: how often the right word of
    `CANDIDATES` was the likeliest, and its mean rank (1 is best; chance is 5.5)."""

    length: int
    depth: float
    trials: int
    found: float
    rank: float


@dataclass(frozen=True)
class PositionBin:
    """The perplexity of tokens at positions [first, last) of their window, over `tokens` of them."""

    first: int
    last: int
    tokens: int
    perplexity: float


@dataclass(frozen=True)
class LongContext:
    """What `craton eval --long-context` reports. streamed: by position, read through a stream window."""

    model: str
    text: str | None
    needle: tuple[NeedleCell, ...]
    positions: tuple[PositionBin, ...]
    streamed: tuple[PositionBin, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def measure(
    model: Model,
    text: Path | None = None,
    *,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    stream: StreamWindow | None = None,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> LongContext:
    """The needle test at `lengths` (none: a quarter, half and all of the context) and, of a text file, perplexity by
    position. limit: windows of the text that are read at most. stream: also read them as one text through this window.

    Raises DataError and FileFormatError for a file without a whole window or one that is not UTF-8.
    """
    if stream is not None and text is None:
        raise UsageError("a stream window reads a text, and none is named", remedy="name a .txt file")
    ids = read_ids(model, text)[: limit * model.context if limit else None] if text is not None else []
    cells = needle(model, lengths or [model.context // 4, model.context // 2, model.context], on_progress=on_progress)
    on_progress("reading the text by position")
    positions = perplexity_by_position(model, ids) if text is not None else []
    streamed = streamed_by_position(model, ids, stream) if stream is not None else []
    name = text.name if text is not None else None
    return LongContext(model.name, name, tuple(cells), tuple(positions), tuple(streamed))


def read_ids(model: Model, path: Path) -> list[int]:
    """The tokens of a text file."""
    with disk_errors("read the text", path):
        raw = path.read_bytes()
    try:
        return model.tokenizer.encode(raw.decode("utf-8-sig"), add_special_tokens=False)
    except UnicodeDecodeError:
        raise FileFormatError("the text is not UTF-8", where=str(path)) from None


def needle(
    model: Model,
    lengths: Sequence[int],
    depths: Sequence[float] = DEPTHS,
    *,
    trials: int = TRIALS,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda doing: None,
) -> list[NeedleCell]:
    """Plant a fact in the standard library's docstrings and ask for it, after Kamradt's needle in a haystack (2023).

    The answer is not written but scored: its rank among words that are not in the text. So a model that is too small to
    follow a question shows what it has seen, too. lengths: whole texts in tokens.

    Raises UsageError for a length that the model does not read or that has no room for the question.
    """
    filler = _filler_ids(model, max(lengths))
    words = _alike(model)
    cells = []
    for length in lengths:
        if length > model.context:
            raise UsageError(f"{length} tokens are more than the context of {model.context}", where="lengths")
        for depth in depths:
            on_progress(f"a fact in {length:,} tokens, {depth:.0%} deep")
            ranks = [_rank(model, filler, words, length, depth, f"{seed}.{trial}") for trial in range(trials)]
            found = sum(rank == 1 for rank in ranks) / trials
            cells.append(NeedleCell(length, depth, trials, found, sum(ranks) / trials))
    return cells


def perplexity_by_position(
    model: Model, ids: Sequence[int], bins: int = 8, window: int | None = None
) -> list[PositionBin]:
    """How well a text's tokens are foretold, by how much of it stands before them: windows of the whole context (or of
    `window` tokens), one after another, each read from its own beginning.

    Raises DataError for a text without a whole window.
    """
    window = min(window or model.context, model.context)
    start = [model.start_id] if model.start_id is not None else []
    size = window - len(start)
    pieces = [list(ids[first : first + size]) for first in range(0, len(ids) - size + 1, size)]
    if not pieces or window < bins:
        raise DataError(
            f"the text has {len(ids):,} tokens, fewer than one window of {window:,}",
            remedy="give a longer text or a shorter window",
        )
    kept = 0 if start else 1  # the first token of a window needs something before it
    scores = [model.score([([*start, *piece[:kept]], piece[kept:])])[0].token_logprobs for piece in pieces]
    return _binned(scores, bins, kept)


@torch.inference_mode()
def streamed_by_position(model: Model, ids: Sequence[int], stream: StreamWindow, bins: int = 8) -> list[PositionBin]:
    """How well one long text is foretold through a stream window, by position in the whole of it."""
    module = model.module
    if not isinstance(module, CausalLM):
        raise UsageError(f"{model.name} is an encoder and gives text no probability")
    stream.check(module.config.trunk, module.config.context)
    start = [model.start_id] if model.start_id is not None else []
    whole = [*start, *ids]
    cache = KVCache(module.config.trunk, 1, dtype=model.plan.dtype)
    logprobs: list[float] = []
    for first in range(0, len(whole) - 1, stream.block):
        piece = whole[first : min(first + stream.block, len(whole) - 1)]
        if cache.lengths[0] + len(piece) > stream.size:
            cache.lengths[0] = slide(cache, module.config.trunk, 0, stream.sinks, stream.block)
        at = cache.lengths[0]
        positions_T = torch.arange(at, at + len(piece))
        hidden_TD = module.hidden(torch.tensor(piece), positions_T, torch.zeros_like(positions_T), cache)
        logprobs_TV = module.logits(hidden_TD).float().log_softmax(-1)
        targets_T = torch.tensor(whole[first + 1 : first + 1 + len(piece)])
        logprobs += logprobs_TV.gather(1, targets_T[:, None])[:, 0].tolist()
    return _binned([logprobs], bins, 0)


def _binned(scores: Sequence[Sequence[float]], bins: int, offset: int) -> list[PositionBin]:
    length = len(scores[0])
    edges = [round(length * i / bins) for i in range(bins + 1)]
    found = []
    for first, last in pairwise(edges):
        values = [value for score in scores for value in score[first:last]]
        perplexity = math.exp(min(-sum(values) / len(values), 700.0))
        found.append(PositionBin(first + offset, last + offset, len(values), perplexity))
    return found


def _rank(model: Model, filler: list[int], words: list[str], length: int, depth: float, seed: str) -> int:
    random_ = random.Random(seed)
    place, chosen = random_.choice(PLACES), random_.sample(words, CANDIDATES)

    def encode(text: str) -> list[int]:
        return model.tokenizer.encode(text, add_special_tokens=False)

    fact = encode(f"\n\nThe secret word of {place} is {chosen[0]}.\n\n")
    question = encode(f"\n\nWhat is the secret word of {place}? The secret word of {place} is")
    start = [model.tokenizer.bos_id] if model.tokenizer.bos_id is not None else []
    answers = [encode(f" {word}") for word in chosen]
    room = length - len(start) - len(fact) - len(question) - len(answers[0])
    if room < 0:
        raise UsageError(f"{length} tokens have no room for a fact and a question", where="lengths")
    before = round(room * depth)
    context = [*start, *filler[:before], *fact, *filler[before:room], *question]
    scores = [score.logprob for score in model.score([(context, answer) for answer in answers])]
    return 1 + sum(score > scores[0] for score in scores[1:])


def _alike(model: Model) -> list[str]:
    """The words that this tokeniser writes with one and the same number of tokens, the number that most have."""
    sizes = {word: len(model.tokenizer.encode(f" {word}", add_special_tokens=False)) for word in WORDS.split()}
    usual = Counter(sizes.values()).most_common(1)[0][0]
    words = [word for word in sizes if sizes[word] == usual]
    # A tokeniser that knows hardly any of them cuts them into pieces of many lengths: then all must do.
    return words if len(words) >= CANDIDATES else list(sizes)


def _filler_ids(model: Model, tokens: int) -> list[int]:
    """At least so many tokens of the standard library's docstrings, again from the first where they do not suffice."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    ids: list[int] = []
    for name in FILLER:
        path = folder / f"{name}.py"
        if len(ids) < tokens and path.is_file():
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
            ids += model.tokenizer.encode("\n\n".join(texts), add_special_tokens=False)
    if not ids:
        raise DataError("the standard library's sources are not here, and they are what the fact is hidden in")
    return ids * (1 + tokens // len(ids))
