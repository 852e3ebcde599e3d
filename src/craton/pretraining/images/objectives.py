"""What models of pictures learn without labels."""

from __future__ import annotations

from typing import ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.picture_batches import PictureBatch
from craton.models.self_distilled import SelfDistilled
from craton.models.vision import patchify
from craton.training.objective import LossParts

SPREAD: Final = 0.1  # weight of what keeps vectors apart (DINOv2)
ROUNDS: Final = 3  # of sharing pictures out among prototypes (SwAV, DINOv2)


class MaskedPixels:
    """Paint the hidden patches: the mean squared error of their pixels, each patch normalised by its own mean and
    deviation (He 2021, arXiv 2111.06377). Counts hidden patches. hidden: the share that is not seen."""

    def __init__(self, *, hidden: float = 0.75) -> None:
        self.hidden = hidden

    def __call__(self, model: nn.Module, batch: PictureBatch) -> LossParts:
        target_BNX = patchify(batch.pixels_BCHW, batch.patch).float()
        mean, std = target_BNX.mean(-1, keepdim=True), target_BNX.std(-1, keepdim=True)
        target_BNX = (target_BNX - mean) / (std + 1e-3)
        count, patches, _ = target_BNX.shape
        seen = min(patches - 1, max(1, round(patches * (1 - self.hidden))))
        kept_BM = _some(model, count, patches, seen, target_BNX.device)
        painted_BNX = model(batch.pixels_BCHW, kept_BM).float()
        hidden_BN = torch.ones(count, patches, dtype=torch.bool, device=kept_BM.device).scatter(1, kept_BM, False)
        # A picture that stands for none (on a rank that has fewer) takes no part.
        hidden_BN &= (batch.indices_B >= 0)[:, None]
        errors_BN = F.mse_loss(painted_BNX, target_BNX, reduction="none").mean(-1)
        return LossParts((errors_BN * hidden_BN).sum(), int(hidden_BN.sum()), {})


class SelfDistillation:
    """The student's answer to one view shall be the teacher's to another: cross-entropy over prototypes (DINO, Caron
    2021, arXiv 2104.14294). The teacher sees the first two views, the student all. Counts pairs of views.

    Three things of later work keep it from collapse in short runs on small pictures. The teacher's answers are shared
    out evenly among the prototypes and not centred (`shared_out`); the student sees a part of each view's patches
    (masked siamese networks, Assran 2022, arXiv 2204.07141); and its vectors are kept apart (`spread`). Where all
    pictures of a step are compared with one another, it stays in one piece (`whole_steps`). Once a step is made, the
    teacher follows the student.
    """

    whole_steps: ClassVar[bool] = True

    def __init__(
        self, *, momentum: float = 0.99, hidden: float = 0.5, student: float = 0.1, teacher: float = 0.04
    ) -> None:
        """momentum: of the teacher. hidden: the share of patches that the student does not see. student, teacher:
        temperatures."""
        self.momentum, self.hidden, self.student, self.teacher = momentum, hidden, student, teacher

    def __call__(self, model: nn.Module, batch: PictureBatch) -> LossParts:
        assert isinstance(model, SelfDistilled)
        views = batch.pixels_BCHW.chunk(batch.views)
        height, width = batch.pixels_BCHW.shape[-2:]
        patches = (height // batch.patch) * (width // batch.patch)
        seen = max(1, round(patches * (1 - self.hidden)))
        with torch.no_grad():
            answers_MP = torch.cat([model.teacher(view).answers_BP for view in views[:2]])
            targets = shared_out(answers_MP / self.teacher).chunk(min(2, len(views)))
        there_B = batch.indices_B >= 0
        total, apart, pairs = targets[0].new_zeros(()), targets[0].new_zeros(()), 0
        for number, view in enumerate(views):
            kept_BM = _some(model, len(view), patches, seen, view.device)
            vectors_BD, answers_BP = model.student(view, kept_BM)
            logs_BP = (answers_BP / self.student).log_softmax(-1)
            if number < 2:
                apart = apart + spread(vectors_BD)
            for other, targets_BP in enumerate(targets):
                if other != number or len(views) == 1:
                    total = total - ((targets_BP * logs_BP).sum(-1) * there_B).sum()
                    pairs += int(there_B.sum())
        if model.training:  # what is measured is agreement alone
            total = total + SPREAD * pairs * apart
        entropy = torch.stack([torch.special.entr(part).sum(-1).mean() for part in targets]).mean()
        return LossParts(total, pairs, {"teacher_entropy": entropy * pairs})

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """The teacher follows the student."""
        assert isinstance(model, SelfDistilled)
        model.follow(self.momentum)


def shared_out(logits_MP: Tensor) -> Tensor:
    """Answers [M, prototypes] as shares that add up to 1 for each picture, and to about as much for each prototype:
    Sinkhorn's rounds (Cuturi 2013, arXiv 1306.0895; SwAV, Caron 2020, arXiv 2006.09882). So a few prototypes cannot
    take all pictures, and pictures that are answered alike get no answer at all: even shares."""
    logs_MP = logits_MP.float()
    for _ in range(ROUNDS):
        logs_MP = logs_MP.log_softmax(0).log_softmax(1)
    return logs_MP.exp()


def spread(vectors_BD: Tensor) -> Tensor:
    """How close each vector's direction is to the nearest other one: the mean of -log(distance), a scalar in fp32, 0
    for fewer than two. Made smaller, vectors fill their space (KoLeo, Sablayrolles 2018, arXiv 1806.03198; DINOv2,
    Oquab 2023, arXiv 2304.07193)."""
    unit_BD = F.normalize(vectors_BD.float(), dim=-1)
    if len(unit_BD) < 2:
        return unit_BD.new_zeros(())
    with torch.no_grad():
        nearest_B = (unit_BD @ unit_BD.T).fill_diagonal_(-2.0).argmax(-1)
    # Of equal pictures the distance is 0.
    return -((unit_BD - unit_BD[nearest_B]).norm(dim=-1) + 1e-6).log().mean()


def _some(model: nn.Module, count: int, patches: int, seen: int, device: torch.device) -> Tensor:
    # The numbers [B, M] of `seen` patches of each picture. Measuring always takes the same, and takes nothing from the
    # run's own random numbers.
    if model.training:
        order_BN = torch.rand(count, patches, device=device).argsort(-1)
    else:
        order_BN = torch.rand(count, patches, generator=torch.Generator().manual_seed(0)).to(device).argsort(-1)
    return order_BN[:, :seen].sort(-1).values
