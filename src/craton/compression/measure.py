"""How good a model is before and after: loss on held-out windows, or for encoders the likeness of its vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.compression.blocks import backbone
from craton.compression.calibration import heldout_loss
from craton.models import AnyModel, CausalLM, PoolingConfig, pool
from craton.trunk.trunk import sequence_layout


@dataclass(frozen=True)
class Measured:
    """loss_before, loss_after: nats a token of what writes text. cosine: of the vectors of texts or pictures to those
    before, the mean over all. text_cosine: the same of texts where `cosine` is that of pictures. The rest is None."""

    loss_before: float | None = None
    loss_after: float | None = None
    cosine: float | None = None
    text_cosine: float | None = None

    def as_dict(self) -> dict[str, float]:
        """What was measured, by name."""
        values: dict[str, Any] = {}
        if self.loss_before is not None and self.loss_after is not None:
            values = {
                "loss_before": self.loss_before,
                "loss_after": self.loss_after,
                "perplexity_before": exp(self.loss_before),
                "perplexity_after": exp(self.loss_after),
            }
        cosines = {"cosine": self.cosine, "text_cosine": self.text_cosine}
        return values | {name: cosine for name, cosine in cosines.items() if cosine is not None}


def judge(model: AnyModel, ids_MT: Tensor, pooling: PoolingConfig | None) -> Tensor:
    """Of a model of text: its loss as a number, or one vector [M, width] for each window."""
    if isinstance(model, CausalLM) and pooling is None:
        return torch.tensor(heldout_loss(model, ids_MT), dtype=torch.float64)
    return vectors(model, ids_MT, pooling)


@torch.inference_mode()
def vectors(model: AnyModel, ids_MT: Tensor, pooling: PoolingConfig | None) -> Tensor:
    """One vector for each window, as the checkpoint says that it is to be read (else: the mean)."""
    body = backbone(model)
    read = body.hidden if isinstance(body, CausalLM) else body
    return torch.cat(
        [
            pool(read(ids_T, *sequence_layout([len(ids_T)])), [len(ids_T)], pooling or PoolingConfig())
            for ids_T in ids_MT
        ]
    )


def compared(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Measured:
    """Of two results of `Material.judge`."""
    if "loss" in before:
        return Measured(float(before["loss"]), float(after["loss"]))
    cosines = {name: float(F.cosine_similarity(before[name].double(), after[name].double()).mean()) for name in before}
    return Measured(cosine=cosines["vectors"], text_cosine=cosines.get("texts"))
