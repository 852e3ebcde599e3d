"""The masked autoencoder: an encoder sees a few patches, a small decoder paints the others (He 2021, arXiv
2111.06377)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from craton.models.vision import VisionTransformer
from craton.trunk import Linear, Trunk, TrunkConfig


class MaskedAutoencoder(nn.Module):
    """Only the encoder is kept when it is trained: the decoder serves its training."""

    def __init__(self, encoder: VisionTransformer, decoder: TrunkConfig, grid: tuple[int, int]) -> None:
        """grid: rows and columns of patches of the pictures that it is trained on."""
        super().__init__()
        self.encoder = encoder
        config, width = encoder.config, decoder.width
        rows, columns = grid
        self.enter = Linear(config.trunk.width, width)
        self.hidden = nn.Embedding(1, width)  # what stands for a patch that was not seen
        self.positions = nn.Embedding(config.extra + rows * columns, width)
        self.decoder = Trunk(decoder)
        self.leave = Linear(width, config.channels * config.patch**2)

    def forward(self, pixels_BCHW: Tensor, kept_BM: Tensor) -> Tensor:
        """Painted patches [B, N, C * patch * patch] of pictures of which the patches `kept_BM` are seen."""
        extra = self.encoder.config.extra
        seen_BMD = self.enter(self.encoder(pixels_BCHW, kept_BM=kept_BM))
        count, total, width = len(seen_BMD), self.positions.num_embeddings, seen_BMD.shape[-1]
        x_BND = self.hidden.weight.to(seen_BMD.dtype).expand(count, total, -1)
        first_BE = torch.arange(extra, device=kept_BM.device).expand(count, -1)
        places_BM = torch.cat((first_BE, kept_BM + extra), 1)
        x_BND = x_BND.scatter(1, places_BM[..., None].expand(-1, -1, width), seen_BMD)
        x_BND = x_BND + self.positions.weight.to(x_BND.dtype)
        places_T = torch.arange(total, device=kept_BM.device).repeat(count)
        out_TD = self.decoder(x_BND.flatten(0, 1), places_T, row=total)
        painted_BNX: Tensor = self.leave(out_TD.view(count, total, -1)[:, extra:])
        return painted_BNX
