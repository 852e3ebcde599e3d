"""The one engine: requests in, token streams out. A step is: schedule, run, settle."""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from craton.errors import ContextOverflow, CratonError, DeadlineExceeded, UsageError
from craton.inference.constraints import Constraint, make_constraint
from craton.inference.drafting import Asked, Drafter
from craton.inference.linears import EXACT_ROWS
from craton.inference.memory import default_cache_bytes
from craton.inference.native import has_tiles
from craton.inference.native.step import NativeStep, build
from craton.inference.output import TextOutput
from craton.inference.pictures import PromptPicture, Sight
from craton.inference.prefix_store import BLOCK, Kind
from craton.inference.sampling import Sampler, log_probabilities
from craton.inference.scheduling import STEP_COPIES, Line, next_pieces
from craton.inference.settings import KV, SamplingSettings
from craton.inference.slots import Slots, blocks_of, common_length
from craton.inference.speculation import MOST, Pace
from craton.inference.streaming import StreamWindow, slide
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, ImageChat
from craton.trunk import KVCache, TrunkConfig

FinishReason = Literal["stop", "length", "cancelled"]

# Prompts are read in pieces of this many tokens, cut at fixed places: running answers go on between two pieces, and
# the arithmetic of a prompt does not depend on what else runs. Smaller pieces spare attention more of the keys that a
# query may not see; torch's products and a matrix unit want larger ones than the vector kernels do.
PREFILL_CHUNK, VECTOR_PREFILL_CHUNK = 256, 128

# Where the linear layers run on the native kernels' own threads, torch has little left to do up to this context, and
# its second thread, spinning between two operations, only takes the place of the kernels' threads.
SERIAL_CONTEXT = 2048

# How a forced text is written depends on the tokens before it, but not on those so far back.
FORCED_CONTEXT = 32


@dataclass
class Request:
    """A tokenised prompt and how to continue it.

    choice: numbers the answers where several are asked for: each draws with its own seed, so that they differ. salt:
    requests of different salts share nothing of what was read. priority: the higher goes first, and may take the place
    of a lower one that runs, which later goes on where it was. deadline: in `time.monotonic()`'s seconds; from then on
    the answer ends with DeadlineExceeded. pictures: stand where the prompt has the image token (see `pictures`).
    """

    prompt: list[int]
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    choice: int = 0
    salt: str = ""
    priority: int = 0
    deadline: float | None = None
    pictures: Sequence[PromptPicture] = ()


@dataclass(frozen=True)
class Token:
    """One generated token: its id, the text that it completed (often empty), and log-probabilities where asked for."""

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None


class Generation:
    """The answer to one request. Iterate it for its tokens as they come; iterating drives the engine.

    Where its form (see `constraints`) proves impossible to follow, or its deadline has passed, the answer is cancelled
    and whoever waits for it gets the `error`.
    """

    def __init__(
        self, engine: Engine, request: Request, seed: int, number: int, constraint: Constraint | None = None
    ) -> None:
        """number: how many requests came before it."""
        self.request, self.seed, self.rank = request, seed, (-request.priority, number)
        self.tokens: list[Token] = []
        self.finish_reason: FinishReason | None = None
        self.error: CratonError | None = None
        self.submitted_at = time.perf_counter()
        self.first_token_at = self.ended_at = 0.0
        self.cached_tokens = 0  # prompt tokens found in the cache
        self.drafted_tokens = self.accepted_tokens = 0  # guesses at the answer, and those that were right
        self.ids = list(request.prompt)
        self.seen = self.ids if engine.stream is None else list(request.prompt)  # what a stream window has not dropped
        self.sight = Sight(request.pictures)
        self._engine = engine
        self._sampler = Sampler(request.settings, request.prompt, seed)
        self._constraint = constraint
        self._output = TextOutput(engine.tokenizer, request.settings.stop)
        self._slot: int | None = None
        self._done = 0  # seen ids whose keys and values are in the cache
        self.last_read = -1  # the step that read its last piece
        self._draft: list[int] = []  # guesses at what follows, read behind the last id
        self._guess_pace, self._form_pace = Pace(), Pace()
        self._pace = self._guess_pace  # that of the draft

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
            self.fail(error)
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
        return [] if self._moved else self.sight.names(self.seen[: self._done])

    @property
    def kind(self) -> Kind:
        """With which texts it may share what is read."""
        return Kind(self.request.salt, self._engine.stretched(self.seen))

    @property
    def piece(self) -> int:
        """How many tokens it reads next, guesses not counted. A prompt is cut at fixed places."""
        if self._in_prompt:
            end = len(self.seen) if self._moved else len(self.request.prompt)
            chunk = self._engine._chunk
            end = min(end, (self._done // chunk + 1) * chunk)
        else:
            end = min(len(self.seen), self._done + EXACT_ROWS)
        stream = self._engine.stream
        return end - self._done if stream is None else min(end - self._done, stream.block)

    @property
    def writes(self) -> bool:
        """Whether what it reads next is the last token of its answer."""
        return not self._in_prompt and len(self.seen) - self._done == 1

    @property
    def _in_prompt(self) -> bool:
        # A prompt's tokens are read by other arithmetic than an answer's where the native kernels run, whatever was
        # found in the cache and however often a text is read.
        return not self.first_token_at if self._moved else self._done < len(self.request.prompt)

    @property
    def _moved(self) -> bool:
        return len(self.seen) != len(self.ids)

    def forced(self) -> list[int]:
        """Tokens that write what the form of the answer leaves no choice in: as the tokenizer writes the whole, if that
        begins with what was chosen, else as it writes this text alone. The last one is left out: it may reach into what
        is free, and where nothing is, the answer ends with it and it is never read."""
        text = self._constraint.forced if self._constraint is not None else ""
        if not text:
            return []
        tokenizer, written = self._engine.tokenizer, [token.id for token in self.tokens[-FORCED_CONTEXT:]]
        ids = tokenizer.encode(tokenizer.decode(written) + text, add_special_tokens=False)
        if ids[: len(written)] == written:
            return ids[len(written) : -1]
        return tokenizer.encode(text, add_special_tokens=False)[:-1]

    def fail(self, error: CratonError) -> None:
        """End with an error."""
        if self.finish_reason is None:
            self.error = error
            self.cancel()

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

    Each step takes one token of every answer that is being written and, beside them, some pieces of prompts in turn
    (see `scheduling`). What was read is not read again while the memory for it lasts (see `slots`): a conversation's
    next turn reads only what is new. Where memory or slots are short, the request of the lowest priority that came last
    gives up its slot, waits, reads again what is not stored any more, and goes on with the same tokens as if nothing
    had been.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        dtype: torch.dtype,
        slots: int = 8,
        cache_bytes: int | None = None,
        native_threads: int | None = None,
        drafter: Drafter | None = None,
        stream: StreamWindow | None = None,
        kv: KV = "auto",
    ) -> None:
        """dtype: of the activations and the cache. slots: how many requests run at once. cache_bytes: the memory for
        keys and values (none: see `memory`). native_threads: set where the linear layers run on the native kernels'
        own threads; torch then gets more than one only for large steps. drafter: guesses at what answers say next, for
        fewer passes (see `speculation`). stream: answers may be of any length, and see only what it says. kv: see
        `EngineSettings`. Raises UsageError for a model that cannot stream, and for a window that the memory does not
        hold."""
        if stream is not None:
            stream.check(model.config.trunk, model.config.context)
        self._drafter, self.stream = drafter, stream
        self.model, self.tokenizer, self._native_threads = model, tokenizer, native_threads
        self.context = model.config.context
        # One call for a whole step, over keys and values of half the bytes (see docs/speed.md).
        self._step: NativeStep | None = build(model)[0] if native_threads is not None else None
        self._chunk = PREFILL_CHUNK if native_threads is None or has_tiles() else VECTOR_PREFILL_CHUNK
        plain = dtype if self._step is None else torch.float16
        self.cache = KVCache(model.config.trunk, dtype=torch.int8 if kv == "int8" else plain)
        self._slots = Slots(self.cache, slots, default_cache_bytes() if cache_bytes is None else cache_bytes)
        if stream is not None and blocks_of(stream.size) > self._slots.total:
            raise UsageError(
                f"a window of {stream.size} tokens does not fit the {self._slots.total * BLOCK} for which there is "
                "memory",
                remedy="choose a smaller window or give more memory",
            )
        self._stretch_at = stretch_at(model.config.trunk)
        self._waiting: Line[Generation] = Line()
        self._running: list[Generation] = []
        self._submitted = self._steps = 0

    def submit(self, request: Request) -> Generation:
        """Queue a request.

        Raises ContextOverflow if prompt and answer do not fit the context or the memory, UsageError for bad ids or a
        form that none can follow.
        """
        settings = request.settings
        vocab = self.model.config.vocab
        if request.pictures and self.stream is not None:
            raise UsageError("a window that moves does not keep pictures", remedy="load the model without one")
        Sight(request.pictures).check(request.prompt, self.model)
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
        memory = self._slots.total * BLOCK
        longest = len(request.prompt) + (settings.max_tokens or 1)
        if longest > memory and self.stream is None:
            raise ContextOverflow(
                f"prompt and answer of {longest} tokens take {longest * self.cache.position_bytes / 2**20:.0f} MiB of "
                f"keys and values, and there is memory for {memory} tokens",
                remedy="shorten the prompt, ask for fewer tokens or give the engine more memory",
            )
        seed = secrets.randbits(63) if settings.seed is None else (settings.seed + request.choice) % 2**63
        constraint = make_constraint(settings, self.tokenizer)
        generation = Generation(self, request, seed, self._submitted, constraint)
        self._submitted += 1
        self._waiting.add(generation)
        return generation

    def room(self, request: Request) -> int:
        """How many tokens the answer to this request may have."""
        if self.stream is not None:
            return request.settings.max_tokens or sys.maxsize
        left = min(self.context, self._slots.total * BLOCK) - len(request.prompt)
        return min(left, request.settings.max_tokens or left)

    @torch.inference_mode()
    def step(self) -> None:
        """Advance every answer that is being written by a token or more, and some prompts by a piece."""
        batch = self._schedule()
        self._settle(self._run(batch))

    def check(self) -> None:
        """Raises RuntimeError if the engine has nothing to do and still holds what nobody accounts for."""
        self._retire()
        if self._running or len(self._waiting):
            raise RuntimeError(f"{len(self._running)} requests run and {len(self._waiting)} wait")
        self._slots.check()

    @property
    def used_bytes(self) -> int:
        """Memory that keys and values have been given."""
        return self._slots.used_bytes

    def stretched(self, ids: Sized) -> bool:
        """Whether LongRoPE rotates the keys of a text of this length by its long frequencies."""
        return self._stretch_at is not None and len(ids) > self._stretch_at

    def _schedule(self) -> list[Generation]:
        now = time.monotonic()
        for generation in (*self._running, *self._waiting):
            deadline = generation.request.deadline
            if deadline is not None and deadline <= now:
                generation.fail(DeadlineExceeded("the request's deadline has passed before its answer was complete"))
        self._retire()
        self._grow()
        self._admit()
        self._steps += 1
        for generation in self._running:
            # A step that was interrupted before it chose a token left nothing to read: its last token is read again.
            generation._done = min(generation._done, len(generation.seen) - 1)
            generation._draft = []
        writing = sorted((g for g in self._running if g.writes), key=lambda g: g._slot or 0)
        reading = [g for g in self._running if not g.writes]
        pieces = next_pieces(reading, len(writing))
        for generation in pieces:
            generation.last_read = self._steps
        return writing + pieces

    def _retire(self) -> None:
        for generation in [g for g in self._running if g.finish_reason is not None]:
            assert generation._slot is not None
            self._slots.leave(generation._slot)
            generation._slot = None
            self._running.remove(generation)
        for generation in self._waiting:
            if generation.finish_reason is not None:
                self._waiting.remove(generation)

    def _grow(self) -> None:
        for generation in sorted(self._running, key=_rank):
            while generation._slot is not None and not self._slots.grow(generation._slot, self._positions(generation)):
                self._preempt(max(self._running, key=_rank))

    def _admit(self) -> None:
        copied = 0
        for generation in self._waiting:
            if copied >= STEP_COPIES:
                break
            positions = self._positions(generation)
            lower = sorted((g for g in self._running if g.rank[0] > generation.rank[0] and not g._moved), key=_rank)
            if not self._slots.fits(positions, without={g._slot for g in lower}):
                break  # nobody of its rank or behind it goes before it
            if self._waits_for_a_reader(generation):
                continue  # what it shares with another's prompt will be in the cache in a few steps
            while not self._slots.fits(positions):
                self._preempt(lower.pop())
            self._start(generation, positions)
            self._waiting.remove(generation)
            copied += generation._done

    def _start(self, generation: Generation, positions: int) -> None:
        slot, start = self._slots.place(generation, self._sharable(generation), positions)
        self.cache.expected[slot] = len(generation.seen) if self.stream is None else 0
        generation._slot, generation._done = slot, start
        if not generation.first_token_at:
            generation.cached_tokens = start
        self._running.append(generation)

    def _preempt(self, generation: Generation) -> None:
        assert generation._slot is not None
        self._slots.vacate(generation._slot)
        generation._slot, generation._done = None, 0
        self._running.remove(generation)
        self._waiting.add(generation)

    def _positions(self, generation: Generation) -> int:
        """How many positions of the cache it needs for its next step: all of its prompt, and guesses."""
        most = len(generation.request.prompt) + self.room(generation.request)
        if self.stream is not None:
            return min(most, self.stream.size)
        return min(most, len(generation.seen) + (MOST if self._drafter is not None else 0))

    def _sharable(self, generation: Generation) -> list[int]:
        # At least the last token is read again: its logits choose the next one. Where a window drops parts of a prompt,
        # what it has seen depends on where its pieces begin.
        if self.stream is not None and len(generation.seen) > self.stream.size:
            return []
        return generation.sight.names(generation.seen[:-1])

    def _waits_for_a_reader(self, generation: Generation) -> bool:
        ids, kind = self._sharable(generation), generation.kind
        readers = [g for g in self._running if g._in_prompt and g.kind == kind and g.rank[0] <= generation.rank[0]]
        coming = max((common_length(g.sight.names(g.seen), ids) for g in readers), default=0)
        worth = max(1, min(BLOCK, len(ids)))
        return coming >= worth and coming - self._slots.found(kind, ids) >= worth

    def _run(self, batch: list[Generation]) -> list[tuple[Generation, Tensor]]:
        # The tokens of answers go through the model together, a piece of a prompt alone: so what a sequence's numbers
        # are never depends on its company, even where a kernel chooses its arithmetic by the number of rows.
        if self.stream is not None:
            for generation in batch:
                self._slide(generation, self.stream)
        writing = [g for g in batch if g.writes]
        if self._drafter is not None and writing:
            self._guess(writing, self._drafter)
        passes = [writing[first : first + EXACT_ROWS] for first in range(0, len(writing), EXACT_ROWS)]
        passes += [[g] for g in batch if not g.writes]
        return [pair for group in passes for pair in self._forward(group)]

    def _guess(self, writing: list[Generation], drafter: Drafter) -> None:
        asked, sure = [], []
        for generation in writing:
            assert generation._slot is not None
            forced = generation.forced()
            generation._pace, price = (
                (generation._form_pace, 0.0) if forced else (generation._guess_pace, drafter.price)
            )
            left = self.room(generation.request) - len(generation.tokens) - 1
            if self._stretch_at is not None and len(generation.ids) <= self._stretch_at:
                left = min(left, self._stretch_at - len(generation.ids))  # one pass has one set of frequencies
            if self.stream is not None:
                left = min(left, self.stream.size - len(generation.seen))
            rows = EXACT_ROWS // min(len(writing), EXACT_ROWS) - 1
            most = max(0, min(generation._pace.length(len(writing), price), left, rows))
            sure.append(forced[:most])
            asked.append(Asked(generation._slot, generation.seen, 0 if forced else most))
        for generation, forced, draft in zip(writing, sure, drafter.propose(asked), strict=True):
            generation._draft = forced or draft

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
            end = generation._done + generation.piece
            new = generation.seen[generation._done : end] + generation._draft
            ids += new
            positions += range(generation._done, generation._done + len(new))
            segments += [generation._slot] * len(new)
            ends.append(end)
            last_rows.append(len(ids) - 1 - len(generation._draft))
        seen = None
        if group[0].request.pictures and group[0]._in_prompt:  # a piece of a prompt is alone
            if self._native_threads is not None:
                torch.set_num_threads(self._native_threads)
            seen = group[0].sight.between(self.model, group[0]._done, ends[0])
        if self._native_threads is not None:
            torch.set_num_threads(1 if max(positions) < SERIAL_CONTEXT else self._native_threads)
        complete = [(row, g) for row, g, end in zip(last_rows, group, ends, strict=True) if end == len(g.seen)]
        rows = [row + i for row, generation in complete for i in range(1 + len(generation._draft))]
        logits_RV = None
        prompt = group[0]._in_prompt
        if seen is not None:  # the native step takes ids alone
            assert isinstance(self.model, ImageChat)
            hidden_TD = self.model.hidden(
                torch.tensor(ids),
                torch.tensor(positions),
                torch.tensor(segments),
                self.cache,
                seen_T=seen[0],
                seen_ND=seen[1],
            )
        elif self._step is not None and (not prompt or has_tiles() or len(rows) == len(ids)):
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


def _rank(generation: Generation) -> tuple[int, int]:
    return generation.rank


def stretch_at(config: TrunkConfig) -> int | None:
    """The length beyond which LongRoPE changes its frequencies; None for models without it."""
    rotaries = (layer.attention.rotary for layer in config.layers)
    scalings = (rotary.scaling for rotary in rotaries if rotary is not None)
    return next((s.original_context for s in scalings if s is not None and s.kind == "longrope"), None)
