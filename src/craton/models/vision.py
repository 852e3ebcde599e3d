"""The Vision Transformer: pictures cut into patches, and the trunk over them (Dosovitskiy 2020, arXiv 2010.11929)."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from craton.config import Settings
from craton.errors import UsageError
from craton.trunk import CrossAttentionConfig, FeedForwardConfig, Linear, NormConfig, Trunk, TrunkConfig
from craton.trunk.cross_attention import CrossAttention
from craton.trunk.feedforward import FeedForward
from craton.trunk.norms import Norm

ImagePooling = Literal["cls", "mean", "cls_mean", "pooler", "attention"]


class VisionConfig(Settings):
    """image: height and width of the pictures that it was trained on, in pixels. patch: side of a patch.

    class_token, registers: extra tokens before the patches (Darcet 2023, arXiv 2309.16588). mask_token: a vector that
    stands for hidden patches. patch_bias: of the patch embedding. positions: learned vectors for the class token and
    the patches, or the patches' centres, for a trunk with rotary positions on two axes (DINOv3). pooling: the one
    vector of a picture: the class token's, the patches' mean, both side by side, the class token's through a dense
    layer and tanh ("pooler"), or what a learned query finds by attention (SigLIP, arXiv 2303.15343). projection: width
    to which that vector is taken, without bias (0: none).
    """

    image: tuple[PositiveInt, PositiveInt]
    patch: PositiveInt
    channels: PositiveInt = 3
    trunk: TrunkConfig
    class_token: bool = True
    registers: NonNegativeInt = 0
    mask_token: bool = False
    patch_bias: bool = True
    positions: Literal["learned", "centres"] = "learned"
    antialias: bool = Field(default=False, description="smooth learned positions where they are shrunk to fewer rows")
    pooling: ImagePooling = "cls"
    projection: NonNegativeInt = 0

    @field_validator("patch")
    @classmethod
    def _fits(cls, patch: int, info: ValidationInfo) -> int:
        if any(side < patch for side in info.data.get("image", ())):
            raise ValueError("a patch is larger than the picture")
        return patch

    @field_validator("pooling")
    @classmethod
    def _readable(cls, pooling: ImagePooling, info: ValidationInfo) -> ImagePooling:
        if pooling not in ("mean", "attention") and not info.data.get("class_token", True):
            raise ValueError("there is no class token to read")
        return pooling

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a picture of the size that it was trained on."""
        return self.image[0] // self.patch, self.image[1] // self.patch

    @property
    def extra(self) -> int:
        """Tokens before the patches."""
        return int(self.class_token) + self.registers

    @property
    def pooled_width(self) -> int:
        """Numbers of a picture's vector before the projection."""
        return self.trunk.width * (2 if self.pooling == "cls_mean" else 1)

    @property
    def width(self) -> int:
        """Numbers of a picture's vector."""
        return self.projection or self.pooled_width


class AttentionPool(nn.Module):
    """One vector of many: a learned query attends to them, and a feed-forward follows (Zhai 2023, arXiv 2303.15343).

    tokens_BND -> [B, width].
    """

    def __init__(self, width: int, heads: int, feedforward: FeedForwardConfig, norm: NormConfig) -> None:
        super().__init__()
        config = CrossAttentionConfig(
            heads=heads, kv_heads=heads, head_size=width // heads, context_width=width, bias=("q", "k", "v", "o")
        )
        self.query = nn.Embedding(1, width)
        self.attention = CrossAttention(config, width)
        self.norm = Norm(norm, width)
        self.feedforward = FeedForward(feedforward, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        count = len(tokens_BND)
        query_BD = self.query.weight.to(tokens_BND.dtype).expand(count, -1)
        x_BD: Tensor = self.attention.attend_to(query_BD, tokens_BND)
        return x_BD + self.feedforward(self.norm(x_BD))


class VisionTransformer(nn.Module):
    """Token vectors of pictures, and one vector for each of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.trunk.width
        rows, columns = config.grid
        # A linear layer and no convolution: adapters, quantisation and pruning swap linear layers.
        self.patches = Linear(config.channels * config.patch**2, width, bias=config.patch_bias)
        self.extra = nn.Embedding(config.extra, width) if config.extra else None
        self.mask = nn.Embedding(1, width) if config.mask_token else None
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.class_token + rows * columns, width) if learned else None
        self.trunk = Trunk(config.trunk)
        self.pooler = Linear(width, width) if config.pooling == "pooler" else None
        if config.pooling == "attention":
            layer = config.trunk.layers[-1]
            assert isinstance(layer.feedforward, FeedForwardConfig)
            self.attention_pool: AttentionPool | None = AttentionPool(
                width, layer.attention.heads, layer.feedforward, layer.norm
            )
        else:
            self.attention_pool = None
        pooled = config.pooled_width
        self.projection = Linear(pooled, config.projection, bias=False) if config.projection else None
        self.compute_dtype: torch.dtype | None = None  # training: of all activations; None: the weights'

    def forward(
        self,
        pixels_BCHW: Tensor,
        hidden_BN: Tensor | None = None,
        kept_BM: Tensor | None = None,
        taps: dict[int, Tensor] | None = None,
    ) -> Tensor:
        """Token vectors [B, extra + N, width] of pictures of one size, whose sides are multiples of a patch.

        hidden_BN: True where a patch is replaced by the mask token. kept_BM: the numbers of the M patches of each
        picture that are read at all; the answer is then [B, extra + M, width]. taps: see `Trunk.forward`.
        Raises UsageError for pictures of another number of channels or with sides that are no multiples of a patch.
        """
        config = self.config
        count, _, height, width = pixels_BCHW.shape
        if (height, width) == config.image:  # which need not be whole patches: as a convolution, the rest is left out
            height, width = (side // config.patch * config.patch for side in config.image)
            pixels_BCHW = pixels_BCHW[:, :, :height, :width]
        self._check(pixels_BCHW.shape)
        dtype = self.compute_dtype or self.patches.weight.dtype
        grid = (height // config.patch, width // config.patch)
        x_BND: Tensor = self.patches(patchify(pixels_BCHW.to(dtype), config.patch))
        if hidden_BN is not None:
            assert self.mask is not None, "this model has no mask token"
            x_BND = torch.where(hidden_BN[..., None], self.mask.weight.to(dtype), x_BND)
        if self.positions is not None:
            at_ED, at_ND = self._positions(grid)
            x_BND = x_BND + at_ND.to(dtype)
        else:
            at_ED = None
        if kept_BM is not None:
            x_BND = x_BND.gather(1, kept_BM[..., None].expand(-1, -1, x_BND.shape[-1]))
        if self.extra is not None:
            extra_ED = self.extra.weight
            if at_ED is not None and config.class_token:
                extra_ED = torch.cat((extra_ED[:1] + at_ED, extra_ED[1:]))
            x_BND = torch.cat((extra_ED.to(dtype).expand(count, -1, -1), x_BND), 1)
        tokens = x_BND.shape[1]
        out_TD = self.trunk(x_BND.flatten(0, 1), self._places(count, grid, kept_BM), row=tokens, taps=taps)
        for layer in taps or {}:
            assert taps is not None
            taps[layer] = taps[layer].view(count, tokens, -1)
        return out_TD.view(count, tokens, -1)

    def pool(self, tokens_BND: Tensor) -> Tensor:
        """One vector [B, width] for each picture, by the config's pooling and projection."""
        pooled_BD = pool_tokens(tokens_BND, self.config)
        if self.pooler is not None:
            pooled_BD = self.pooler(pooled_BD).tanh()
        if self.attention_pool is not None:
            pooled_BD = self.attention_pool(tokens_BND)
        return pooled_BD if self.projection is None else self.projection(pooled_BD)

    def encode(self, pixels_BCHW: Tensor) -> Tensor:
        """One vector [B, width] for each picture."""
        return self.pool(self(pixels_BCHW))

    def _check(self, shape: Sequence[int]) -> None:
        config = self.config
        if shape[1] != config.channels:
            raise UsageError(f"the pictures have {shape[1]} channels, the model reads {config.channels}")
        if shape[2] % config.patch or shape[3] % config.patch or not shape[2] or not shape[3]:
            raise UsageError(
                f"pictures of {shape[2]} x {shape[3]} pixels are not made of whole patches of {config.patch} x "
                f"{config.patch}",
                remedy=f"resize them to multiples of {config.patch}",
            )

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor]:
        # The class token's and the patches' position vectors; on another grid those of the patches are interpolated.
        assert self.positions is not None
        first, trained = int(self.config.class_token), self.config.grid
        table = self.positions.weight
        at_ED, at_ND = (table[:first] if first else None), table[first:]
        if grid != trained:
            square = at_ND.float().T.unflatten(1, trained)[None]
            resized = F.interpolate(square, size=grid, mode="bicubic", antialias=self.config.antialias)
            at_ND = resized[0].flatten(1).T
        return at_ED, at_ND

    def _places(self, count: int, grid: tuple[int, int], kept_BM: Tensor | None) -> Tensor:
        # What the trunk rotates by: each patch's centre, from -2 pi to 2 pi; the extra tokens are not turned.
        device, extra = self.patches.weight.device, self.config.extra
        if self.positions is not None:  # they are in the vectors already
            tokens = extra + (grid[0] * grid[1] if kept_BM is None else kept_BM.shape[1])
            return torch.arange(tokens, device=device).repeat(count)
        sides = [2 * pi * ((torch.arange(n, device=device) + 0.5) / n * 2 - 1) for n in grid]
        centres_NA = torch.cartesian_prod(*sides)
        if kept_BM is None:
            return torch.cat((centres_NA.new_zeros(extra, 2), centres_NA)).repeat(count, 1)
        kept_BMA = centres_NA[kept_BM]
        return torch.cat((kept_BMA.new_zeros(count, extra, 2), kept_BMA), 1).flatten(0, 1)


def pool_tokens(tokens_BND: Tensor, config: VisionConfig, pooling: ImagePooling | None = None) -> Tensor:
    """What `pooling` (the config's unless given) reads of token vectors: [B, width], or twice that for "cls_mean"."""
    pooling = pooling or config.pooling
    if pooling == "cls_mean":
        return torch.cat((tokens_BND[:, 0], tokens_BND[:, config.extra :].mean(1)), -1)
    return tokens_BND[:, config.extra :].mean(1) if pooling == "mean" else tokens_BND[:, 0]


def patchify(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """The pixels [B, N, C * patch * patch] of each patch, row by row; within one: channels, then rows, then columns."""
    count, channels, height, width = pixels_BCHW.shape
    rows, columns = height // patch, width // patch
    cut = pixels_BCHW.reshape(count, channels, rows, patch, columns, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(count, rows * columns, channels * patch * patch)


def unpatchify(patches_BNX: Tensor, patch: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`: pixels [B, C, H, W] of patches that make a grid of these rows and columns."""
    count, (rows, columns) = len(patches_BNX), grid
    cut = patches_BNX.reshape(count, rows, columns, -1, patch, patch)
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(count, -1, rows * patch, columns * patch)
