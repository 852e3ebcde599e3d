"""Self-distillation: a student agrees with its own slow average, on other views of a picture (DINO, Caron 2021,
arXiv 2104.14294)."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.models.vision import VisionTransformer
from craton.trunk import Linear


class PrototypeHead(nn.Module):
    """A picture's vector against learned prototypes: [B, width] -> logits [B, prototypes]. Two layers, a narrow vector
    of length 1, and its cosine with each prototype."""

    def __init__(self, width: int, hidden: int, narrow: int, prototypes: int) -> None:
        super().__init__()
        self.up, self.down = Linear(width, hidden), Linear(hidden, narrow)
        self.prototypes = Linear(narrow, prototypes, bias=False)

    def forward(self, x_BD: Tensor) -> Tensor:
        narrow_BN = F.normalize(self.down(F.gelu(self.up(x_BD))).float(), dim=-1)
        return narrow_BN @ F.normalize(self.prototypes.weight.float(), dim=-1).T


class Seer(nn.Module):
    """An encoder of pictures and its head."""

    def __init__(self, encoder: VisionTransformer, head: PrototypeHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        logits_BP: Tensor = self.head(self.encoder.encode(pixels_BCHW))
        return logits_BP


class SelfDistilled(nn.Module):
    """student: what is trained. teacher: its exponential average, with the centre of its answers, without gradients."""

    def __init__(
        self, encoder: VisionTransformer, *, hidden: int = 256, narrow: int = 64, prototypes: int = 1024
    ) -> None:
        super().__init__()
        self.student = Seer(encoder, PrototypeHead(encoder.config.width, hidden, narrow, prototypes))
        self.teacher = copy.deepcopy(self.student)
        self.teacher.register_parameter("centre", nn.Parameter(torch.zeros(prototypes)))
        self.teacher.requires_grad_(False)

    @property
    def encoder(self) -> VisionTransformer:
        """The teacher's, which is the better one."""
        return self.teacher.encoder

    @property
    def centre(self) -> Tensor:
        """The mean of the teacher's answers, fp32 [prototypes]."""
        centre: Tensor = self.teacher.centre  # type: ignore[assignment]
        return centre

    def start_teacher(self) -> None:
        """The teacher begins as the student is."""
        for mine, theirs in self._pairs():
            mine.copy_(theirs)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the teacher towards the student: momentum * teacher + (1 - momentum) * student."""
        for mine, theirs in self._pairs():
            mine.lerp_(theirs.to(mine.dtype), 1 - momentum)

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        student = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            if name != "centre":
                yield parameter.data, student[name].data
