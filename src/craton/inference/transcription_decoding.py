"""Writing the text of windows of sound: greedy, by sampling or by beam search, many windows at a time.

Every window is a search over hypotheses, each of which has a slot of the cache. A step gives all live hypotheses of all
windows one more token in one pass of the decoder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from craton.modalities.audio import SpeechTokens
from craton.models import Seq2Seq
from craton.trunk import Context, KVCache

FIRST_TIME_SECONDS = 1.0  # a window's first text begins by then
# Of weights that a step reads, for each thread that is worth its while: a small decoder's step is so short that threads
# wait for each other, and on a machine with other work they wait thirty times as long as they compute (docs/log.md).
BYTES_PER_THREAD = 64 << 20


class Job(NamedTuple):
    """One window to be written. context: its number in the `Context`. prompt: ids up to where the text begins. name:
    what its draws depend on beside the seed."""

    context: int
    prompt: Sequence[int]
    name: str


@dataclass(frozen=True)
class Written:
    """The text of a window, times among its tokens. mean_logprob: of its tokens, the end included."""

    tokens: list[int]
    mean_logprob: float
    no_speech: float
    temperature: float


@dataclass
class Hypothesis:
    """A text so far. logprob: the sum over its tokens."""

    tokens: list[int]
    logprob: float
    slot: int

    @property
    def rank(self) -> float:
        """The mean log-probability."""
        return self.logprob / max(1, len(self.tokens))


class TextDecoder:
    """Decodes with one model; its cache serves every call."""

    def __init__(self, module: Seq2Seq, tokens: SpeechTokens, dtype: torch.dtype) -> None:
        self.module, self.tokens = module, tokens
        self.limit = module.config.context // 2  # tokens of one window
        self._cache = KVCache(module.config.decoder, dtype=dtype)
        vocab = module.config.vocab
        self._times = slice(tokens.first_time, vocab)
        self._banned_V = torch.zeros(vocab)
        self._banned_V[[i for i in (*tokens.suppressed, tokens.no_times) if i < vocab]] = -torch.inf
        self._banned_first = [i for i in tokens.suppressed_first if i < vocab]
        decoder = module.config.decoder
        numbers = module.config.vocab * decoder.width + 12 * decoder.width**2 * len(decoder.layers)
        self._threads = max(1, numbers * dtype.itemsize // BYTES_PER_THREAD)

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Inside, torch computes with as many threads as a step of this decoder is worth, and no more than before."""
        before = torch.get_num_threads()
        torch.set_num_threads(min(before, self._threads))
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def write(
        self, context: Context, jobs: Sequence[Job], *, temperature: float, width: int, seed: int
    ) -> list[Written]:
        """The text of each job. width: hypotheses of a beam (temperature 0), or texts that are drawn of which the
        likeliest is given."""
        searches = [
            Search(job, range(i * width, (i + 1) * width), temperature, seed, self.tokens.end)
            for i, job in enumerate(jobs)
        ]
        logits_BV, no_speech = self._read(context, searches, len(jobs) * width)
        rows = [search.live[0] for search in searches]
        for _ in range(self.limit):
            self._forbid(logits_BV, rows)
            sums_B = logits_BV.logsumexp(-1)
            sizes = [len(search.live) for search in searches if not search.ended]
            live = [search for search in searches if not search.ended]
            parts = zip(live, logits_BV.split(sizes), sums_B.split(sizes), strict=True)
            for search, logits_nV, sums_n in parts:
                search.step(logits_nV, sums_n, self._cache)
            rows = [row for search in searches if not search.ended for row in search.live]
            if not rows:
                break
            logits_BV = self._next(context, searches)
        best = [search.best() for search in searches]
        return [
            Written(text.tokens, text.logprob / (len(text.tokens) + 1), quiet, temperature)
            for text, quiet in zip(best, no_speech, strict=True)
        ]

    @torch.inference_mode()
    def detect_language(self, context: Context, contexts: Sequence[int]) -> list[str]:
        """The likeliest language of each of these windows."""
        jobs = [Job(number, [self.tokens.start], "") for number in contexts]
        searches = [Search(job, range(i, i + 1), 0.0, 0, self.tokens.end) for i, job in enumerate(jobs)]
        logits_BV, _ = self._read(context, searches, len(jobs))
        ids = list(self.tokens.languages.values())
        return [self.tokens.language_of[ids[i]] for i in logits_BV[:, ids].argmax(-1).tolist()]

    def _read(self, context: Context, searches: Sequence[Search], slots: int) -> tuple[Tensor, list[float]]:
        """Read all prompts: the logits [B, V] after each, and how likely each window holds no speech."""
        cache, prompts = self._cache, [list(search.job.prompt) for search in searches]
        cache.reserve_slots(slots)
        for slot in range(slots):
            cache.truncate(slot, 0)
        ids_T = torch.tensor([i for prompt in prompts for i in prompt])
        positions_T = torch.cat([torch.arange(len(prompt)) for prompt in prompts])
        sizes = torch.tensor([len(prompt) for prompt in prompts])
        segments_T = torch.tensor([search.live[0].slot for search in searches]).repeat_interleave(sizes)
        numbers = [search.job.context for search in searches for _ in search.job.prompt]
        hidden_TD = self.module.hidden(ids_T, positions_T, segments_T, context.view(numbers), cache)
        ends_B = sizes.cumsum(0) - 1
        starts = [len(prompt) - 1 - prompt[::-1].index(self.tokens.start) for prompt in prompts]
        starts_B = ends_B - sizes + 1 + torch.tensor(starts)
        logits_BV = self.module.logits(hidden_TD[ends_B]).float()
        at_start_BV = logits_BV if bool((starts_B == ends_B).all()) else self.module.logits(hidden_TD[starts_B]).float()
        quiet_B = (at_start_BV[:, self.tokens.no_speech] - at_start_BV.logsumexp(-1)).exp()
        return logits_BV, quiet_B.tolist()

    def _next(self, context: Context, searches: Sequence[Search]) -> Tensor:
        rows = [(search.job, row) for search in searches if not search.ended for row in search.live]
        ids_T = torch.tensor([row.tokens[-1] for _, row in rows])
        positions_T = torch.tensor([len(job.prompt) + len(row.tokens) - 1 for job, row in rows])
        segments_T = torch.tensor([row.slot for _, row in rows])
        view = context.view([job.context for job, _ in rows])
        return self.module.logits(self.module.hidden(ids_T, positions_T, segments_T, view, self._cache)).float()

    def _forbid(self, logits_BV: Tensor, rows: Sequence[Hypothesis]) -> None:
        """Set to -inf what may not come next (section 4.5): control tokens; times that do not come in pairs, or go
        back. Where a time is likelier than any one text token, it is a time."""
        first, vocab = self.tokens.first_time, logits_BV.shape[1]
        end = self.tokens.end
        logits_BV += self._banned_V
        for logits_V, row in zip(logits_BV, rows, strict=True):
            tokens = row.tokens
            if not tokens:
                logits_V[self._banned_first] = -torch.inf
                logits_V[:first] = -torch.inf
                logits_V[first + round(FIRST_TIME_SECONDS / 0.02) + 1 :] = -torch.inf
                continue
            after_time = tokens[-1] >= first
            after_pair = after_time and (len(tokens) < 2 or tokens[-2] >= first)
            if after_pair:
                logits_V[first:] = -torch.inf
            elif after_time:
                # A time that ends a piece of text: the next one begins here, or the text is over.
                logits_V[:end] = -torch.inf
                logits_V[end + 1 : first] = -torch.inf
            last = max((t for t in tokens if t >= first), default=None)
            if last is not None:
                # A piece of text is never of no length; the next one may begin where it ends.
                logits_V[first : min(vocab, last if after_time and not after_pair else last + 1)] = -torch.inf
        likely_B = logits_BV[:, first:].logsumexp(-1) > logits_BV[:, :first].amax(-1)
        for logits_V, likely in zip(logits_BV, likely_B.tolist(), strict=True):
            if likely:
                logits_V[:first] = -torch.inf


@dataclass
class Search:
    """The hypotheses of one window."""

    job: Job
    slots: range
    temperature: float
    seed: int
    end: int
    live: list[Hypothesis] = field(init=False)
    done: list[Hypothesis] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.live = [Hypothesis([], 0.0, self.slots[0])]
        digest = hashlib.sha256(f"{self.seed}:{self.job.name}:{self.temperature}".encode()).digest()
        self._dice = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    @property
    def ended(self) -> bool:
        """Whether nothing is left to be followed."""
        return not self.live or len(self.done) >= len(self.slots)

    def step(self, logits_nV: Tensor, sums_n: Tensor, cache: KVCache) -> None:
        """Give every live hypothesis its next token."""
        children: list[tuple[int, list[int], float]] = []
        for parent, token, logprob in self._candidates(logits_nV, sums_n):
            if len(children) == len(self.slots):
                break
            old = self.live[parent]
            if token == self.end:
                self.done.append(Hypothesis(old.tokens, logprob, old.slot))
            else:
                children.append((parent, [*old.tokens, token], logprob))
        # The first child goes on in its parent's slot, the others in a copy; slots without children are free.
        kept = {self.live[parent].slot for parent, _, _ in children}
        free = [slot for slot in self.slots if slot not in kept]
        live = []
        for parent, tokens, logprob in children:
            slot = self.live[parent].slot
            if slot in kept:
                kept.remove(slot)
            else:
                source, slot = slot, free.pop()
                cache.truncate(slot, 0)
                cache.copy(source, slot)
            live.append(Hypothesis(tokens, logprob, slot))
        self.live = sorted(live, key=lambda row: row.slot)

    def best(self) -> Hypothesis:
        """The likeliest text; one that was cut off counts only where too few have ended."""
        missing = max(0, len(self.slots) - len(self.done)) if self.temperature == 0 or not self.done else 0
        rest = sorted(self.live, key=lambda row: -row.logprob)[:missing]
        return max((*self.done, *rest), key=lambda row: row.rank)

    def _candidates(self, logits_nV: Tensor, sums_n: Tensor) -> list[tuple[int, int, float]]:
        # (parent, token, log-probability of the text with it), the likeliest first where they compete.
        totals = [row.logprob for row in self.live]
        if self.temperature > 0:
            rows = [0] * len(self.slots) if not self.live[0].tokens else list(range(len(self.live)))
            # By the inverse of the distribution function: torch's multinomial draws a number for every token.
            sums_nV = (logits_nV / self.temperature).softmax(-1, dtype=torch.float64).cumsum(-1)[rows]
            at_n1 = torch.rand(len(rows), 1, generator=self._dice, dtype=torch.float64) * sums_nV[:, -1:]
            chosen = torch.searchsorted(sums_nV, at_n1, right=True)[:, 0]
            gained = (logits_nV[rows, chosen] - sums_n[rows]).tolist()
            return [(i, t, totals[i] + g) for i, t, g in zip(rows, chosen.tolist(), gained, strict=True)]
        wide = len(self.slots)
        if wide == 1:
            value, index = logits_nV[0].max(-1)
            return [(0, int(index), totals[0] + float(value - sums_n[0]))]
        values, indices = logits_nV.topk(wide + 1)
        gained_nk = (values - sums_n[:, None]).tolist()
        found = [
            (i, token, totals[i] + gain)
            for i, (tokens, gains) in enumerate(zip(indices.tolist(), gained_nk, strict=True))
            for token, gain in zip(tokens, gains, strict=True)
        ]
        return sorted(found, key=lambda candidate: -candidate[2])
