"""What `craton quantize` may be told."""

from __future__ import annotations

import re
from typing import Final, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator

from craton.config import Settings

Method = Literal["rtn", "gptq", "awq", "hqq"]
PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]
UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class CalibrationSettings(Settings):
    """What a method looks at, and what the result is judged by: text, pictures or sounds, as the model reads them."""

    calibration: tuple[str, ...] = Field(
        default=(),
        description='to calibrate with and judge by: text files, or records with a "text" (none: Python\'s own '
        "docstrings); for a model that sees or hears, folders of pictures or recordings",
    )
    samples: PositiveInt = Field(default=64, description="windows (pictures, recordings) to calibrate with")
    window: PositiveInt = Field(default=512, ge=16, description="tokens of a window of text")
    seed: NonNegativeInt = Field(default=0, description="of the choice of windows")


class QuantizeSettings(CalibrationSettings):
    """Weights as integers of few bits."""

    bits: Literal[2, 3, 4, 8] = Field(default=4, description="of a weight: 8, 4, 3 or 2")
    method: Method = Field(
        default="awq",
        description="rtn and hqq need no data; gptq makes up for what rounding loses; awq scales what matters",
    )
    group: Literal[32, 64, 128] = Field(default=32, description="weights that share a scale: 32, 64 or 128")
    zeros: bool | None = Field(
        default=None, description="each group has a zero besides its scale (default: for hqq, and below 4 bits)"
    )
    tune: NonNegativeInt = Field(
        default=0,
        description="steps in which each block's roundings and scales are trained to give what it gave before "
        "(SignRound); 100 take minutes for a small model and gain more than the choice of a method",
    )
    act: Literal["int8"] | None = Field(
        default=None, description="int8: the file asks that layers round their inputs to 8 bits, too"
    )
    keep: tuple[str, ...] = Field(
        default=("lm_head",), description="layers to leave as they are, by name or a part of it, with commas"
    )
    size: str | None = Field(
        default=None,
        description="the weights' bytes at most (80MB): each matrix gets the bits that cost least; instead of --bits",
    )
    format: Literal["safetensors", "gguf"] = Field(
        default="safetensors", description="safetensors in the layout of compressed-tensors, or one GGUF file"
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _split_keep(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        return tuple(name for part in parts for name in part.split(",")) if isinstance(parts, list | tuple) else value

    @field_validator("size")
    @classmethod
    def _is_size(cls, value: str | None) -> str | None:
        if value is not None:
            parse_bytes(value)
        return value

    def symmetric(self, bits: int) -> bool:
        """Whether a matrix of so many bits has no zeros."""
        if self.zeros is not None:
            return not self.zeros
        return bits == 8 or (bits == 4 and self.method != "hqq")


class PruneSettings(CalibrationSettings):
    """Single weights set to 0."""

    method: PruneMethod = Field(
        default="wanda",
        description="magnitude needs no data; wanda weighs sizes by inputs; sparsegpt makes up for what is lost",
    )
    sparsity: str = Field(
        default="0.5", description="the share to remove (0.5), or how many to keep of how many neighbours (2:4, 4:8)"
    )
    keep: tuple[str, ...] = Field(
        default=("lm_head",), description="layers to leave as they are, by name or a part of it, with commas"
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _split_keep(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        return tuple(name for part in parts for name in part.split(",")) if isinstance(parts, list | tuple) else value


def parse_bytes(text: str) -> int:
    """ "80MB" as bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size: write 80MB or 1.5GB")
    return int(float(match[1]) * UNITS[match[2].upper()])
