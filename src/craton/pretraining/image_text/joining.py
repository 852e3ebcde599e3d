"""A side of pictures and a text encoder that is there already as one model: LiT (Zhai 2022, arXiv 2111.07991), with the
side of texts locked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from craton.checkpoints.families.vision_text import published_text, published_vision
from craton.errors import UsageError
from craton.models import DualEncoder, DualEncoderConfig, Encoder, PoolingConfig, VisionTransformer, pool
from craton.models.initialisation import initialise
from craton.trunk.attention import Attention
from craton.trunk.block import Block
from craton.trunk.norms import Norm
from craton.trunk.trunk import sequence_layout

# The mean outweighs the residual stream by so much that their sum points where it points, and float16 holds the sum.
MEAN_WEIGHT: Final = 1024.0
# What the pooler makes of numbers around 1 is small enough for tanh to be a straight line.
POOLER_WEIGHT: Final = 2.0**-7
LEAST_SCALE: Final = 1e-6  # of a norm, to divide by
TOGETHER: Final = 64  # texts that are read at once


@torch.no_grad()
def pooled_encoder(text: Encoder, pooling: PoolingConfig) -> Encoder:
    """A BERT whose pooler (a dense layer and tanh over the first token, by which published files of two encoders are
    read) points where `text` points, read by its own `pooling`. Nothing is learnt.

    cls: the dense layer is the identity, much smaller. mean: there is one more layer before it. Its attention has no
    queries and keys, so it weighs all tokens alike, and what it finds outweighs the residual stream; its feed-forward
    adds nothing.

    Raises UsageError for the pooling "last", which the first token cannot have.
    """
    if pooling.mode == "last":
        raise UsageError(
            "this text encoder is read by its last token, and the files of two encoders by the first",
            where="--text-model",
            remedy="take one that is read by the mean or the first token, such as minilm-l6-v2",
        )
    trunk = text.config.trunk
    if pooling.mode == "mean":
        trunk = trunk.model_copy(update={"layers": (*trunk.layers, trunk.layers[-1])})
    made = Encoder(published_text(text.config).model_copy(update={"trunk": trunk}))
    kept = {name: tensor for name, tensor in text.state_dict().items() if not name.startswith("pooler.")}
    made.load_state_dict(kept, strict=False)
    turn_DD = _average(made) if pooling.mode == "mean" else torch.eye(trunk.width)
    assert made.pooler is not None
    made.pooler.weight.copy_(POOLER_WEIGHT * turn_DD)
    made.pooler.bias.zero_()
    return made.requires_grad_(False).eval()


def _average(text: Encoder) -> Tensor:
    """Make the last layer one that takes the mean of all tokens; what its output has to be multiplied with [D, D].

    A norm has no part in the direction of (1, 1 ... 1). The layer before ends with one, (x - bias) / weight of which
    has none either: so what comes out of it is constant in one direction, and a reflection (Householder) of that one
    to the other loses nothing that differs between texts.
    """
    *_, before, layer = text.trunk.layers
    assert isinstance(before, Block)
    assert isinstance(layer, Block)
    assert isinstance(layer.attention, Attention)
    norm = before.feedforward_norm["residual"]
    assert isinstance(norm, Norm)
    constant_D = F.normalize(1 / torch.where(norm.weight.abs() < LEAST_SCALE, LEAST_SCALE, norm.weight), dim=0)
    away_D = constant_D - len(constant_D) ** -0.5
    turn_DD = torch.eye(len(away_D)) - 2 * torch.outer(away_D, away_D) / (away_D @ away_D).clamp(min=1e-12)
    for name, parameter in layer.named_parameters():
        parameter.fill_("_norm." in name and name.endswith("weight"))
    layer.attention.v.weight.copy_(turn_DD)
    layer.attention.o.weight.copy_(MEAN_WEIGHT * torch.eye(len(turn_DD)))
    return turn_DD


def join(vision: VisionTransformer, text: Encoder, seed: int) -> DualEncoder:
    """A model of both, whose weights it takes over: of `vision`, a ViT or a DINOv2, and of `text`, from
    `pooled_encoder`. The space is that of the text's vectors, which their projection leaves as they are; all of that
    side is locked. The pictures' projection is fresh, and so is what published files read of a ViT beyond its own
    (a pooler).
    """
    width = text.config.trunk.width
    sees = published_vision(vision.config, width).model_copy(update={"mask_token": False})
    model = DualEncoder(DualEncoderConfig(vision=sees, text=text.config, projection=width))
    initialise(model, seed)
    kept = {name: tensor for name, tensor in vision.state_dict().items() if not name.startswith("mask.")}
    model.vision.load_state_dict(kept, strict=False)
    model.text = text
    torch.nn.init.eye_(model.text_projection.weight)
    lock_texts(model)
    return model


def lock_texts(model: DualEncoder) -> None:
    """Train the side of pictures alone (and how sharply both are compared)."""
    model.requires_grad_(True)
    model.text.requires_grad_(False)
    model.text_projection.requires_grad_(False)


@torch.no_grad()
def read_locked(model: DualEncoder, texts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
    """The vector [projection] of each of these texts, the same in every run."""
    different = sorted(set(texts), key=lambda ids: (len(ids), ids))
    parts = [different[start : start + TOGETHER] for start in range(0, len(different), TOGETHER)]
    return {ids: row_D for part in parts for ids, row_D in zip(part, model.encode_texts(part), strict=True)}


@torch.no_grad()
def likeness(text: Encoder, pooling: PoolingConfig, known: Mapping[tuple[int, ...], Tensor]) -> float:
    """The lowest cosine between the vectors of `read_locked` and what `text` gives by its own pooling."""
    found = []
    for ids, vector_D in known.items():
        own_D = pool(text(torch.tensor(ids), *sequence_layout([len(ids)])), [len(ids)], pooling)[0]
        found.append(F.cosine_similarity(own_D, vector_D, dim=0))
    return float(torch.stack(found).min())
