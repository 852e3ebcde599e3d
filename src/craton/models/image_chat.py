"""Chat about pictures: a Vision Transformer whose patches become tokens of a causal language model.

LLaVA (Liu 2023, arXiv 2310.03744) and Idefics 3 / SmolVLM (Laurençon 2024, arXiv 2408.12637; Marafioti 2025,
arXiv 2504.05299).
"""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from craton.errors import UsageError
from craton.models.causal_lm import CausalLM, CausalLMConfig
from craton.models.vision import VisionConfig, VisionTransformer
from craton.trunk import KVCache, Linear
from craton.trunk.config import Activation
from craton.trunk.feedforward import ACTIVATIONS


class ImageChatConfig(CausalLMConfig):
    """vision: what sees; its trunk has the layers that are used and no others. image_token: the id at whose places the
    tokens of pictures stand. keep_class: its class token becomes a token as well. shuffle: so many rows and columns of
    patches become one token (Idefics 3's pixel shuffle). projector: two linear layers with an activation between them,
    or one without bias.
    """

    vision: VisionConfig
    image_token: NonNegativeInt
    keep_class: bool = False
    shuffle: PositiveInt = 1
    projector: Literal["mlp", "linear"] = "mlp"
    projector_activation: Activation = "gelu"
    projector_bias: bool = True

    @model_validator(mode="after")
    def _fits(self) -> ImageChatConfig:
        if self.image_token >= self.vocab:
            raise ValueError(f"the image token {self.image_token} is not in the vocabulary of {self.vocab}")
        if self.keep_class and not (self.vision.class_token and self.shuffle == 1):
            raise ValueError("there is no class token to keep")
        if any(side % self.shuffle for side in self.vision.grid):
            raise ValueError(f"{self.vision.grid} patches are not made of squares of {self.shuffle}")
        return self

    @property
    def picture_tokens(self) -> int:
        """Tokens of one picture (one tile, where pictures are split)."""
        rows, columns = self.vision.grid
        return rows * columns // self.shuffle**2 + self.keep_class


class Projector(nn.Module):
    """Patches to tokens of the language model: x[..., width of the patches] -> [..., width of the model]."""

    def __init__(self, config: ImageChatConfig) -> None:
        super().__init__()
        width, bias = config.trunk.width, config.projector == "mlp" and config.projector_bias
        self.activation = ACTIVATIONS[config.projector_activation]
        self.up = Linear(config.vision.trunk.width * config.shuffle**2, width, bias=bias)
        self.down = Linear(width, width, bias=bias) if config.projector == "mlp" else None

    def forward(self, x_BND: Tensor) -> Tensor:
        up_BND: Tensor = self.up(x_BND)
        return up_BND if self.down is None else self.down(self.activation(up_BND))


class ImageChat(CausalLM):
    """A causal language model that also sees: where a prompt has the image token, vectors of pictures stand instead of
    its embedding. Without pictures it is the language model that it was made from, to the engine too."""

    config: ImageChatConfig

    def __init__(self, config: ImageChatConfig) -> None:
        assert config.embedding_scale is None, "no published model scales the vectors of its pictures"
        super().__init__(config)
        self.vision = VisionTransformer(config.vision)
        self.projector = Projector(config)

    def see(self, pixels_BCHW: Tensor) -> Tensor:
        """The tokens [B, picture_tokens, width] of pictures of the size that it was trained on: whole ones, without
        padding (Idefics 3's fractional positions are then those of the plain grid).

        Raises UsageError for pictures of another size, which would be another number of tokens.
        """
        config = self.config
        if tuple(pixels_BCHW.shape[2:]) != config.vision.image:
            given, wanted = (" x ".join(map(str, sides)) for sides in (pixels_BCHW.shape[2:], config.vision.image))
            raise UsageError(f"a picture of {given} pixels was given, the model sees {wanted}")
        patches_BND = self.vision(pixels_BCHW)
        if not config.keep_class:
            patches_BND = patches_BND[:, config.vision.extra :]
        if config.shuffle > 1:
            patches_BND = shuffled(patches_BND, config.vision.grid, config.shuffle)
        tokens_BND: Tensor = self.projector(patches_BND)
        return tokens_BND

    def hidden(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None = None,
        cache: KVCache | None = None,
        row: int | None = None,
        *,
        seen_T: Tensor | None = None,
        seen_ND: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states [T, width]. seen_T: True at the N tokens in whose place the vectors seen_ND stand, in
        their order (see `see`); the ids there are not read. The rest: see `CausalLM.hidden`."""
        if seen_T is None or seen_ND is None:
            return super().hidden(ids_T, positions_T, segments_T, cache, row)
        x_TD = self.embedding(ids_T)
        if self.compute_dtype is not None:
            x_TD = x_TD.to(self.compute_dtype)
        # Not in place: the gradient goes to the projector and to the embeddings of the text.
        x_TD = x_TD.masked_scatter(seen_T[:, None], seen_ND.to(x_TD.dtype))
        return self.trunk(x_TD, positions_T, segments_T, cache, row)

    def logits_of(self, ids_T: Tensor, positions_T: Tensor, pixels_BCHW: Tensor) -> Tensor:
        """Logits [T, vocab] of a text with pictures, whose tokens stand, one picture after the other, where `ids_T` is
        the image token.

        Raises UsageError where there are more or fewer image tokens than the pictures have.
        """
        seen_T, seen_ND = ids_T == self.config.image_token, self.see(pixels_BCHW).flatten(0, 1)
        if int(seen_T.sum()) != len(seen_ND):
            raise UsageError(f"the text has {int(seen_T.sum())} image tokens, the pictures {len(seen_ND)}")
        return self.logits(self.hidden(ids_T, positions_T, seen_T=seen_T, seen_ND=seen_ND))


def shuffled(patches_BND: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Squares of `side` x `side` patches become one vector each, row by row: [B, N, D] -> [B, N / side^2, side^2 D]."""
    rows, columns = grid
    squares = patches_BND.unflatten(1, (rows // side, side, columns // side, side))
    return squares.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
