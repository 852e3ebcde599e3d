"""The image classifier: a Vision Transformer, and one row of logits for each picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pydantic import Field, field_validator
from torch import Tensor, nn

from craton.config import Settings, parse
from craton.models.vision import ImagePooling, VisionConfig, VisionTransformer
from craton.trunk import Linear, TrunkConfig

INITIAL_STD = 0.02  # of a fresh head's weights


class ImageClassifierConfig(Settings):
    """labels: the classes' names, in the order of the logits. backbone: its pooling says what the head reads."""

    labels: tuple[str, ...] = Field(min_length=2)
    backbone: VisionConfig

    @field_validator("labels")
    @classmethod
    def _differ(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) != len(labels):
            raise ValueError("two labels have one name")
        return labels

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the modules that are the head: trained in full beside an adapter (PEFT's `modules_to_save`)."""
        return ("head",)

    @property
    def trunk(self) -> TrunkConfig:
        """The backbone's."""
        return self.backbone.trunk


class ImageClassifier(nn.Module):
    """Logits over classes."""

    def __init__(self, config: ImageClassifierConfig, backbone: VisionTransformer | None = None) -> None:
        """backbone: an already loaded model for the place of a fresh one. It is taken over."""
        super().__init__()
        self.backbone = VisionTransformer(config.backbone) if backbone is None else backbone
        self.config = config
        device = self.backbone.patches.weight.device
        self.head = Linear(config.backbone.width, len(config.labels), device=device)
        nn.init.normal_(self.head.weight, std=INITIAL_STD)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def over(
        cls, backbone: VisionTransformer, labels: Sequence[str], *, pooling: ImagePooling | None = None
    ) -> ImageClassifier:
        """A fresh head, ready to be trained, over a loaded model, which is taken over.

        pooling: what the head reads; None is the backbone's own. Raises UsageError for labels that make no head and
        for a pooling whose layers the backbone lacks.
        """
        known = backbone.config
        if pooling is not None and pooling != known.pooling:
            if pooling not in ("cls", "mean", "cls_mean"):
                from craton.errors import UnknownName

                raise UnknownName("pooling", pooling, (known.pooling, "cls", "mean", "cls_mean"))
            backbone.pooler = backbone.attention_pool = backbone.projection = None
            known = parse(
                VisionConfig, known.model_dump() | {"pooling": pooling, "projection": 0}, where="image classifier"
            )
            backbone.config = known
        model = cls(
            parse(ImageClassifierConfig, {"labels": tuple(labels), "backbone": known}, where="labels"), backbone
        )
        for _, parameter in model.head_parameters():
            parameter.requires_grad_(True)
        return model

    def head_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of the head's modules."""
        for name, parameter in self.head.named_parameters():
            yield f"head.{name}", parameter

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Logits [B, labels]."""
        logits_BC: Tensor = self.head(self.backbone.encode(pixels_BCHW))
        return logits_BC
