"""Masks of what a click or a box means: the prompts and the two-way decoder of Segment Anything (Kirillov 2023, arXiv
2304.02643) over the Vision Transformer that everything else here sees with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import pi
from typing import Final

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from craton.config import Settings
from craton.errors import UsageError
from craton.models.vision import VisionConfig, VisionTransformer, patchify
from craton.trunk import CrossAttentionConfig, FeedForwardConfig, Linear, NormConfig, TrunkConfig
from craton.trunk.config import Activation
from craton.trunk.cross_attention import CrossAttention
from craton.trunk.feedforward import ACTIVATIONS, FeedForward
from craton.trunk.norms import Norm

INSIDE, OUTSIDE, NO_POINT = 1, 0, -1  # labels of points; the last fills up shorter lists
FINER: Final = 4  # rows of a mask for each row of patches
NECK_NORM: Final = NormConfig(kind="layer", eps=1e-6, bias=True)
LAST_NORM: Final = NormConfig(kind="layer", eps=1e-5, bias=True)


class SegmenterConfig(Settings):
    """vision: what sees, without extra tokens, last norm, pooling and projection. width: of the map that it becomes
    and of the decoder. layers, heads, hidden, activation: of the two-way decoder; its attentions between prompts and
    picture have half the width. masks: guesses where a prompt is ambiguous, beside the single one. iou_layers,
    iou_hidden: of what guesses a mask's quality. mask_channels: of the path by which an earlier mask comes in.
    """

    vision: VisionConfig
    width: PositiveInt = Field(default=256, multiple_of=8)
    layers: PositiveInt = 2
    heads: PositiveInt = 8
    hidden: PositiveInt = 2048
    activation: Activation = "relu"
    eps: PositiveFloat = 1e-6
    masks: PositiveInt = 3
    iou_layers: int = Field(default=3, ge=2)
    iou_hidden: PositiveInt = 256
    mask_channels: PositiveInt = Field(default=16, multiple_of=4)
    prompt_activation: Activation = "gelu"
    prompt_eps: PositiveFloat = 1e-6

    @model_validator(mode="after")
    def _fits(self) -> SegmenterConfig:
        vision = self.vision
        if vision.extra or vision.projection or vision.trunk.final_norm is not None or vision.pooling != "mean":
            raise ValueError("what sees must give its patches' vectors as they are")
        if vision.image[0] != vision.image[1] or vision.image[0] % vision.patch:
            raise ValueError(f"pictures of {vision.image} are no squares of whole patches of {vision.patch}")
        if self.width % (2 * self.heads):
            raise ValueError(f"half a width of {self.width} is not split into {self.heads} heads")
        return self

    @property
    def trunk(self) -> TrunkConfig:
        """Of what sees."""
        return self.vision.trunk

    @property
    def side(self) -> int:
        """Pixels of a side of the square that it sees."""
        return self.vision.image[0]

    @property
    def mask_size(self) -> tuple[int, int]:
        """Rows and columns of the logits of a mask."""
        rows, columns = self.vision.grid
        return FINER * rows, FINER * columns


class FourierPositions(nn.Module):
    """Places as sines and cosines of fixed random frequencies (Tancik 2020, arXiv 2006.10739): points [..., 2], each
    (x, y) from 0 to 1 -> [..., width]. fp32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(2, width // 2), requires_grad=False)

    def forward(self, points: Tensor) -> Tensor:
        # Never trained, not even where all parameters of a loaded model are.
        turns = 2 * pi * ((2 * points.float() - 1) @ self.frequencies.detach().float())
        return torch.cat((turns.sin(), turns.cos()), -1)


class PromptTokens(nn.Embedding):
    """Vectors that are added to sines and cosines or stand beside them, and so begin at their size."""


class Doubling(nn.ConvTranspose2d):
    """x[B, inputs, H, W] -> [B, outputs, 2 H, 2 W] in x's dtype, as the trunk's linear layer does it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 2, stride=2)

    def forward(self, x_BCHW: Tensor, output_size: list[int] | None = None) -> Tensor:
        assert output_size is None
        assert self.bias is not None
        return F.conv_transpose2d(x_BCHW, self.weight.to(x_BCHW.dtype), self.bias.to(x_BCHW.dtype), stride=2)


class PromptEncoder(nn.Module):
    """What the user points at, as tokens for the decoder."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.side, width, channels = config.side, config.width, config.mask_channels
        norm = NormConfig(kind="layer", eps=config.prompt_eps, bias=True)
        self.positions = FourierPositions(width)
        self.kinds = PromptTokens(4, width)  # outside, inside, a box's first and its second corner
        self.no_point = PromptTokens(1, width)
        self.no_mask = PromptTokens(1, width)
        # Two convolutions over windows that do not overlap, as linear layers of the windows.
        self.mask_in = Linear(4, channels // 4)
        self.mask_norm = Norm(norm, channels // 4)
        self.mask_middle = Linear(channels, channels)
        self.mask_middle_norm = Norm(norm, channels)
        self.mask_out = Linear(channels, width)
        self.activation = ACTIVATIONS[config.prompt_activation]

    def points(self, points_BQ2: Tensor, labels_BQ: Tensor) -> Tensor:
        """[B, Q, width]."""
        at_BQD = self.positions((points_BQ2 + 0.5) / self.side)  # a pixel's place is its middle
        kind_BQD = self.kinds(labels_BQ.clamp(0))
        return torch.where((labels_BQ == NO_POINT)[..., None], self.no_point.weight, at_BQD + kind_BQD)

    def boxes(self, boxes_B4: Tensor) -> Tensor:
        """[B, 2, width]."""
        at_B2D: Tensor = self.positions((boxes_B4.unflatten(-1, (2, 2)) + 0.5) / self.side)
        return at_B2D + self.kinds.weight[2:]

    def masks(self, masks_B1HW: Tensor) -> Tensor:
        """Logits [B, 1, H, W] -> what is added to the map of the picture, [B, H / 4 * W / 4, width]."""
        rows, columns = masks_B1HW.shape[2] // 2, masks_B1HW.shape[3] // 2
        x_BNC = self.activation(self.mask_norm(self.mask_in(patchify(masks_B1HW, 2))))
        x_BCHW = x_BNC.transpose(1, 2).unflatten(2, (rows, columns))
        x_BNC = self.activation(self.mask_middle_norm(self.mask_middle(patchify(x_BCHW, 2))))
        out_BND: Tensor = self.mask_out(x_BNC)
        return out_BND


class TwoWayLayer(nn.Module):
    """Prompts attend to each other and to the picture, then the picture to the prompts; norms follow the branches."""

    def __init__(self, config: SegmenterConfig, *, first: bool) -> None:
        super().__init__()
        width, self.first = config.width, first
        norm = NormConfig(kind="layer", eps=config.eps, bias=True)
        feedforward = FeedForwardConfig(hidden=config.hidden, activation=config.activation, bias=True)
        self.among = CrossAttention(_attention(config, 1), width)
        self.among_norm = Norm(norm, width)
        self.look = CrossAttention(_attention(config, 2), width)
        self.look_norm = Norm(norm, width)
        self.feedforward = FeedForward(feedforward, width)
        self.feedforward_norm = Norm(norm, width)
        self.mark = CrossAttention(_attention(config, 2), width)
        self.mark_norm = Norm(norm, width)

    def forward(self, x_BQD: Tensor, image_BND: Tensor, at_BQD: Tensor, at_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts' tokens and the picture's, both with where they are beside them: the same two."""
        if self.first:  # so far nothing but their places is in them
            x_BQD = _attend(self.among, x_BQD, x_BQD, x_BQD)
        else:
            x_BQD = x_BQD + _attend(self.among, x_BQD + at_BQD, x_BQD + at_BQD, x_BQD)
        x_BQD = self.among_norm(x_BQD)
        x_BQD = self.look_norm(x_BQD + _attend(self.look, x_BQD + at_BQD, image_BND + at_ND, image_BND))
        x_BQD = self.feedforward_norm(x_BQD + self.feedforward(x_BQD))
        image_BND = self.mark_norm(image_BND + _attend(self.mark, image_BND + at_ND, x_BQD + at_BQD, x_BQD))
        return x_BQD, image_BND


class Perceptron(nn.Module):
    """Linear layers with ReLU between them. x[..., sizes[0]] -> [..., sizes[-1]]."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        out: Tensor = self.layers[-1](x)
        return out


class MaskDecoder(nn.Module):
    """Tokens of the prompts and the map of the picture -> masks, and how good each of them is thought to be."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config, width, count = config, config.width, config.masks + 1
        self.quality_token = PromptTokens(1, width)
        self.mask_tokens = PromptTokens(count, width)
        self.layers = nn.ModuleList(TwoWayLayer(config, first=number == 0) for number in range(config.layers))
        self.look = CrossAttention(_attention(config, 2), width)
        self.look_norm = Norm(LAST_NORM, width)
        self.enlarge = Doubling(width, width // 4)
        self.enlarge_norm = Norm(NECK_NORM, width // 4)
        self.enlarge_again = Doubling(width // 4, width // 8)
        self.mask_heads = nn.ModuleList(Perceptron((width, width, width, width // 8)) for _ in range(count))
        hidden = (config.iou_hidden,) * (config.iou_layers - 1)
        self.quality_head = Perceptron((width, *hidden, count))

    def forward(self, prompts_BQD: Tensor, image_BND: Tensor, at_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 1 + masks, H, W] and qualities [B, 1 + masks]: the single mask first."""
        count = len(prompts_BQD)
        first_QD = torch.cat((self.quality_token.weight, self.mask_tokens.weight)).to(prompts_BQD.dtype)
        at_BQD = torch.cat((first_QD.expand(count, -1, -1), prompts_BQD), 1)
        x_BQD = at_BQD
        for layer in self.layers:
            x_BQD, image_BND = layer(x_BQD, image_BND, at_BQD, at_ND)
        x_BQD = self.look_norm(x_BQD + _attend(self.look, x_BQD + at_BQD, image_BND + at_ND, image_BND))
        large_BCHW = self.enlarge(image_BND.transpose(1, 2).unflatten(2, self.config.vision.grid))
        large_BHWC = F.gelu(self.enlarge_norm(large_BCHW.permute(0, 2, 3, 1)))
        larger_BCHW = F.gelu(self.enlarge_again(large_BHWC.permute(0, 3, 1, 2)))
        weights_BMC = torch.stack([head(x_BQD[:, 1 + m]) for m, head in enumerate(self.mask_heads)], 1)
        logits_BMHW = (weights_BMC @ larger_BCHW.flatten(2)).unflatten(2, larger_BCHW.shape[2:])
        return logits_BMHW, self.quality_head(x_BQD[:, 0])


class Segmenter(nn.Module):
    """A picture is seen once; each prompt then costs a small decoder."""

    def __init__(self, config: SegmenterConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.vision = VisionTransformer(config.vision)
        self.neck_in = Linear(config.vision.trunk.width, width, bias=False)
        self.neck_in_norm = Norm(NECK_NORM, width)
        self.neck_out = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.neck_out_norm = Norm(NECK_NORM, width)
        self.prompts = PromptEncoder(config)
        self.decoder = MaskDecoder(config)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """The map [B, width, rows, columns] of pictures of the side that it was made for.

        Raises UsageError for other pictures.
        """
        if tuple(pixels_BCHW.shape[2:]) != self.config.vision.image:
            height, width = pixels_BCHW.shape[2:]
            raise UsageError(
                f"a picture of {height} x {width} pixels, and the model sees {self.config.side} x {self.config.side}",
                remedy="resize its longer side and fill up the other",
            )
        x_BND = self.neck_in_norm(self.neck_in(self.vision(pixels_BCHW)))
        x_BCHW = x_BND.transpose(1, 2).unflatten(2, self.config.vision.grid)
        x_BCHW = F.conv2d(x_BCHW, self.neck_out.weight.to(x_BCHW.dtype), padding=1)
        normed_BHWC: Tensor = self.neck_out_norm(x_BCHW.permute(0, 2, 3, 1))
        return normed_BHWC.permute(0, 3, 1, 2)

    def decode(
        self,
        image_BCHW: Tensor,
        points_BQ2: Tensor | None = None,
        labels_BQ: Tensor | None = None,
        boxes_B4: Tensor | None = None,
        masks_B1HW: Tensor | None = None,
        *,
        several: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, M, H, W] of masks (above 0 is inside; `config.mask_size`) and their expected IoU [B, M].

        image_BCHW: of `encode`; a single one serves all prompts. points_BQ2: (x, y) in pixels of the picture, with
        labels `INSIDE`, `OUTSIDE` or `NO_POINT`. boxes_B4: x0, y0, x1, y1. masks_B1HW: logits of an earlier answer, to
        be made better. several: M = `config.masks` guesses for a prompt that may mean several things, else M = 1.

        Raises UsageError where nothing is pointed at.
        """
        tokens = []
        if points_BQ2 is not None:
            assert labels_BQ is not None, "points without labels"
            if boxes_B4 is None:  # as trained: one point more that is none
                points_BQ2, labels_BQ = F.pad(points_BQ2, (0, 0, 0, 1)), F.pad(labels_BQ, (0, 1), value=NO_POINT)
            tokens.append(self.prompts.points(points_BQ2, labels_BQ))
        if boxes_B4 is not None:
            tokens.append(self.prompts.boxes(boxes_B4))
        if not tokens and masks_B1HW is None:
            raise UsageError("nothing says what to segment", remedy="give a point, a box or an earlier mask")
        count = next(len(t) for t in (points_BQ2, boxes_B4, masks_B1HW) if t is not None)
        dtype = image_BCHW.dtype
        image_BND = image_BCHW.flatten(2).transpose(1, 2).expand(count, -1, -1)
        given = self.prompts.no_mask.weight if masks_B1HW is None else self.prompts.masks(masks_B1HW.to(dtype))
        rows, columns = self.config.vision.grid
        y_N, x_N = torch.cartesian_prod(_middles(rows, image_BND), _middles(columns, image_BND)).unbind(1)
        at_ND = self.prompts.positions(torch.stack((x_N, y_N), 1)).to(dtype)
        none_BQD = image_BND.new_zeros(count, 0, self.config.width)
        prompts_BQD = torch.cat([none_BQD, *(part.to(dtype) for part in tokens)], 1)
        logits_BMHW, quality_BM = self.decoder(prompts_BQD, image_BND + given.to(dtype), at_ND)
        chosen = slice(1, None) if several else slice(0, 1)
        return logits_BMHW[:, chosen], quality_BM[:, chosen]


def _attention(config: SegmenterConfig, narrower: int) -> CrossAttentionConfig:
    return CrossAttentionConfig(
        heads=config.heads,
        kv_heads=config.heads,
        head_size=config.width // narrower // config.heads,
        context_width=config.width,
        bias=("q", "k", "v", "o"),
    )


def _attend(attention: CrossAttention, x_BQD: Tensor, keyed_BSD: Tensor, context_BSD: Tensor) -> Tensor:
    return attention.attend_to(x_BQD.flatten(0, 1), context_BSD, keyed_BSD).view_as(x_BQD)


def _middles(count: int, like: Tensor) -> Tensor:
    return (torch.arange(count, device=like.device) + 0.5) / count
