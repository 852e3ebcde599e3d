"""The sequence classifier: a language model or an encoder, and one row of logits for each text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor, nn

from craton.config import Settings, parse
from craton.errors import UnknownName, UsageError
from craton.models.causal_lm import CausalLM, CausalLMConfig
from craton.models.encoder import Encoder, EncoderConfig
from craton.models.pooling import PoolingConfig, pool
from craton.trunk import Linear, TrunkConfig

INITIAL_STD = 0.02  # of a fresh head's weights, as BERT's (Devlin 2018, arXiv 1810.04805)


class ClassifierConfig(Settings):
    """labels: the classes' names, in the order of the logits; one alone is a score (a reranker's). pooling: the token
    vectors that stand for the text.

    "last" is for causal models, whose last token alone has seen the whole text. "cls" is BERT's: the first token
    through the pooler (a dense layer and tanh). "mean" needs no pooler. The backbone's config says what of it is used:
    no next-token head, and a pooler where one is read.
    """

    labels: tuple[str, ...] = Field(min_length=1)
    pooling: Literal["last", "cls", "mean"]
    backbone: CausalLMConfig | EncoderConfig
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="of what the head reads")

    @field_validator("labels")
    @classmethod
    def _differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("two labels have one name")
        return labels

    @field_validator("backbone")
    @classmethod
    def _used(cls, backbone: CausalLMConfig | EncoderConfig, info: ValidationInfo) -> CausalLMConfig | EncoderConfig:
        pooling = info.data.get("pooling")
        if isinstance(backbone, CausalLMConfig) != (pooling == "last"):
            raise ValueError("a causal model is read at its last token, an encoder at its first one or as a mean")
        if isinstance(backbone, CausalLMConfig):
            return backbone.model_copy(update={"tied": True, "head_bias": False})
        return backbone.model_copy(update={"pooler": pooling == "cls"})

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the modules that are the head: trained in full beside an adapter (PEFT's `modules_to_save`)."""
        return ("backbone.pooler", "head") if self.pooling == "cls" else ("head",)

    @property
    def trunk(self) -> TrunkConfig:
        """The backbone's."""
        return self.backbone.trunk

    @property
    def vocab(self) -> int:
        """The backbone's."""
        return self.backbone.vocab

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return self.backbone.context


class Classifier(nn.Module):
    """Logits over classes. The head has a bias on an encoder and none on a causal model, as the published ones."""

    def __init__(self, config: ClassifierConfig, backbone: CausalLM | Encoder | None = None) -> None:
        """backbone: an already loaded model for the place of a fresh one. It is taken over: a causal model loses its
        next-token head, which nothing here reads, and an encoder gains or loses its pooler."""
        super().__init__()
        width = config.trunk.width
        if backbone is None:
            wanted = config.backbone
            backbone = CausalLM(wanted) if isinstance(wanted, CausalLMConfig) else Encoder(wanted)
        device = next(backbone.parameters()).device
        if isinstance(backbone, CausalLM):
            del backbone.head
        elif config.pooling == "mean":
            backbone.pooler = None
        elif backbone.pooler is None:
            backbone.pooler = _initialised(Linear(width, width, device=device))
        backbone.config = config.backbone
        self.config, self.backbone = config, backbone
        self.dropout = nn.Dropout(config.dropout)
        self.head = _initialised(Linear(width, len(config.labels), bias=config.pooling != "last", device=device))

    @classmethod
    def over(
        cls,
        backbone: CausalLM | Encoder,
        labels: Sequence[str],
        *,
        pooling: Literal["last", "cls", "mean"] | None = None,
        dropout: float = 0.0,
    ) -> Classifier:
        """A fresh head, ready to be trained, over a loaded model, which is taken over.

        pooling: None is "last", or "cls" for an encoder. Raises UsageError for labels or settings that make no head,
        UnknownName for a pooling that the backbone cannot be read by.
        """
        if len(labels) < 2:
            raise UsageError(f"a classifier needs at least 2 classes, not {len(labels)}")
        possible = ("last",) if isinstance(backbone, CausalLM) else ("cls", "mean")
        chosen = pooling or possible[0]
        if chosen not in possible:
            raise UnknownName("pooling", chosen, possible, where=type(backbone).__name__)
        values = {"labels": tuple(labels), "pooling": chosen, "backbone": backbone.config, "dropout": dropout}
        model = cls(parse(ClassifierConfig, values, where="classifier"), backbone)
        for _, parameter in model.head_parameters():
            parameter.requires_grad_(True)
        return model

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the head's modules."""
        for module in self.config.head_modules:
            for name, parameter in self.get_submodule(module).named_parameters():
                yield f"{module}.{name}", parameter

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor,
        lengths: Sequence[int],
        types_T: Tensor | None = None,
    ) -> Tensor:
        """fp32 logits [B, labels] of the packed texts of these lengths. types_T: of an encoder's pairs, which part each
        token belongs to (none: all to the first)."""
        if isinstance(self.backbone, CausalLM):
            hidden_TD = self.backbone.hidden(ids_T, positions_T, segments_T)
        else:
            hidden_TD = self.backbone(ids_T, positions_T, segments_T, types_T)
        pooled_BD = pool(hidden_TD, list(lengths), PoolingConfig(mode=self.config.pooling, normalise=False))
        if self.config.pooling == "cls":
            assert isinstance(self.backbone, Encoder)
            assert self.backbone.pooler is not None
            pooled_BD = self.backbone.pooler(pooled_BD).tanh()
        logits_BC: Tensor = self.head(self.dropout(pooled_BD))
        return logits_BC


def _initialised(linear: Linear) -> Linear:
    nn.init.normal_(linear.weight, std=INITIAL_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
