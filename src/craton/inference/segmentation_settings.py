"""What can be asked of a segmentation of everything."""

from __future__ import annotations

from pydantic import Field

from craton.config import Settings


class EverythingSettings(Settings):
    """Which masks are kept where nothing was pointed at (Kirillov 2023, arXiv 2304.02643, appendix B)."""

    points_per_side: int = Field(
        32, ge=1, le=128, description="rows and columns of the grid of points, each of which asks for its masks"
    )
    min_iou: float = Field(
        0.88, ge=0, le=1, description="masks that the model itself expects to fit less well are left out"
    )
    min_stability: float = Field(
        0.95, ge=0, le=1, description="masks that change more than this with a slightly other threshold are left out"
    )
    max_overlap: float = Field(
        0.7,
        ge=0,
        le=1,
        description="of two masks whose boxes overlap more (IoU), the one expected to fit less is left out",
    )
