"""What a user says about an adapter: its settings, and which linear layers a pattern means. No torch is needed here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any, Final

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from craton.config import Settings
from craton.errors import UnknownName, UsageError

DEFAULT_ADAPTER: Final = "default"

# The names that adapters of other programs are asked for by, as parts of ours.
PARTS_OF: Final[Mapping[str, tuple[str, ...]]] = {
    "q_proj": ("q",),
    "k_proj": ("k",),
    "v_proj": ("v",),
    "o_proj": ("o",),
    "query": ("q",),
    "key": ("k",),
    "value": ("v",),
    "qkv_proj": ("q", "k", "v"),
    "query_key_value": ("q", "k", "v"),
    "c_attn": ("q", "k", "v"),
    "gate_proj": ("gate",),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj": ("gate", "up"),
    "lm_head": ("head",),
    "embed_out": ("head",),
}

_PATTERNS: Final[Mapping[str, str]] = {
    "all": r"(?:.*\.)?trunk\..*",
    "all-linear": r"(?:.*\.)?trunk\..*",
    "attention": r"(?:.*\.)?trunk\..*\.attention\..*",
    "mlp": r"(?:.*\.)?trunk\..*\.feedforward\..*",
}
_EMBEDDINGS: Final = ("embedding", "embed_tokens", "embed_in", "wte", "word_embeddings")
_REGEX: Final = "re:"


class LoraSettings(Settings):
    """A low-rank adapter: W + scale B A (LoRA, Hu 2021, arXiv 2106.09685)."""

    rank: PositiveInt = Field(default=16, description="columns of B and rows of A")
    alpha: PositiveFloat = Field(default=32.0, description="the update is multiplied by alpha / rank")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="share of the adapter's inputs dropped in training")
    targets: tuple[str, ...] = Field(
        default=("all",),
        min_length=1,
        description="the linear layers to adapt: all, attention, mlp, parts such as q,v or q_proj,v_proj, a pattern "
        "over dotted names (trunk.layers.[0-3].*), or re: and a regular expression",
    )
    rslora: bool = Field(
        default=False, description="multiply by alpha / sqrt(rank), which keeps high ranks stable (arXiv 2312.03732)"
    )
    dora: bool = Field(
        default=False, description="learn each output row's magnitude apart from its direction (arXiv 2402.09353)"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _split_commas(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, Iterable) or not all(isinstance(v, str) for v in values):
            return value
        return tuple(part.strip() for v in values for part in ([v] if v.startswith(_REGEX) else v.split(",")))

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return lora_scale(self.rank, self.alpha, rslora=self.rslora)


def lora_scale(rank: int, alpha: float, *, rslora: bool) -> float:
    """alpha / rank; with `rslora` alpha / sqrt(rank) (rank-stabilised, Kalajdzievski 2023, arXiv 2312.03732)."""
    return alpha / (sqrt(rank) if rslora else rank)


def select_linears(targets: Iterable[str], names: Iterable[str]) -> list[str]:
    """Those of the linear layers `names` that `targets` mean, in their order; routers are never among them.

    Raises UnknownName for a target that means no layer, UsageError for an embedding, a router or a bad expression.
    """
    names = list(names)
    adaptable = [name for name in names if not is_router(name)]
    chosen: set[str] = set()
    for target in targets:
        matches = _matcher(target)
        found = [name for name in adaptable if matches.fullmatch(name)]
        if not found:
            raise _nothing_found(target, matches, names)
        chosen.update(found)
    return [name for name in adaptable if name in chosen]


def is_router(name: str) -> bool:
    """Whether a linear layer is a router of experts, whose weight is read apart from the layer (in fp32)."""
    return name.rpartition(".")[2] == "router"


def _matcher(target: str) -> re.Pattern[str]:
    if target.startswith(_REGEX):
        try:
            return re.compile(rf"(?:.*\.)?(?:{target.removeprefix(_REGEX)})")
        except re.error as error:
            raise UsageError(f"not a regular expression: {error}", where=f"target {target!r}") from None
    if target in _PATTERNS:
        return re.compile(_PATTERNS[target])
    ends = "|".join(fnmatch.translate(part) for part in PARTS_OF.get(target, (target,)))
    return re.compile(rf"(?:.*\.)?(?:{ends})")


def _nothing_found(target: str, matches: re.Pattern[str], names: list[str]) -> UsageError:
    if target in _EMBEDDINGS or matches.fullmatch("embedding"):
        return UsageError(
            "an embedding cannot be given a low-rank adapter",
            where=f"target {target!r}",
            remedy="adapt linear layers (the output layer is 'head'), or train the whole model: --method full",
        )
    if any(matches.fullmatch(name) for name in names):
        return UsageError(
            "a router of experts cannot be given a low-rank adapter: experts are chosen by its own weight",
            where=f"target {target!r}",
            remedy="adapt the experts themselves: 'mlp'",
        )
    parts = {name.rpartition(".")[2] for name in names if not is_router(name)}
    return UnknownName("target layer", target, {"all", "attention", "mlp", *parts})
