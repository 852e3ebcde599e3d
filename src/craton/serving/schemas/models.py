"""`/v1/models/load` and `/v1/models/unload`."""

from __future__ import annotations

from craton.serving.schemas.common import Body, Name


class LoadRequest(Body):
    """A model of the store to be loaded; needs an admin key."""

    model: Name


class UnloadRequest(Body):
    """A model to be unloaded once its answers are written; needs an admin key."""

    model: Name
