"""Pictures and texts in one space: CLIP (Radford 2021, arXiv 2103.00020), SigLIP (Zhai 2023, arXiv 2303.15343), and any
two encoders side by side (LiT, Zhai 2022, arXiv 2111.07991)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from craton.config import Settings
from craton.models.encoder import Encoder, EncoderConfig
from craton.models.vision import VisionConfig, VisionTransformer
from craton.trunk import Linear, TrunkConfig


class DualEncoderConfig(Settings):
    """projection: width of the space. projection_bias: of the text's projection. pad: the token that fills every text
    up to the context, all of which is then read (SigLIP); None: a text is read as long as it is (CLIP). A text's
    vector is its last token's; of a text side with a pooler (BERT) its first token's, through a dense layer and tanh.
    logit_bias: logits are scale * cosine + bias (SigLIP), else without the bias.
    """

    vision: VisionConfig
    text: EncoderConfig
    projection: PositiveInt
    projection_bias: bool = False
    pad: NonNegativeInt | None = None
    logit_bias: bool = False

    @property
    def trunk(self) -> TrunkConfig:
        """The text side's."""
        return self.text.trunk

    @property
    def vocab(self) -> int:
        """The text side's."""
        return self.text.vocab

    @property
    def context(self) -> int:
        """The longest text in tokens."""
        return self.text.context

    @property
    def lower_case(self) -> bool:
        """Whether texts are read in lower case, as CLIP and SigLIP were trained; a BERT's tokeniser knows its own."""
        return not self.text.pooler


class DualEncoder(nn.Module):
    """`encode_images` and `encode_texts` give unit vectors whose products say how well they belong together."""

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionTransformer(config.vision)
        self.text = Encoder(config.text)
        self.text_projection = Linear(config.text.trunk.width, config.projection, bias=config.projection_bias)
        self.logits = Similarity(config.logit_bias)

    def encode_images(self, pixels_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, projection], fp32."""
        return F.normalize(self.vision.encode(pixels_BCHW).float(), dim=-1)

    def encode_texts(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Unit vectors [B, projection], fp32, of texts given as token ids, each of 1 to `context` of them."""
        config, device = self.config, self.text.embedding.weight.device
        if config.pad is not None:
            texts = [[*ids, *[config.pad] * (config.context - len(ids))] for ids in texts]
        lengths = torch.tensor([len(ids) for ids in texts], device=device)
        ids_T = torch.tensor([token for ids in texts for token in ids], device=device)
        positions_T = torch.cat([torch.arange(len(ids), device=device) for ids in texts])
        segments_T = torch.arange(len(texts), device=device).repeat_interleave(lengths)
        hidden_TD = self.text(ids_T, positions_T, segments_T)
        return self.pool_texts(hidden_TD, lengths)

    def pool_texts(self, hidden_TD: Tensor, lengths_B: Tensor) -> Tensor:
        """Unit vectors [B, projection], fp32, of the token vectors of packed texts of these lengths."""
        ends_B = lengths_B.cumsum(0)
        if self.text.pooler is None:
            pooled_BD = hidden_TD[ends_B - 1]
        else:
            pooled_BD = self.text.pooler(hidden_TD[ends_B - lengths_B]).tanh()
        vectors_BD: Tensor = self.text_projection(pooled_BD)
        return F.normalize(vectors_BD.float(), dim=-1)

    def forward(self, pixels_BCHW: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits [pictures, texts]: of a softmax over either side (CLIP), or of each pair alone (SigLIP)."""
        logits_BB: Tensor = self.logits(self.encode_images(pixels_BCHW), self.encode_texts(texts))
        return logits_BB


class Similarity(nn.Module):
    """Logits [A, B] of unit vectors [A, D] and [B, D]: exp(scale) * cosine (+ bias). Both are learned, in fp32.

    They begin at CLIP's temperature of 0.07, with a bias at SigLIP's 10 and -10.
    """

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(self.initial("scale", bias)))
        self.bias = nn.Parameter(torch.tensor(self.initial("bias", bias))) if bias else None

    @staticmethod
    def initial(name: str, bias: bool) -> float:
        """What a fresh parameter is."""
        if name == "bias":
            return -10.0
        return 2.302585 if bias else 2.659260  # ln 10, ln(1 / 0.07)

    def forward(self, a_AD: Tensor, b_BD: Tensor) -> Tensor:
        logits_AB = self.scale.float().exp() * (a_AD @ b_BD.T)
        return logits_AB if self.bias is None else logits_AB + self.bias.float()
