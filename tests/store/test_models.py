"""Finding, listing and verifying what is stored."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from craton.checkpoints.sources import BuiltIn, SourceKind
from craton.errors import DownloadError, StoreError, UnknownName, UsageError
from craton.store import Problem, damaged_models, find, list_models, pull, verify
from craton.store import models as reading


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own model folder."""
    folder = tmp_path / "My Model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


def ids() -> list[str]:
    return [model.id for model in list_models()]


# --- find ---------------------------------------------------------------------------------------------------------


def test_a_stored_model_by_name_and_version(folder: Path) -> None:
    pull(str(folder))
    (folder / "config.json").write_text('{"a": 1}')
    pull(str(folder))
    assert find("my-model").id == "my-model@v2"
    assert find("my-model@v1").version == 1
    assert find("my-model").path == folder
    assert find("my-model").licence == "mit"
    with pytest.raises(UnknownName, match="my-model@v9") as caught:
        find("my-model@v9")
    assert "'my-model@v1'" in str(caught.value.remedy)


def test_paths_are_used_in_place_without_being_stored(folder: Path, craton_home: Path) -> None:
    (folder / "m.gguf").touch()
    for path, kind in (
        (folder, SourceKind.FOLDER),
        (folder / "m.gguf", SourceKind.GGUF),
        (folder / "model.safetensors", SourceKind.SAFETENSORS),
    ):
        model = find(str(path))
        assert (model.path, model.kind, model.version, model.folder) == (path, kind, 0, None)
        assert model.in_place
        assert model.id == model.name == path.stem
    assert not craton_home.exists()


def test_a_built_in_model_that_was_not_pulled_says_how(fake_model: BuiltIn) -> None:
    with pytest.raises(UsageError, match="not been fetched") as caught:
        find("fake")
    assert caught.value.remedy == "craton pull fake"


def test_a_built_in_model_is_found_under_the_name_it_was_pulled_by(fake_model: BuiltIn) -> None:
    pull("fake", name="mine")
    assert find("fake").id == "mine@v1"
    assert find("fake").path.name == "model.gguf"


def test_unknown_names_are_compared_with_stored_ones(folder: Path) -> None:
    pull(str(folder))
    with pytest.raises(UnknownName) as caught:
        find("my-modle")
    assert "'my-model'" in str(caught.value.remedy)


@pytest.mark.parametrize("name", ["../models/x", "x/../../y", "/models", "x@v1/../..", "x@v0", "x@v01", "x\0", "X y"])
def test_names_cannot_leave_the_store(name: str) -> None:
    with pytest.raises(UsageError):
        find(name)


def test_hub_models_are_looked_up_in_the_cache_only(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, ...]] = []

    def snapshot(repo: str, revision: str | None, *, cached_only: bool) -> Path:
        asked.append((repo, revision, cached_only))
        return folder

    monkeypatch.setattr(reading, "hub_snapshot", snapshot)
    model = find("hf:org/name@main")
    assert asked == [("org/name", "main", True)]
    assert (model.name, model.path, model.version, model.licence) == ("name", folder, 0, "mit")


def test_a_hub_model_that_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(DownloadError) as caught:
        find("hf:org/name")
    assert "craton pull hf:org/name" in str(caught.value.remedy)


def test_a_recorded_folder_that_is_gone(folder: Path) -> None:
    pull(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match="is gone") as caught:
        find("my-model")
    assert "craton rm my-model@v1" in str(caught.value.remedy)


def test_a_stored_file_that_is_cut_short(fake_model: BuiltIn) -> None:
    path = pull("fake").path
    os.truncate(path, 10)
    with pytest.raises(StoreError, match=r"model\.gguf is missing or cut short") as caught:
        find("fake")
    assert "craton pull fake" in str(caught.value.remedy)


def test_the_store_may_be_moved(fake_model: BuiltIn, craton_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull("fake")
    moved = craton_home.rename(craton_home.with_name("moved"))
    monkeypatch.setenv("CRATON_HOME", str(moved))
    assert find("fake").path == moved / "models" / "fake" / "v1" / "model.gguf"
    assert verify("fake") == []


# --- list ---------------------------------------------------------------------------------------------------------


def test_an_empty_store_lists_nothing_and_creates_nothing(craton_home: Path) -> None:
    assert list_models() == []
    assert damaged_models() == []
    assert not craton_home.exists()


def test_models_are_listed_by_name_and_number(folder: Path, fake_model: BuiltIn) -> None:
    for i in range(11):
        (folder / "config.json").write_text(str(i))
        pull(str(folder), name="mine")
    pull("fake")
    assert ids() == ["fake@v1", *(f"mine@v{i}" for i in range(1, 12))]
    assert find("mine").version == 11


def test_damage_to_one_model_hides_no_other(folder: Path, fake_model: BuiltIn, craton_home: Path) -> None:
    pull("fake")
    pull(str(folder))
    (craton_home / "models" / "my-model" / "v1" / "manifest.json").write_text("{")
    (craton_home / "models" / "empty" / "v1").mkdir(parents=True)
    shutil.copytree(craton_home / "models" / "fake" / "v1", craton_home / "models" / "copied" / "v7")
    (craton_home / "models" / "Not A Name" / "v1").mkdir(parents=True)
    (craton_home / "models" / "fake" / "notes").mkdir()
    (craton_home / "models" / "stray-file").touch()
    assert ids() == ["fake@v1"]
    assert [Path(str(error.where)).parts[-3:] for error in damaged_models()] == [
        ("models", "copied", "v7"),
        ("empty", "v1", "manifest.json"),
        ("my-model", "v1", "manifest.json"),
    ]
    with pytest.raises(StoreError, match="damaged"):
        find("my-model")


# --- verify -------------------------------------------------------------------------------------------------------


def test_verify_finds_what_changed_is_missing_or_new(fake_model: BuiltIn) -> None:
    root = pull("fake").root
    calls: list[tuple[str, int, int]] = []
    assert verify("fake", lambda *call: calls.append(call)) == []
    assert calls[-1] == ("checking", fake_model.model_bytes, fake_model.model_bytes)

    content = bytearray((root / "model.gguf").read_bytes())
    stat = (root / "model.gguf").stat()
    content[500] ^= 1
    (root / "model.gguf").write_bytes(content)
    os.utime(root / "model.gguf", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the hash can tell
    (root / "config.json").unlink()
    (root / "1_Pooling" / "extra.json").write_text("{}")
    problems = verify("fake@v1")
    assert problems == [
        Problem("missing", "config.json"),
        Problem("changed", "model.gguf"),
        Problem("extra", "1_Pooling/extra.json"),
    ]
    assert str(problems[1]) == "changed: model.gguf"


def test_verify_of_a_users_folder_looks_at_the_models_files_only(folder: Path) -> None:
    pull(str(folder))
    (folder / "README.md").write_text("changed")
    (folder / "train.log").write_text("new")
    assert verify("my-model") == []
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    assert verify("my-model") == [Problem("missing", "model.safetensors")]
    shutil.rmtree(folder)
    assert {problem.what for problem in verify("my-model")} == {"missing"}


def test_verify_wants_a_stored_name(folder: Path) -> None:
    for name in (str(folder), "nothing", "fake", "../x"):
        with pytest.raises(UnknownName, match="stored model"):
            verify(name)


# --- cost ---------------------------------------------------------------------------------------------------------


def test_the_store_needs_neither_torch_nor_the_hub(fake_model: BuiltIn, folder: Path) -> None:
    pull("fake")
    program = (
        "import json, sys; from craton.store import find, list_models, remove, verify; "
        "verify('fake'); find('fake'); list_models(); remove('fake'); "
        f"find({str(folder)!r}); "
        "print(json.dumps([name for name in ('torch', 'huggingface_hub', 'numpy') if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
