"""Manifests survive a round trip, and damaged or hostile ones are refused in words."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.checkpoints.sources import SourceKind
from craton.errors import StoreError
from craton.store.manifest import MANIFEST_NAME, FileEntry, Manifest, Parent, read_manifest, write_manifest

GOOD = Manifest(
    name="mine",
    version=2,
    kind=SourceKind.FOLDER,
    source="/models/مدل",
    created="2026-01-02T03:04:05+00:00",
    location="/models/مدل",
    files=(FileEntry(path="a/b.safetensors", sha256="0" * 64, size=5, mtime_ns=7),),
    licence="mit",
    parents=(Parent(relation="base", name="other@v1"),),
)


def test_a_round_trip(tmp_path: Path) -> None:
    write_manifest(tmp_path, GOOD)
    assert read_manifest(tmp_path) == GOOD
    table = json.loads((tmp_path / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert table["schema"] == 1
    assert table["kind"] == "folder"
    assert "مدل" in (tmp_path / MANIFEST_NAME).read_text(encoding="utf-8")
    with pytest.raises(StoreError, match="File exists"):
        write_manifest(tmp_path, GOOD)


@pytest.mark.parametrize(
    "change",
    [
        {"surplus": 1},
        {"version": 0},
        {"version": "2"},
        {"kind": "cloud"},
        {"name": None},
        {"location": "../../elsewhere"},
        {"location": ""},
        {"files": [{"path": "../x", "sha256": "0" * 64, "size": 1, "mtime_ns": 1}]},
        {"files": [{"path": "/etc/passwd", "sha256": "0" * 64, "size": 1, "mtime_ns": 1}]},
        {"files": [{"path": "x", "sha256": "zz", "size": 1, "mtime_ns": 1}]},
        {"files": [{"path": "x", "sha256": "0" * 64, "size": -1, "mtime_ns": 1}]},
        {"parents": [{"relation": "base"}]},
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_manifest(tmp_path, GOOD)
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change))
    with pytest.raises(StoreError, match="manifest is damaged") as caught:
        read_manifest(tmp_path)
    assert caught.value.where == str(path)


def test_a_newer_schema_is_not_called_damage(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text('{"schema": 2, "anything": 1}')
    with pytest.raises(StoreError, match="newer Craton"):
        read_manifest(tmp_path)


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file"):
        read_manifest(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_never_escape_as_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / MANIFEST_NAME
    path.unlink(missing_ok=True)
    write_manifest(tmp_path, GOOD)
    raw = bytearray(path.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    with contextlib.suppress(StoreError):
        read_manifest(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"1", b'{"schema": true}', b"[" * 100_000, b'{"schema": 1e400}'])
def test_anything_else_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(raw)
    with pytest.raises(StoreError):
        read_manifest(tmp_path)
