"""Self-distillation: a student agrees with its own slow average, on other views of a picture (DINO, Caron 2021,
arXiv 2104.14294)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

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


class Seen(NamedTuple):
    """What was made of pictures. vectors: the encoder's, which are what is wanted in the end. answers: cosines with the
    prototypes, fp32."""

    vectors_BD: Tensor
    answers_BP: Tensor


class Seer(nn.Module):
    """An encoder of pictures and its head."""

    def __init__(self, encoder: VisionTransformer, head: PrototypeHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, pixels_BCHW: Tensor, kept_BM: Tensor | None = None) -> Seen:
        """kept_BM: the patches of each picture that are seen (none given: all)."""
        vectors_BD = self.encoder.pool(self.encoder(pixels_BCHW, kept_BM=kept_BM))
        return Seen(vectors_BD, self.head(vectors_BD))


class SelfDistilled(nn.Module):
    """student: what is trained. teacher: its exponential average, without gradients."""

    def __init__(
        self, encoder: VisionTransformer, *, hidden: int = 256, narrow: int = 64, prototypes: int = 1024
    ) -> None:
        super().__init__()
        self.student = Seer(encoder, PrototypeHead(encoder.config.width, hidden, narrow, prototypes))
        self.teacher = copy.deepcopy(self.student)
        self.teacher.requires_grad_(False)

    @property
    def encoder(self) -> VisionTransformer:
        """The teacher's, which is the better one."""
        return self.teacher.encoder

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
            yield parameter.data, student[name].data
