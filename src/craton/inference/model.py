"""The Python front door: `craton.load(name)` and what can be asked of the model it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import Family
from craton.checkpoints.families.whisper_generation import read_generation
from craton.config import parse
from craton.errors import ContextOverflow, UsageError
from craton.inference import native
from craton.inference.drafting import Drafter, ModelDrafter, NGramDrafter
from craton.inference.engine import Engine, FinishReason, Generation, Request, Token
from craton.inference.linears import prepare
from craton.inference.pictures import PictureRenderer, Prompt, has_pictures
from craton.inference.plan import DTypeChoice, Plan, make_plan
from craton.inference.scoring import Pair, Score, Scorer, check_fits
from craton.inference.settings import EngineSettings, SamplingSettings
from craton.inference.streaming import StreamWindow
from craton.inference.transcription import Transcriber, Transcript
from craton.inference.transcription_settings import TranscriptionSettings
from craton.modalities.audio import SAMPLE_RATE, check_samples, read_audio
from craton.modalities.text import Tokenizer
from craton.modalities.text import render as render_chat
from craton.models import AnyModel, CausalLM, ClassifierConfig, ImageChat, PoolingConfig, Seq2Seq, TextModel, pool
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

    prompt_tokens counts the whole prompt, cached_tokens the part of it that was already in the cache; drafted_tokens
    the guesses that were checked on the way (see `speculation`), accepted_tokens those that were right.
    first_token_seconds: from the call to the first token. seconds: to the last one.
    """

    choices: list[Choice]
    prompt_tokens: int
    cached_tokens: int
    first_token_seconds: float
    seconds: float
    drafted_tokens: int = 0
    accepted_tokens: int = 0

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

    def __init__(
        self,
        name: str,
        checkpoint: Checkpoint,
        module: TextModel,
        tokenizer: Tokenizer,
        plan: Plan,
        settings: EngineSettings = EngineSettings(),  # noqa: B008  (immutable)
    ) -> None:
        self.name, self.checkpoint, self.module, self.tokenizer, self.plan = name, checkpoint, module, tokenizer, plan
        self.settings, self._drafter = settings, _make_drafter(settings.speculate, self)
        self._engine: Engine | None = None
        self._scorer: Scorer | None = None
        self._transcriber: Transcriber | None = None
        self._renderer: PictureRenderer | None = None

    @property
    def context(self) -> int:
        """The longest sequence in tokens."""
        return self.module.config.context

    @property
    def engine(self) -> Engine:
        """The engine that all text of this model comes from. Raises UsageError for an encoder, which writes none."""
        if self._engine is None:
            if isinstance(self.module, Seq2Seq):
                raise UsageError(f"{self.name} writes down what it hears, nothing else", remedy="use transcribe")
            if not isinstance(self.module, CausalLM):
                raise UsageError(
                    f"{self.name} is an encoder: it reads text and writes none", remedy="use embed, or another model"
                )
            native_threads = self.plan.threads if self.plan.packed else None
            window = self.settings.stream_window
            self._engine = Engine(
                self.module,
                self.tokenizer,
                dtype=self.plan.dtype,
                slots=self.settings.slots,
                cache_bytes=self.settings.cache_bytes,
                native_threads=native_threads,
                drafter=self._drafter,
                stream=StreamWindow(window, self.settings.sinks) if window is not None else None,
                kv=self.settings.kv,
            )
        return self._engine

    @property
    def scorer(self) -> Scorer:
        """What `score` reads with. Raises UsageError for an encoder."""
        if self._scorer is None:
            if not isinstance(self.module, CausalLM):
                raise UsageError(f"{self.name} is no language model and gives text no probability")
            native_threads = self.plan.threads if self.plan.packed else None
            cache_dtype = torch.int8 if self.settings.kv == "int8" else self.plan.dtype
            self._scorer = Scorer(self.module, dtype=cache_dtype, native_threads=native_threads)
        return self._scorer

    @property
    def start_id(self) -> int | None:
        """The token that a text begins after: BOS, or else what ended the text before it (EOS)."""
        tokenizer = self.tokenizer
        return tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), None)

    def render(self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """The token ids of a conversation, ready for the assistant's answer, by the checkpoint's own template.

        Raises TemplateError if the model has no chat template, UsageError for malformed messages.
        """
        return self.prompt(messages, tools=tools).ids

    def prompt(
        self, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> Prompt:
        """A conversation, ready for the assistant's answer, for `generate`: its token ids and its pictures.

        A picture is a part {"type": "image", "image": a file, a file's bytes, or pixels [H, W, 3]} of a content list.
        variables: of the chat template. Raises as `render` and `PictureRenderer.render` do, and UsageError for a
        picture that is shown to a model that does not see.
        """
        if isinstance(self.module, ImageChat):
            if self._renderer is None:
                self._renderer = PictureRenderer(self.module.config, self.tokenizer, self.checkpoint.folder)
            return self._renderer.render(messages, tools=tools, **variables)
        if has_pictures(messages):
            raise UsageError(
                f"{self.name} does not see pictures", where="messages", remedy="take a model that does, such as SmolVLM"
            )
        rendered = render_chat(messages, self.tokenizer, tools=tools, add_generation_prompt=True, **variables)
        return Prompt(rendered.ids, text=rendered.text)

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
        """Answer a conversation: messages are {"role": ..., "content": ...}; `sampling` as in `SamplingSettings`.

        A model that sees takes pictures in its messages (see `prompt`).
        """
        prompt = self.prompt(messages, tools=tools)
        return self.generate(prompt, stream=True, **sampling) if stream else self.generate(prompt, **sampling)

    @overload
    def generate(self, prompt: str | Sequence[int] | Prompt, *, stream: Literal[True], **sampling: Any) -> Stream: ...
    @overload
    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, stream: Literal[False] = False, **sampling: Any
    ) -> Completion: ...
    def generate(
        self, prompt: str | Sequence[int] | Prompt, *, stream: bool = False, **sampling: Any
    ) -> Completion | Stream:
        """Continue a text (or token ids). `sampling`: the fields of `SamplingSettings`, such as max_tokens=64.

        Raises ContextOverflow if prompt and answer do not fit the context, UsageError for wrong settings.
        """
        settings = parse(SamplingSettings, sampling, where="sampling settings")
        if stream:
            if settings.n != 1:
                raise UsageError(f"a stream is one answer, not n = {settings.n}", remedy="leave out stream or n")
            return Stream(self._submit(prompt, settings)[0])
        return next(self.generate_many([(prompt, settings)]))

    def generate_many(
        self, requests: Iterable[tuple[str | Sequence[int] | Prompt, SamplingSettings]]
    ) -> Iterator[Completion]:
        """Continue many prompts, several at a time; completions come in the order of the requests."""
        for generations in [self._submit(prompt, settings) for prompt, settings in requests]:
            yield _completion([generation.wait() for generation in generations])

    def _submit(self, prompt: str | Sequence[int] | Prompt, settings: SamplingSettings) -> list[Generation]:
        if not isinstance(prompt, Prompt):
            prompt = Prompt(self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt))
        requests = [Request(prompt.ids, settings, choice, pictures=prompt.pictures) for choice in range(settings.n)]
        return [self.engine.submit(request) for request in requests]

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """The log-probability of each continuation after its context: pairs of token ids, a score for each.

        An empty context stands for the beginning of a text. Continuations of one context read it once, and the next
        call reads only what its contexts do not share with the last one.

        Raises UsageError for an empty continuation, or an empty context if the model has neither BOS nor EOS;
        ContextOverflow if a pair is longer than the context.
        """
        whole: list[Pair] = []
        for number, (context, continuation) in enumerate(pairs, 1):
            context = context if len(context) else [self._start("an empty context")]
            check_fits(context, continuation, self.context, f"pair {number}")
            whole.append((context, continuation))
        return self.scorer.score(whole)

    def rolling_score(self, ids: Sequence[int], *, window: int | None = None) -> Score:
        """The log-probability of a document of any length: each token once, in windows of at most the context.

        Where `ids` begin with BOS (EOS for a model without one), that token is where the text begins and has no
        probability of its own. window: how many tokens are read at once (none: the context).

        Raises UsageError for an empty document, a window that does not fit, or a model with neither BOS nor EOS.
        """
        window = self.context if window is None else window
        if not 1 <= window <= self.context:
            raise UsageError(f"a window has 1 to {self.context} tokens, not {window}")
        start = self._start("the first token of a document")
        ids = ids[1:] if ids and ids[0] == start else ids
        if not ids:
            raise UsageError("the document has no token", remedy="score at least one token")
        return self.scorer.rolling(ids, window, start)

    def _start(self, what: str) -> int:
        if self.start_id is None:
            raise UsageError(
                f"{what} has no probability: {self.name} has neither a BOS nor an EOS token to begin with",
                remedy="give a context of at least one token",
            )
        return self.start_id

    @property
    def sees(self) -> bool:
        """Whether its conversations may show it pictures."""
        return isinstance(self.module, ImageChat)

    @property
    def hears(self) -> bool:
        """Whether it is a speech model: it transcribes and embeds sound, and reads no text."""
        return isinstance(self.module, Seq2Seq)

    @property
    def transcriber(self) -> Transcriber:
        """What `transcribe` hears with. Raises UsageError for a model that hears nothing."""
        if self._transcriber is None:
            if not isinstance(self.module, Seq2Seq):
                raise UsageError(f"{self.name} hears nothing", remedy="take a speech model, such as whisper-tiny.en")
            facts = read_generation(self.checkpoint.folder)
            tokens = facts.tokens(self.tokenizer, self.module.config.vocab)
            heads, dtype = facts.alignment_heads, self.plan.dtype
            self._transcriber = Transcriber(self.module, self.tokenizer, tokens, heads, dtype)
        return self._transcriber

    def transcribe(
        self, audio: str | Path | bytes | npt.NDArray[Any], *, rate: int = SAMPLE_RATE, **settings: Any
    ) -> Transcript:
        """The text of a recording: a file, a file's bytes, or samples [N] or [N, channels] in -1..1 at `rate`.

        settings: the fields of `TranscriptionSettings`, such as word_times=True.

        Raises UsageError for settings that this model cannot follow or samples that are none, FileFormatError for a
        file that is no sound.
        """
        checked = parse(TranscriptionSettings, settings, where="transcription settings")
        self.transcriber.check(checked)
        samples = check_samples(audio, rate) if isinstance(audio, np.ndarray) else read_audio(audio)
        return next(self.transcriber.transcribe([samples], checked))

    @torch.inference_mode()
    def embed(self, texts: str | Sequence[str]) -> Tensor:
        """One fp32 vector for each text, [B, width] (a single text gives [1, width]), pooled as the checkpoint says.

        Raises ContextOverflow for a text longer than the model reads: nothing is cut silently.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        if isinstance(self.module, Seq2Seq):
            raise UsageError(f"{self.name} hears and reads no text", remedy="use embed_audio, or another model")
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

    def embed_audio(self, recordings: Sequence[str | Path | bytes | npt.NDArray[Any]]) -> Tensor:
        """One fp32 vector for each recording, [B, width]: the mean of what a speech model's encoder makes of it, of
        length 1. Made for finding like sounds and for probes; the model was trained for neither.

        recordings: files, a file's bytes, or samples at 16 kHz. Raises what `transcribe` raises.
        """
        transcriber = self.transcriber
        found = (check_samples(one) if isinstance(one, np.ndarray) else read_audio(one) for one in recordings)
        vectors = [transcriber.vector(samples) for samples in found]
        return torch.stack(vectors) if vectors else torch.empty(0, transcriber.module.config.encoder.width)

    @property
    def _width(self) -> int:
        return self.module.config.trunk.width

    @torch.inference_mode()
    def logits(self, ids: Sequence[int] | Tensor) -> Tensor:
        """fp32 logits [T, vocab] of the token that follows each of these ids."""
        if not isinstance(self.module, CausalLM):
            raise UsageError(f"{self.name} is no language model and has no next-token logits")
        ids_T = torch.as_tensor(ids)
        if not 0 < len(ids_T) <= self.context:
            raise ContextOverflow(f"{len(ids_T)} tokens are not between 1 and the context of {self.context}")
        return self.module(ids_T, torch.arange(len(ids_T))).float()


def load(
    name: str | Path,
    *,
    dtype: DTypeChoice = "auto",
    threads: int | None = None,
    adapt: Callable[[AnyModel, Family], None] | None = None,
    **engine: Any,
) -> Model:
    """Load a model: a built-in or stored name, "hf:org/name", a folder, a .gguf or a .safetensors file.

    dtype: "auto" keeps quantised weights packed and otherwise takes what is fastest here without loss; "float32" is
    the reference. threads: CPU threads (none: what this process may use). adapt: changes the float32 weights before
    they become what the plan says; packed ones would lose a small change, so then `dtype` must name a plain format.
    engine: the fields of `EngineSettings`, such as speculate="off".
    """
    settings = parse(EngineSettings, engine, where="engine settings")
    checkpoint = Checkpoint.open(find(str(name)).path)
    if isinstance(checkpoint.text_config, ClassifierConfig):
        raise UsageError(
            f"{name} is a classifier: it neither writes nor embeds text",
            remedy="load the model that it was made from; Checkpoint.open(path).load(dtype) gives the classifier",
        )
    plan = make_plan(checkpoint, dtype, threads, settings.activations, settings.kv)
    torch.set_num_threads(plan.threads)
    native.set_threads(plan.threads)
    tokenizer = checkpoint.tokenizer()  # first: building it takes memory that the weights then use
    if adapt is None:
        module = checkpoint.load(plan.dtype, packed=plan.packed)
    else:
        module = checkpoint.load(torch.float32)
        adapt(module, checkpoint.family)
        module.to(plan.dtype)
    assert isinstance(module, TextModel)
    prepare(
        module,
        prepack=plan.prepack,
        tiles=plan.tiles,
        release=checkpoint.source.release,
        parts=plan.parts,
        pack_ends=plan.pack_ends,
    )
    return Model(str(name), checkpoint, module, tokenizer, plan, settings)


def _make_drafter(speculate: str, model: Model) -> Drafter | None:
    """What guesses for `model`. Raises UsageError for a draft model that does not share its tokens."""
    if speculate == "off":
        return None
    if speculate == "ngram":
        return NGramDrafter()
    draft = load(speculate, threads=model.plan.threads, speculate="off")
    if not isinstance(draft.module, CausalLM):
        raise UsageError(f"{speculate} is an encoder: it cannot guess what a text says next")
    if draft.tokenizer.backend.get_vocab(with_added_tokens=True) != model.tokenizer.backend.get_vocab(
        with_added_tokens=True
    ):
        raise UsageError(
            f"{speculate} has other tokens than {model.name}, so its guesses cannot be read",
            remedy="guess with a smaller model of the same tokenizer, or with ngram",
        )
    price = _numbers(draft.checkpoint) / _numbers(model.checkpoint)
    return ModelDrafter(draft.module, model.module.config.vocab, price=price, dtype=draft.plan.dtype)


def _numbers(checkpoint: Checkpoint) -> int:
    return sum(math.prod(shape) for shape in checkpoint.source.shapes.values())


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
        drafted_tokens=sum(g.drafted_tokens for g in generations),
        accepted_tokens=sum(g.accepted_tokens for g in generations),
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
