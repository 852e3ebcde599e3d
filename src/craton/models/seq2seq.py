"""Speech to text: an encoder over a log-mel spectrogram, and a decoder that attends to it (Whisper, Radford 2022,
arXiv 2212.04356)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import PositiveInt
from torch import Tensor, nn

from craton.config import Settings
from craton.trunk import ContextView, KVCache, Linear, Trunk, TrunkConfig


class Seq2SeqConfig(Settings):
    """mels: bins of the spectrogram. frames: vectors that the encoder makes of one window, which is of twice as many
    frames of the spectrogram. context: the longest text in tokens. tied: the head's weight is the embedding's."""

    vocab: PositiveInt
    context: PositiveInt
    mels: PositiveInt
    frames: PositiveInt
    encoder: TrunkConfig
    decoder: TrunkConfig
    tied: bool = True

    @property
    def trunk(self) -> TrunkConfig:
        """The decoder's: what writes the text."""
        return self.decoder


class ConvFrontEnd(nn.Module):
    """Two convolutions over time, the second of stride 2: [B, mels, 2n] -> [B, n, width]."""

    def __init__(self, mels: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mels, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)

    def forward(self, mel_BMF: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(mel_BMF)))).transpose(1, 2)


class Seq2Seq(nn.Module):
    """`encode` a window of sound once, then decode text that attends to it."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.front = ConvFrontEnd(config.mels, config.encoder.width)
        self.encoder = Trunk(config.encoder)
        self.embedding = nn.Embedding(config.vocab, config.decoder.width)
        self.decoder = Trunk(config.decoder)
        self.head = Linear(config.decoder.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight

    def encode(self, mel_BMF: Tensor) -> Tensor:
        """Vectors [B, frames, width] of windows of 2 * frames columns of a spectrogram."""
        x_BSD = self.front(mel_BMF)
        count, frames = x_BSD.shape[:2]
        positions_T = torch.arange(frames, device=x_BSD.device).repeat(count)
        return self.encoder(x_BSD.flatten(0, 1), positions_T, row=frames).view_as(x_BSD)

    def hidden(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        segments_T: Tensor | None,
        context: ContextView,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Final hidden states [T, width] of the text; context: from `decoder.read`. See `Trunk.forward`."""
        return self.decoder(self.embedding(ids_T), positions_T, segments_T, cache, context=context)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Logits [T, vocab] of hidden states."""
        logits_TV: Tensor = self.head(hidden_TD)
        return logits_TV

    def forward(self, mel_BMF: Tensor, ids_Bn: Tensor) -> Tensor:
        """Logits [B, n, vocab] of texts of equal length, one for each window."""
        (count, length), device = ids_Bn.shape, ids_Bn.device
        numbers_T = torch.arange(count, device=device).repeat_interleave(length)
        context = self.decoder.read(self.encode(mel_BMF)).view(numbers_T.tolist())
        positions_T = torch.arange(length, device=device).repeat(count)
        hidden_TD = self.hidden(ids_Bn.flatten(), positions_T, numbers_T, context)
        return self.logits(hidden_TD).unflatten(0, (count, length))
