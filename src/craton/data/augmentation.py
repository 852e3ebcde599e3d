"""What training may do to a picture, as settings: no torch is needed to read them."""

from __future__ import annotations

from pydantic import Field

from craton.config import Settings


class AugmentSettings(Settings):
    """How training changes a picture, each time anew. Nothing is changed when a model is measured."""

    crop: float = Field(default=1.0, gt=0, le=1, description="the smallest share of the area that is kept (1: all)")
    shift: float = Field(default=0.0, ge=0, le=0.5, description="it is moved by at most this share of its side")
    flip: bool = Field(default=False, description="half of them are mirrored")
    colour: float = Field(default=0.0, ge=0, le=1, description="how far brightness and contrast may be from 1")
    erase: float = Field(default=0.0, ge=0, le=1, description="share of them in which a rectangle is blotted out")
