"""The Python front door: `craton.load(name)` and what can be asked of the model it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.config import parse
from craton.errors import ContextOverflow, UsageError
from craton.inference import native
from craton.inference.engine import Engine, FinishReason, Generation, Request, Token
from craton.inference.linears import prepare
from craton.inference.plan import DTypeChoice, Plan, make_plan
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer
from craton.modalities.text import render as render_chat
from craton.models import AnyModel, CausalLM, PoolingConfig, pool
from craton.store import find
from craton.trunk.trunk import sequence_layout

Message = Mapping[str, Any]

# Texts are embedded in packed batches of about this many tokens: enough for full speed, little enough for the memory.
EMBED_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Choice:
    """One answer: its text, its tokens (with log-probabilities where asked for), why it ended, and its seed."""

    text: str
    tokens: list[Token]
    finish_reason: FinishReason
    seed: int


@dataclass(frozen=True)
class Completion:
    """The answers to one prompt (one, unless `n` asked for more), and what they cost.

    prompt_tokens counts the whole prompt, cached_tokens the part of it that was already in the cache.
    first_token_seconds: from the call to the first token. seconds: to the last one.
    """

    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.choices[0].text

    @property
    def completion_tokens(self) -> int:
        """Tokens generated, over all answers."""
        return sum(len(choice.tokens) for choice in self.choices)

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed: tokens after the first one over the time after it (0.0 for a single token)."""
        later, seconds = self.completion_tokens - len(self.choices), self.seconds - self.first_token_seconds
        return later / seconds if later > 0 and seconds > 0 else 0.0


class Stream:
    """An answer as it is written: iterate it for pieces of text; `completion` is there when it has ended.

    Leaving the loop early cancels the answer.
    """

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __iter__(self) -> Iterator[str]:
        try:
            for token in self._generation:
                if token.text:
                    yield token.text
        finally:
            self._generation.cancel()

    @property
    def completion(self) -> Completion:
        """The finished (or cancelled) answer."""
        return _completion([self._generation])


class Model:
    """A loaded model with its tokeniser and engine. Make one with `craton.load`."""

    def __init__(self, name: str, checkpoint: Checkpoint, module: AnyModel, tokenizer: Tokenizer, plan: Plan) -> None:
        self.name, self.checkpoint, self.module, self.tokenizer, self.plan = name, checkpoint, module, tokenizer, plan
        self._engine: Engine | None = None

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return self.module.config.context

    @property
    def engine(self) -> Engine:
        """The engine that all text of this model comes from. Raises UsageError for an encoder, which writes none."""
        if self._engine is None:
            if not isinstance(self.module, CausalLM):
                raise UsageError(
                    f"{self.name} is an encoder: it reads text and writes none", remedy="use embed, or another model"
                )
            native_threads = self.plan.threads if self.plan.packed else None
            self._engine = Engine(self.module, self.tokenizer, dtype=self.plan.dtype, native_threads=native_threads)
        return self._engine

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The token ids of a conversation, ready for the assistant's answer, by the checkpoint's own template.

        Raises TemplateError if the model has no chat template, UsageError for malformed messages.
        """
        return render_chat(messages, self.tokenizer, tools=tools, add_generation_prompt=True).ids

    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[True], tools: Any = None, **sampling: Any
    ) -> Stream: ...
    @overload
    def chat(
        self, messages: Sequence[Message], *, stream: Literal[False] = False, tools: Any = None, **sampling: Any
    ) -> Completion: ...
    def chat(
        self, messages: Sequence[Message], *, stream: bool = False, tools: Any = None, **sampling: Any
    ) -> Completion | Stream:
        """Answer a conversation: messages are {"role": ..., "content": ...}; `sampling` as in `SamplingSettings`."""
        ids = self.render(messages, tools=tools)
        return self.generate(ids, stream=True, **sampling) if stream else self.generate(ids, **sampling)

    @overload
    def generate(self, prompt: str | Sequence[int], *, stream: Literal[True], **sampling: Any) -> Stream: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int], *, stream: Literal[False] = False, **sampling: Any
    ) -> Completion: ...
    def generate(self, prompt: str | Sequence[int], *, stream: bool = False, **sampling: Any) -> Completion | Stream:
        """Continue a text (or token ids). `sampling`: the fields of `SamplingSettings`, such as max_tokens=64.

        Raises ContextOverflow if prompt and answer do not fit the context, UsageError for wrong settings.
        """
        settings = parse(SamplingSettings, sampling, where="sampling settings")
        if stream:
            if settings.n != 1:
                raise UsageError(f"a stream is one answer, not n = {settings.n}", remedy="leave out stream or n")
            return Stream(self._submit(prompt, settings)[0])
        return next(self.generate_many([(prompt, settings)]))

    def generate_many(self, requests: Iterable[tuple[str | Sequence[int], SamplingSettings]]) -> Iterator[Completion]:
        """Continue many prompts, several at a time; completions come in the order of the requests."""
        for generations in [self._submit(prompt, settings) for prompt, settings in requests]:
            yield _completion([generation.wait() for generation in generations])

    def _submit(self, prompt: str | Sequence[int], settings: SamplingSettings) -> list[Generation]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        requests = [Request(ids, settings, choice) for choice in range(settings.n)]
        return [self.engine.submit(request) for request in requests]

    @torch.inference_mode()
    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """One fp32 vector for each text, [B, width] (a single text gives [1, width]), pooled as the checkpoint says.

        Raises ContextOverflow for a text longer than the model reads: nothing is cut silently.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        config = self.checkpoint.pooling or PoolingConfig()
        limit = min(config.max_tokens or self.context, self.context)
        encoded = self.tokenizer.encode_batch(texts)
        for number, ids in enumerate(encoded):
            if not ids:
                raise UsageError(f"text {number + 1} is empty", remedy="leave it out")
            if len(ids) > limit:
                raise ContextOverflow(
                    f"text {number + 1} has {len(ids)} tokens, {len(ids) - limit} more than the {limit} that "
                    f"{self.name} reads",
                    remedy="split it into passages",
                )
        vectors: list[Tensor | None] = [None] * len(texts)
        # Texts of like length together: equal ones share one attention call.
        for batch in _batches(sorted(range(len(encoded)), key=lambda i: len(encoded[i])), encoded):
            lengths = [len(encoded[i]) for i in batch]
            ids_T = torch.tensor([token for i in batch for token in encoded[i]])
            positions_T, segments_T = sequence_layout(lengths)
            if isinstance(self.module, CausalLM):
                hidden_TD = self.module.hidden(ids_T, positions_T, segments_T)
            else:
                hidden_TD = self.module(ids_T, positions_T, segments_T)
            for i, vector in zip(batch, pool(hidden_TD, lengths, config), strict=True):
                vectors[i] = vector
        return torch.stack([v for v in vectors if v is not None]) if texts else torch.empty(0, self._width)

    @property
    def _width(self) -> int:
        return self.module.config.trunk.width

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """fp32 logits [T, vocab] of the token that follows each of these ids."""
        if not isinstance(self.module, CausalLM):
            raise UsageError(f"{self.name} is an encoder and has no next-token logits")
        ids_T = torch.as_tensor(ids)
        if not 0 < len(ids_T) <= self.context:
            raise ContextOverflow(f"{len(ids_T)} tokens are not between 1 and the context of {self.context}")
        return self.module(ids_T, torch.arange(len(ids_T))).float()


def load(name: str | Path, *, dtype: DTypeChoice = "auto", threads: int | None = None) -> Model:
    """Load a model: a built-in or stored name, "hf:org/name", a folder, a .gguf or a .safetensors file.

    dtype: "auto" keeps quantised weights packed and otherwise takes what is fastest here without loss; "float32" is
    the reference. threads: CPU threads (none: what this process may use).
    """
    checkpoint = Checkpoint.open(find(str(name)).path)
    plan = make_plan(checkpoint, dtype, threads)
    torch.set_num_threads(plan.threads)
    native.set_threads(plan.threads)
    tokenizer = checkpoint.tokenizer()  # first: building it takes memory that the weights then use
    module = checkpoint.load(plan.dtype, packed=plan.packed)
    prepare(module, prepack=plan.prepack, unpack=plan.unpack, release=checkpoint.source.release)
    return Model(str(name), checkpoint, module, tokenizer, plan)


def _completion(generations: list[Generation]) -> Completion:
    ended = max(g.ended_at for g in generations)
    started = generations[0].submitted_at
    first = min((g.first_token_at for g in generations if g.first_token_at), default=ended)
    return Completion(
        [Choice(g.text, list(g.tokens), g.finish_reason or "cancelled", g.seed) for g in generations],
        prompt_tokens=len(generations[0].request.prompt),
        cached_tokens=min(g.cached_tokens for g in generations),
        first_token_seconds=first - started,
        seconds=ended - started,
    )


def _batches(order: list[int], encoded: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for i in order:
        if batch and tokens + len(encoded[i]) > EMBED_BATCH_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(encoded[i])
    if batch:
        yield batch
