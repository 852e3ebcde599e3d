"""What models of pictures learn without labels."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from craton.data.picture_batches import PictureBatch
from craton.models.self_distilled import SelfDistilled
from craton.models.vision import patchify
from craton.training.objective import LossParts


def _draws(model: nn.Module, *shape: int, device: torch.device) -> Tensor:
    # Measuring always hides the same, and takes nothing from the run's own random numbers.
    if model.training:
        return torch.rand(*shape, device=device)
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(device)


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
        order_BN = _draws(model, count, patches, device=target_BNX.device).argsort(-1)
        count_kept = min(patches - 1, max(1, round(patches * (1 - self.hidden))))
        kept_BM = order_BN[:, :count_kept].sort(-1).values
        painted_BNX = model(batch.pixels_BCHW, kept_BM).float()
        hidden_BN = torch.ones(count, patches, dtype=torch.bool, device=kept_BM.device).scatter(1, kept_BM, False)
        # A picture that stands for none (on a rank that has fewer) takes no part.
        hidden_BN &= (batch.indices_B >= 0)[:, None]
        errors_BN = F.mse_loss(painted_BNX, target_BNX, reduction="none").mean(-1)
        return LossParts((errors_BN * hidden_BN).sum(), int(hidden_BN.sum()), {})


class SelfDistillation:
    """The student's answer to one view shall be the teacher's to another: cross-entropy over prototypes (DINO, Caron
    2021, arXiv 2104.14294). The teacher sees the first two views, the student all. Counts pairs of views.

    The teacher's answers are centred and sharpened, so that neither one prototype nor all of them alike win. Once a
    step is made, it follows the student, and its centre the mean of its answers; so a step stays in one piece
    (`whole_steps`).
    """

    whole_steps: ClassVar[bool] = True

    def __init__(self, *, momentum: float = 0.99, student: float = 0.1, teacher: float = 0.04) -> None:
        """momentum: of the teacher. student, teacher: temperatures."""
        self.momentum, self.student, self.teacher = momentum, student, teacher
        self._mean: Tensor | None = None  # of the teacher's last answers

    def __call__(self, model: nn.Module, batch: PictureBatch) -> LossParts:
        assert isinstance(model, SelfDistilled)
        views = batch.pixels_BCHW.chunk(batch.views)
        with torch.no_grad():
            answers_VBP = torch.stack([model.teacher(view).float() for view in views[:2]])
            targets_VBP = ((answers_VBP - model.centre) / self.teacher).softmax(-1)
            if model.training:
                self._mean = answers_VBP.mean((0, 1))
        there_B = batch.indices_B >= 0
        total, pairs = model.centre.new_zeros(()), 0
        for number, view in enumerate(views):
            logs_BP = (model.student(view).float() / self.student).log_softmax(-1)
            for other, targets_BP in enumerate(targets_VBP):
                if other != number or len(views) == 1:
                    total = total - ((targets_BP * logs_BP).sum(-1) * there_B).sum()
                    pairs += int(there_B.sum())
        entropy = -(targets_VBP * targets_VBP.clamp(min=1e-9).log()).sum(-1).mean()
        return LossParts(total, pairs, {"teacher_entropy": entropy * pairs})

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """The teacher follows the student, and its centre what it answered."""
        assert isinstance(model, SelfDistilled)
        assert self._mean is not None
        model.follow(self.momentum)
        model.centre.lerp_(self._mean, 0.1)
