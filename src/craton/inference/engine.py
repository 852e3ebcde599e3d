"""The one engine: requests in, token streams out. A step is: schedule, run, settle."""

from __future__ import annotations

import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from craton.errors import ContextOverflow, CratonError, UsageError
from craton.inference.constraints import Constraint, make_constraint
from craton.inference.drafting import Asked, Drafter
from craton.inference.linears import EXACT_ROWS
from craton.inference.native import has_tiles
from craton.inference.native.step import NativeStep, build
from craton.inference.output import TextOutput
from craton.inference.sampling import Sampler, log_probabilities
from craton.inference.settings import SamplingSettings
from craton.inference.speculation import Pace
from craton.inference.streaming import StreamWindow, slide
from craton.modalities.text import Tokenizer
from craton.models import CausalLM
from craton.trunk import KVCache, TrunkConfig

FinishReason = Literal["stop", "length", "cancelled"]

# Prompts are read in pieces of this many tokens, cut at fixed places: running answers go on between two pieces, and
# the arithmetic of a prompt does not depend on what else runs. Smaller pieces spare attention more of the keys that a
# query may not see; torch's products and a matrix unit want larger ones than the vector kernels do.
PREFILL_CHUNK, VECTOR_PREFILL_CHUNK = 256, 128

# Where the linear layers run on the native kernels' own threads, torch has little left to do up to this context, and
# its second thread, spinning between two operations, only takes the place of the kernels' threads.
SERIAL_CONTEXT = 2048


@dataclass
class Request:
    """A tokenised prompt and how to continue it. `choice` numbers the answers where several are asked for: each
    draws with its own seed, so that they differ."""

    prompt: list[int]
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    choice: int = 0


@dataclass(frozen=True)
class Token:
    """One generated token: its id, the text that it completed (often empty), and log-probabilities where asked for."""

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class Generation:
    """The answer to one request. Iterate it for its tokens as they come; iterating drives the engine.

    Where its form (see `constraints`) proves impossible to follow, the answer is cancelled and whoever waits for it
    gets the `error`.
    """

    def __init__(self, engine: Engine, request: Request, seed: int, constraint: Constraint | None = None) -> None:
        self.request, self.seed = request, seed
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self.error: CratonError | None = None
        self.submitted_at = time.perf_counter()
        self.first_token_at = self.ended_at = 0.0
        self.cached_tokens = 0  # prompt tokens found in the cache
        self.drafted_tokens = self.accepted_tokens = 0  # guesses at the answer, and those that were right
        self.ids = list(request.prompt)
        self.seen = self.ids if engine.stream is None else list(request.prompt)  # what a stream window has not dropped
        self._engine = engine
        self._sampler = Sampler(request.settings, request.prompt, seed)
        self._constraint = constraint
        self._output = TextOutput(engine.tokenizer, request.settings.stop)
        self._slot: int | None = None
        self._done = 0  # seen ids whose keys and values are in the cache
        self._draft: list[int] = []  # guesses at what follows, read behind the last id
        self._pace = Pace()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(token.text for token in self.tokens)

    def __iter__(self) -> Iterator[Token]:
        given = 0
        while True:
            while given < len(self.tokens):
                yield self.tokens[given]
                given += 1
            if self.error is not None:
                raise self.error
            if self.finish_reason is not None:
                return
            self._engine.step()

    def wait(self) -> Generation:
        """Run the engine until this answer is complete."""
        while self.finish_reason is None:
            self._engine.step()
        if self.error is not None:
            raise self.error
        return self

    def cancel(self) -> None:
        """Stop here; the engine forgets the request before its next step."""
        if self.finish_reason is None:
            self.finish_reason, self.ended_at = "cancelled", time.perf_counter()

    def accept(self, logits_V: Tensor) -> None:
        """Choose the next token from fp32 logits and decide whether the answer ends with it."""
        settings = self.request.settings
        try:
            token, complete = self._choose(logits_V)
        except CratonError as error:  # this answer's alone: the others of the batch go on
            self.error = error
            self.cancel()
            return
        now = time.perf_counter()
        self.first_token_at = self.first_token_at or now
        logprob, top = None, None
        if settings.logprobs is not None:
            logprob, top = log_probabilities(logits_V, token, settings.logprobs)
        self.ids.append(token)
        if self.seen is not self.ids:
            self.seen.append(token)
        ended = token in self._engine.tokenizer.eos_ids
        text = self._output.finish() if ended else self._output.push(token)
        if ended or self._output.stopped:
            self.finish_reason = "stop"
        elif complete:
            self.finish_reason = "stop"
            text += self._output.finish()
        elif len(self.tokens) + 1 >= self._engine.room(self.request):
            self.finish_reason = "length"
            text += self._output.finish()
        if not ended:
            self.tokens.append(Token(token, text, logprob, top))
        elif text:
            # What was held back as the beginning of a stop string belongs to the last token.
            last = self.tokens[-1]
            self.tokens[-1] = Token(last.id, last.text + text, last.logprob, last.top_logprobs)
        if self.finish_reason is not None:
            self.ended_at = now

    def accept_rows(self, logits_RV: Tensor) -> None:
        """Choose a token from the first row, and from each next one while the one chosen was guessed right."""
        accepted = 0
        for logits_V, guess in zip(logits_RV, [*self._draft, None], strict=True):
            self.accept(logits_V)
            if self.finish_reason is not None or self.ids[-1] != guess:
                break
            accepted += 1
        self.drafted_tokens += len(self._draft)
        self.accepted_tokens += accepted
        self._pace.settle(len(self._draft), accepted)
        self._done = len(self.seen) - 1  # behind them the cache holds the wrong guesses

    @property
    def readable(self) -> list[int]:
        """What the slot holds and another text may share: of a window that has moved, nothing, because what it keeps
        was read behind what it dropped."""
        return self.seen[: self._done] if len(self.seen) == len(self.ids) else []

    def _choose(self, logits_V: Tensor) -> tuple[int, bool]:
        """The next token, and whether the answer's form is complete with it."""
        if self._constraint is None:
            return self._sampler(logits_V), False
        token = self._sampler(self._constraint.mask(logits_V))
        if token in self._engine.tokenizer.eos_ids:
            return token, True
        self._constraint.accept(token)
        return token, self._constraint.finished


class Engine:
    """Continuous batching over a slotted key-value cache.

    Each step takes one token of every answer that is being written and a piece of every prompt that is being read. A
    slot keeps what it holds when its answer ends, so a conversation's next turn reads only what is new.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype,
        slots: int = 8,
        native_threads: int | None = None,
        drafter: Drafter | None = None,
        stream: StreamWindow | None = None,
    ) -> None:
        """dtype: of the activations and the cache. slots: how many requests run at once. native_threads: set where the
        linear layers run on the native kernels' own threads; torch then gets more than one only for large steps.
        drafter: guesses at what answers say next, for fewer passes (see `speculation`). stream: answers may be of any
        length, and see only what it says. Raises UsageError for a model that cannot stream."""
        if stream is not None:
            stream.check(model.config.trunk, model.config.context)
        self._drafter, self.stream = drafter, stream
        self.model, self.tokenizer, self._native_threads = model, tokenizer, native_threads
        self.context = model.config.context
        # One call for a whole step, over keys and values of half the bytes (see docs/speed.md).
        self._step: NativeStep | None = build(model)[0] if native_threads is not None else None
        self._chunk = PREFILL_CHUNK if native_threads is None or has_tiles() else VECTOR_PREFILL_CHUNK
        self.cache = KVCache(model.config.trunk, dtype=dtype if self._step is None else torch.float16)
        self._slots = slots
        self._stretch_at = stretch_at(model.config.trunk)
        self._waiting: deque[Generation] = deque()
        self._running: list[Generation] = []
        self._held: dict[int, list[int]] = {}  # slot -> the ids whose keys and values it holds

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises ContextOverflow if prompt and answer do not fit, UsageError for bad ids or a form that none can follow.
        """
        settings = request.settings
        vocab = self.model.config.vocab
        if not request.prompt:
            raise UsageError("the prompt is empty", remedy="give at least one token")
        bad = [i for i in (*request.prompt, *settings.logit_bias) if not 0 <= i < vocab]
        if bad:
            raise UsageError(f"token id {bad[0]} is not in the vocabulary (0 to {vocab - 1})")
        over = len(request.prompt) + (settings.max_tokens or 1) - self.context
        if over > 0 and self.stream is None:
            asked = f" and {settings.max_tokens} for the answer" if settings.max_tokens else " and one for the answer"
            raise ContextOverflow(
                f"{len(request.prompt)} tokens of prompt{asked} are {over} more than the context of {self.context}",
                remedy="shorten the prompt, ask for fewer tokens or choose a model with a longer context",
            )
        seed = secrets.randbits(63) if settings.seed is None else (settings.seed + request.choice) % 2**63
        generation = Generation(self, request, seed, make_constraint(settings, self.tokenizer))
        self._waiting.append(generation)
        return generation

    def room(self, request: Request) -> int:
        """How many tokens the answer to this request may have."""
        if self.stream is not None:
            return request.settings.max_tokens or sys.maxsize
        left = self.context - len(request.prompt)
        return min(left, request.settings.max_tokens or left)

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every running request by one token or one piece of its prompt."""
        batch = self._schedule()
        self._settle(self._run(batch))

    def _schedule(self) -> list[Generation]:
        self._retire()
        while self._waiting and len(self._running) < self._slots:
            generation = self._waiting[0]
            if generation.finish_reason is None and self._being_read(generation.request.prompt):
                break  # its prompt will be in the cache after the next step
            self._waiting.popleft()
            if generation.finish_reason is None:
                self._admit(generation)
        return sorted(self._running, key=lambda g: g._slot or 0)

    def _retire(self) -> None:
        for generation in [g for g in self._running if g.finish_reason is not None]:
            assert generation._slot is not None
            # What an interrupted step had not finished writing does not count.
            self._held[generation._slot] = generation.readable[: self.cache.lengths[generation._slot]]
            self._running.remove(generation)

    def _being_read(self, prompt: list[int]) -> bool:
        return any(g.request.prompt == prompt and not g.first_token_at for g in self._running)

    def _admit(self, generation: Generation) -> None:
        # The cache of the slot that shares the longest beginning is taken over if it is free and copied if it is not.
        # At least the last token is read again: its logits choose the first token of the answer.
        taken = {g._slot: g.readable for g in self._running}
        free = [s for s in range(max(len(self.cache.lengths), len(self._running) + 1)) if s not in taken]
        prompt, limit = generation.request.prompt, len(generation.request.prompt) - 1
        alike = {s: ids for s, ids in (self._held | taken).items() if self._stretched(ids) == self._stretched(prompt)}
        shared = {slot: min(common_length(ids, prompt), limit) for slot, ids in alike.items()}
        donor = max(shared, key=lambda s: (shared[s], s in free), default=None)
        slot = donor if donor in free and shared[donor] else min(free, key=lambda s: (len(self._held.get(s, ())), s))
        assert slot is not None
        self.cache.reserve_slots(slot + 1)
        start = 0
        if donor is not None and shared[donor]:
            start = shared[donor]
            if donor != slot:
                self.cache.copy(donor, slot)
        self.cache.truncate(slot, start)
        self.cache.expected[slot] = len(prompt) if self.stream is None else 0
        self._held.pop(slot, None)
        generation._slot, generation._done, generation.cached_tokens = slot, start, start
        self._running.append(generation)

    def _stretched(self, ids: list[int]) -> bool:
        return self._stretch_at is not None and len(ids) > self._stretch_at

    def _run(self, batch: list[Generation]) -> list[tuple[Generation, Tensor]]:
        # The tokens of answers go through the model together, a piece of a prompt alone: so what a sequence's numbers
        # are never depends on its company, even where a kernel chooses its arithmetic by the number of rows.
        for generation in batch:
            # A step that was interrupted before it chose a token left nothing to read: its last token is read again.
            generation._done = min(generation._done, len(generation.seen) - 1)
            generation._draft = []
            if self.stream is not None:
                self._slide(generation, self.stream)
        writing = [g for g in batch if g.tokens and len(g.seen) - g._done == 1]
        reading = [g for g in batch if g not in writing]
        if self._drafter is not None and writing:
            self._guess(writing, self._drafter)
        passes = ([writing] if writing else []) + [[g] for g in reading]
        return [pair for group in passes for pair in self._forward(group)]

    def _guess(self, writing: list[Generation], drafter: Drafter) -> None:
        asked = []
        for generation in writing:
            assert generation._slot is not None
            left = self.room(generation.request) - len(generation.tokens) - 1
            if self._stretch_at is not None and len(generation.ids) <= self._stretch_at:
                left = min(left, self._stretch_at - len(generation.ids))  # one pass has one set of frequencies
            if self.stream is not None:
                left = min(left, self.stream.size - len(generation.seen))
            rows = EXACT_ROWS // len(writing) - 1
            most = min(generation._pace.length(len(writing), drafter.price), left, rows)
            asked.append(Asked(generation._slot, generation.seen, max(0, most)))
        for generation, draft in zip(writing, drafter.propose(asked), strict=True):
            generation._draft = draft

    def _slide(self, generation: Generation, stream: StreamWindow) -> None:
        """Make room in the window for what is read next."""
        assert generation._slot is not None
        # A step or a move that was interrupted may have left another number: fewer are read again.
        generation._done = done = min(generation._done, self.cache.lengths[generation._slot])
        if done + min(len(generation.seen) - done, stream.block) > stream.size:
            self.cache.truncate(generation._slot, done)
            length = slide(self.cache, self.model.config.trunk, generation._slot, stream.sinks, stream.block)
            del generation.seen[stream.sinks : stream.sinks + stream.block]
            self.cache.lengths[generation._slot] = generation._done = length

    def _forward(self, group: list[Generation]) -> list[tuple[Generation, Tensor]]:
        """Read the next piece of each one's ids and the guesses behind the last; gives the logits [R, V] that follow
        that last id and each guess."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        last_rows: list[int] = []
        ends: list[int] = []
        for generation in group:
            assert generation._slot is not None
            self.cache.truncate(generation._slot, generation._done)  # an interrupted step may have left more
            end = min(len(generation.seen), (generation._done // self._chunk + 1) * self._chunk)
            if self.stream is not None:
                end = min(end, generation._done + self.stream.block)
            new = generation.seen[generation._done : end] + generation._draft
            ids += new
            positions += range(generation._done, generation._done + len(new))
            segments += [generation._slot] * len(new)
            ends.append(end)
            last_rows.append(len(ids) - 1 - len(generation._draft))
        if self._native_threads is not None:
            torch.set_num_threads(1 if max(positions) < SERIAL_CONTEXT else self._native_threads)
        complete = [(row, g) for row, g, end in zip(last_rows, group, ends, strict=True) if end == len(g.seen)]
        rows = [row + i for row, generation in complete for i in range(1 + len(generation._draft))]
        logits_RV = None
        prompt = not group[0].tokens
        if self._step is not None and (not prompt or has_tiles() or len(rows) == len(ids)):
            # A prompt's numbers are bfloat16 to its last token: they do not depend on where its pieces end.
            parts = 0 if prompt and has_tiles() else None
            threads = self._native_threads or 1
            logits_RV = self._step(ids, positions, segments, self.cache, threads, parts=parts, logits=len(rows))
        else:
            hidden_TD = self.model.hidden(
                torch.tensor(ids), torch.tensor(positions), torch.tensor(segments), self.cache
            )
        for generation, end in zip(group, ends, strict=True):
            generation._done = end
        if not complete:
            return []
        if logits_RV is None:
            logits_RV = self.model.logits(hidden_TD[rows]).float()
        parts = logits_RV.split([1 + len(generation._draft) for _, generation in complete])
        return [(generation, part_RV) for (_, generation), part_RV in zip(complete, parts, strict=True)]

    def _settle(self, results: list[tuple[Generation, Tensor]]) -> None:
        for generation, logits_RV in results:
            generation.accept_rows(logits_RV)
            if self._stretch_at is not None and len(generation.ids) == self._stretch_at + 1:
                # LongRoPE rotates every key of a longer sequence otherwise: it is read again, once.
                assert generation._slot is not None
                generation._done, self.cache.expected[generation._slot] = 0, len(generation.ids)


def stretch_at(config: TrunkConfig) -> int | None:
    """The length beyond which LongRoPE changes its frequencies; None for models without it."""
    rotaries = (layer.attention.rotary for layer in config.layers)
    scalings = (rotary.scaling for rotary in rotaries if rotary is not None)
    return next((s.original_context for s in scalings if s is not None and s.kind == "longrope"), None)


def common_length(a: Sequence[object], b: Sequence[object]) -> int:
    """How many items at their beginning two sequences share."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
