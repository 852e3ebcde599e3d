"""One dial, the number of parameters, picks a fresh model's shape and how it is trained, by published scaling laws."""

from __future__ import annotations

from collections.abc import Iterator
from math import log
from typing import Final

from pydantic import Field, PositiveFloat, PositiveInt

from craton.config import Settings
from craton.config.sizes import parse_size
from craton.errors import UsageError

STEP: Final = 64  # widths and feed-forwards are multiples of it, which the products of CPUs and GPUs like
HEAD_SIZE: Final = 64
TOLERANCE: Final = 0.10  # how far the parameters may be from the dial
TOKENS_PER_PARAMETER: Final = 20
# The compute that DeepSeek's laws were fitted on, in FLOPs.
FITTED: Final = (1e17, 2e19)


class SizeOverrides(Settings):
    """What the user fixes; everything else follows from the dial and from these."""

    width: PositiveInt | None = Field(default=None, multiple_of=STEP, description="size of the residual stream")
    layers: PositiveInt | None = Field(default=None, description="number of blocks")
    heads: PositiveInt | None = Field(default=None, description="query heads of each layer; they share the width")
    kv_heads: PositiveInt | None = Field(default=None, description="key-value heads, which the query heads share")
    hidden: PositiveInt | None = Field(default=None, description="inner size of the feed-forward")
    tokens: PositiveInt | None = Field(default=None, description="how many tokens to train on in all")
    batch_tokens: PositiveInt | None = Field(default=None, description="tokens of one optimiser step, on all ranks")
    learning_rate: PositiveFloat | None = Field(default=None, description="peak learning rate of AdamW")


NO_OVERRIDES: Final = SizeOverrides()


class SizePlan(Settings):
    """A shape and a training budget. decisions: each choice with its reason, a line each, to be shown to the user."""

    dial: PositiveInt = Field(description="the number of parameters that was asked for")
    parameters: PositiveInt = Field(description="the number there will be, the embedding counted once")
    width: PositiveInt = Field(description="size of the residual stream")
    layers: PositiveInt = Field(description="number of blocks")
    heads: PositiveInt = Field(description="query heads of each layer")
    kv_heads: PositiveInt = Field(description="key-value heads of each layer")
    hidden: PositiveInt = Field(description="inner size of the gated feed-forward")
    tokens: PositiveInt = Field(description="tokens to train on in all")
    batch_tokens: PositiveInt = Field(description="tokens of one optimiser step, on all ranks")
    learning_rate: PositiveFloat = Field(description="peak learning rate of AdamW")
    decisions: tuple[str, ...] = Field(description="each choice with its reason")

    @property
    def head_size(self) -> int:
        """Numbers of one head."""
        return self.width // self.heads


class Shape(Settings):
    """The sizes that make the number of parameters."""

    width: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    kv_heads: PositiveInt
    hidden: PositiveInt

    def parameters(self, vocab: int) -> int:
        """All of a model with a gated feed-forward, two norms a layer, no biases and a tied embedding."""
        return vocab * self.width + self.layers * self._layer() + self.width

    def _layer(self) -> int:
        keys_and_values = 2 * self.kv_heads * (self.width // self.heads)
        return self.width * (2 * self.width + keys_and_values + 3 * self.hidden + 2)


def size(
    dial: str | int,
    *,
    vocab: int,
    context: int,
    encoder: bool = False,
    overrides: SizeOverrides = NO_OVERRIDES,
) -> SizePlan:
    """The plan for a model of `dial` parameters in all, the embedding counted once, as the head shares it.

    encoder: a bidirectional one, which generates nothing and so shares no key-value heads. Width, depth, tokens and
    batch never fall and the learning rate never rises as the dial goes up.

    - Depth = 4 + width / 128, in the middle of what good small models have (Pythia 31M: 6 layers of 256, arXiv
      2304.01373; Llama 3.2 3B: 28 of 3072). Loss hardly depends on it (Kaplan 2020, arXiv 2001.08361, figure 5), and
      fewer, wider layers train faster.
    - Width: the one at which the feed-forward that reaches the dial is nearest to 8/3 of it (Shazeer 2020, arXiv
      2002.05202), where a gated feed-forward has as many parameters as a plain one of 4 times the width.
    - Heads of 64; from 512 on, 4 query heads (or 2) share a key-value head (Ainslie 2023, arXiv 2305.13245).
    - Tokens = 20 for each parameter (Hoffmann 2022, arXiv 2203.15556).
    - Batch and learning rate: `batch_law` and `learning_rate_law`.

    Raises UsageError for a dial that is too small for the vocabulary and for overrides that make no model.
    """
    wanted = parse_size(dial) if isinstance(dial, str) else dial
    shape = _shape(wanted, vocab, encoder, overrides)
    tokens = overrides.tokens or TOKENS_PER_PARAMETER * wanted
    compute = 6.0 * wanted * tokens
    sequences = max(1, round(min(batch_law(compute), tokens) / context))
    return SizePlan(
        dial=wanted,
        parameters=shape.parameters(vocab),
        **shape.model_dump(),
        tokens=tokens,
        batch_tokens=overrides.batch_tokens or sequences * context,
        learning_rate=overrides.learning_rate or float(f"{learning_rate_law(compute):.2g}"),
        decisions=(
            *_shape_decisions(wanted, vocab, shape, overrides),
            *_training_decisions(tokens, compute, overrides),
        ),
    )


def batch_law(compute: float) -> float:
    """Best tokens per step for a training of `compute` FLOPs (DeepSeek LLM, Bi 2024, arXiv 2401.02954, equation 1).

    Chosen over StepLaw (Li 2025, arXiv 2503.04715) because it was fitted on runs as small as 10^17 FLOPs, which is a
    30M model here, while StepLaw begins at 60M parameters and 2 billion tokens.
    """
    return float(0.2920 * compute**0.3271)


def learning_rate_law(compute: float) -> float:
    """Best peak learning rate of AdamW for a training of `compute` FLOPs; see `batch_law`."""
    return float(0.3118 * compute**-0.1250)


def _shape(wanted: int, vocab: int, encoder: bool, overrides: SizeOverrides) -> Shape:
    best: tuple[float, Shape] | None = None
    for width in _widths(wanted, vocab, overrides):
        layers = overrides.layers or round(4 + width / 128)
        heads = overrides.heads or width // HEAD_SIZE
        if width % heads or (width // heads) % 4:
            continue  # heads are rotated in pairs, and in latent attention only by half
        kv_heads = overrides.kv_heads or (heads if encoder else _kv_heads(width, heads))
        if heads % kv_heads:
            continue
        least = Shape(width=width, layers=layers, heads=heads, kv_heads=kv_heads, hidden=overrides.hidden or STEP)
        hidden = STEP + (wanted - least.parameters(vocab)) / (3 * width * layers)
        if overrides.hidden is not None:
            distance = abs(log(least.parameters(vocab) / wanted))
            shape = least
        elif hidden > 0:
            distance = abs(log(hidden / (8 / 3 * width)))
            shape = least.model_copy(update={"hidden": max(STEP, STEP * round(hidden / STEP))})
        else:
            continue
        if best is None or distance < best[0]:
            best = distance, shape
    if best is None or (overrides.hidden is None and best[1].parameters(vocab) > wanted * (1 + TOLERANCE)):
        raise _no_shape(wanted, vocab, overrides)
    return best[1]


def _widths(wanted: int, vocab: int, overrides: SizeOverrides) -> Iterator[int]:
    if overrides.width is not None:
        yield overrides.width
        return
    width = STEP
    # Beyond this not even the embedding and one layer fit.
    while width == STEP or width * (vocab + 2 * width) < wanted:
        yield width
        width += STEP if width < 512 else 2 * STEP if width < 2048 else 4 * STEP


def _kv_heads(width: int, heads: int) -> int:
    if width < 512:  # the cache of a small model is small
        return heads
    return next(heads // share for share in (4, 2, 1) if heads % share == 0)


def _no_shape(wanted: int, vocab: int, overrides: SizeOverrides) -> UsageError:
    given = overrides.model_dump(include=set(Shape.model_fields), exclude_none=True)
    if given:
        return UsageError(
            f"no model of {short(wanted)} parameters has the sizes that are given",
            where=", ".join(f"{key} {value}" for key, value in given.items()),
            remedy="a width is a multiple of its heads and the heads of their key-value heads; leave some size free, "
            "or give the feed-forward's as well and the dial gives way",
        )
    smallest = Shape(width=STEP, layers=4, heads=1, kv_heads=1, hidden=STEP)
    most = int((wanted - smallest.parameters(0)) / STEP)
    return UsageError(
        f"{short(wanted)} parameters are too few for a vocabulary of {vocab}",
        remedy=f"take {short(smallest.parameters(vocab))} or more"
        + (f", or a tokeniser of at most {most} tokens" if most > 256 else ""),
    )


def _shape_decisions(wanted: int, vocab: int, shape: Shape, overrides: SizeOverrides) -> Iterator[str]:
    parameters, embedding = shape.parameters(vocab), vocab * shape.width
    yield (
        f"{short(parameters)} parameters for a dial of {short(wanted)}, {short(embedding)} of them the embedding, "
        "counted once because the head shares it"
    )
    ratio = f"{shape.hidden / shape.width:.1f} of the width"
    yield f"width {shape.width}: " + _because(
        overrides.width, "the feed-forward that then reaches the dial is nearest to 8/3 of it (Shazeer 2020)"
    )
    yield f"{shape.layers} layers: " + _because(
        overrides.layers, "4 + width / 128, as good small models have; loss hardly depends on it (Kaplan 2020)"
    )
    yield f"{shape.heads} heads of {shape.width // shape.heads}: " + _because(overrides.heads, "64 is usual")
    if shape.kv_heads < shape.heads or overrides.kv_heads is not None:
        yield f"{shape.kv_heads} key-value heads: " + _because(
            overrides.kv_heads, "shared, for a smaller cache (Ainslie 2023)"
        )
    yield f"feed-forward {shape.hidden}, {ratio}: " + _because(overrides.hidden, "fills up to the dial")


def _training_decisions(tokens: int, compute: float, overrides: SizeOverrides) -> Iterator[str]:
    yield f"{short(tokens)} tokens: " + _because(
        overrides.tokens, f"{TOKENS_PER_PARAMETER} for each parameter (Hoffmann 2022)"
    )
    low, high = FITTED
    beyond = "" if low <= compute <= high else f", beyond the {low:.0e} to {high:.0e} it was fitted on"
    law = f"DeepSeek LLM's law (Bi 2024) at {compute:.1e} FLOPs{beyond}"
    yield "batch: " + _because(overrides.batch_tokens, law)
    yield "learning rate: " + _because(overrides.learning_rate, law)


def _because(given: float | None, reason: str) -> str:
    return "as given" if given is not None else reason


def short(count: float) -> str:
    """A count for people: "135M"."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.3g}"
