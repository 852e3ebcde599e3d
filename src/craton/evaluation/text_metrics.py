"""How near an answer comes to its references: exact match and token F1 as SQuAD counts them, ROUGE, BLEU, and what a
language model is judged by, bits per byte and perplexity.

Every score but BLEU's is one item's, for `craton.evaluation.intervals.estimate` to average; BLEU is a whole corpus's.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from math import exp, inf, log
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from craton.data.words import words
from craton.errors import DataError, UnknownName, UsageError
from craton.training.metrics import bits_per_byte as bits_per_byte  # so that evaluations find all text metrics here

Rouge = Literal["rouge1", "rouge2", "rougeL"]
BleuCounts = npt.NDArray[np.int64]

BLEU_ORDER: Final = 4

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
# Readers see no difference between these letters; which of them stands in a text is a matter of the keyboard.
_SAME_LETTERS: Final = {"\u064a": "\u06cc", "\u0643": "\u06a9", "\u0640": "", "\u200c": "", "\u200d": ""}
_UNESCAPED: Final = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# Of mteval-v13a.pl, in its order: symbols stand alone, as do periods and commas that are not within a number.
_SPLITS_13A: Final = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


class _Normal(dict[int, str]):
    # What str.translate puts in place of each character, found once: no punctuation, digits of all scripts as ASCII.
    def __missing__(self, code: int) -> str:
        character = chr(code)
        if character in string.punctuation or unicodedata.category(character).startswith("P"):
            value = ""
        else:
            digit = unicodedata.decimal(character, None)
            value = _SAME_LETTERS.get(character, character) if digit is None else str(digit)
        self[code] = value
        return value


_NORMAL: Final = _Normal()


def normalise_answer(text: str) -> str:
    """The text as answers are compared: lower case, without punctuation, the words a, an, the, and surplus white space.

    The rules of the official script of SQuAD 1.1 (Rajpurkar et al. 2016), and its very result for ASCII. In other
    scripts the punctuation of Unicode (categories P) goes too, digits become ASCII's, the Arabic kaf and yeh become
    the Persian ones, and joiners and tatweel vanish, so that answers that look the same are the same.
    The lone answer "A" is nothing but an article: judge letters of options as classes, not as text.
    """
    bare = unicodedata.normalize("NFC", text.lower()).translate(_NORMAL)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def exact_match(answer: str, references: str | Sequence[str]) -> float:
    """1 if the answer is one of the references, both normalised; else 0."""
    given = normalise_answer(answer)
    return _best(references, lambda reference: float(given == normalise_answer(reference)))


def token_f1(answer: str, references: str | Sequence[str]) -> float:
    """The harmonic mean of the precision and recall of the answer's words, counted with repetition; the best over the
    references. As in SQuAD 1.1, 0 where either has no word. Scripts without spaces count by character."""
    given = _tokens(answer)
    return _best(references, lambda reference: _f1(_shared(given, _tokens(reference)), given, _tokens(reference)))


def contains(answer: str, references: str | Sequence[str]) -> float:
    """1 if the words of a reference stand in the answer, in a row; else 0. "cat" is not in "concatenate".

    Long answers contain much: read it beside exact match or F1.
    """
    given = _tokens(answer)

    def within(reference: str) -> float:
        wanted = _tokens(reference)
        if not wanted:
            return float(not given)
        return float(any(given[i : i + len(wanted)] == wanted for i in range(len(given) - len(wanted) + 1)))

    return _best(references, within)


def rouge(answer: str, reference: str, kind: Rouge = "rougeL") -> float:
    """The F1 of shared words (rouge1), pairs of words (rouge2) or the longest common subsequence (rougeL); Lin 2004.

    Words are runs of letters and digits in lower case, without stemming: for ASCII the same figure as the package
    rouge-score. That one drops all other letters; here they count as words of their scripts.
    Raises UnknownName for another kind.
    """
    given, wanted = _rouge_tokens(answer), _rouge_tokens(reference)
    if kind == "rougeL":
        return _f1(_common_subsequence(given, wanted), given, wanted)
    if kind not in ("rouge1", "rouge2"):
        raise UnknownName("kind of ROUGE", kind, ("rouge1", "rouge2", "rougeL"))
    n = int(kind[-1])
    grams = _grams(given, n), _grams(wanted, n)
    return _f1(_shared(*grams), *grams)


def bleu(answers: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """BLEU of a corpus, 0 to 100: clipped precision of runs of 1 to 4 words, punished for brevity (Papineni 2002).

    references: those of each answer. The figure of sacrebleu's default (13a tokens, exponential smoothing, case kept;
    Post 2018, arXiv 1804.08771). Raises DataError where there is nothing to score, UsageError for unequal lengths.
    """
    if len(answers) != len(references):
        raise UsageError(f"{len(answers)} answers and references for {len(references)}")
    if not answers:
        raise DataError("there is no answer to score")
    return bleu_of_counts(np.stack([bleu_counts(*pair) for pair in zip(answers, references, strict=True)]))


def bleu_counts(answer: str, references: str | Sequence[str]) -> BleuCounts:
    """[10] what BLEU needs of one answer: its length, that of the reference nearest in length, shared runs of 1 to 4
    words, runs in the answer. Rows of these are the items to resample for an interval around BLEU."""
    given = _tokens_13a(answer)
    wanted = [_tokens_13a(reference) for reference in _listed(references)]
    nearest = min((len(tokens) for tokens in wanted), key=lambda length: (abs(length - len(given)), length))
    shared, total = [], []
    for n in range(1, BLEU_ORDER + 1):
        most: Counter[tuple[str, ...]] = Counter()
        for tokens in wanted:
            most |= Counter(_grams(tokens, n))
        own = Counter(_grams(given, n))
        shared.append((own & most).total())
        total.append(own.total())
    return np.array([len(given), nearest, *shared, *total], np.int64)


def bleu_of_counts(counts_NS: BleuCounts) -> float:
    """BLEU of the answers whose `bleu_counts` are the rows."""
    own, nearest, *runs = counts_NS.sum(0).tolist()
    shared, total = runs[:BLEU_ORDER], runs[BLEU_ORDER:]
    if not any(shared) or not all(total):
        return 0.0
    halving, logs = 1.0, 0.0
    for hits, places in zip(shared, total, strict=True):
        if not hits:
            halving *= 2  # each order without a match counts half as much as the one before
        logs += log(hits / places if hits else 1 / (halving * places))
    return 100 * min(1.0, exp(1 - nearest / own)) * exp(logs / BLEU_ORDER)


def perplexity(nats: float, tokens: int) -> float:
    """e to the mean cross-entropy of a token. Comparable only between models of one tokeniser: else use bits per byte.

    nats: summed over the tokens. Raises UsageError where there is no token.
    """
    if tokens < 1:
        raise UsageError("there is no token to measure")
    mean = nats / tokens
    return exp(mean) if mean < 709 else inf  # beyond the range of a double


def _listed(references: str | Sequence[str]) -> Sequence[str]:
    listed = [references] if isinstance(references, str) else references
    if not listed:
        raise DataError("an item has no reference", remedy="give it one, or leave it out")
    return listed


def _best(references: str | Sequence[str], score: Callable[[str], float]) -> float:
    return max(score(reference) for reference in _listed(references))


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    for token in normalise_answer(text).split():
        tokens += [token] if token.isascii() else words(token) or [token]
    return tokens


def _rouge_tokens(text: str) -> list[str]:
    return words(text.replace("_", " "))


def _tokens_13a(text: str) -> list[str]:
    line = text.rstrip().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for escaped, character in _UNESCAPED:
        line = line.replace(escaped, character)
    line = f" {line} "
    for pattern, replacement in _SPLITS_13A:
        line = pattern.sub(replacement, line)
    return line.split()


def _grams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return list(zip(*(tokens[i:] for i in range(n)), strict=False))


def _shared(given: Sequence[object], wanted: Sequence[object]) -> int:
    return (Counter(given) & Counter(wanted)).total()


def _f1(shared: int, given: Sequence[object], wanted: Sequence[object]) -> float:
    return 2 * shared / (len(given) + len(wanted)) if shared else 0.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    # The length of the longest one, by rows of bits (Hyyrö 2004): a column of the usual table is one integer.
    places: dict[str, int] = {}
    for place, token in enumerate(one):
        places[token] = places.get(token, 0) | 1 << place
    full = (1 << len(one)) - 1
    row = full
    for token in other:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(one) - row.bit_count()
