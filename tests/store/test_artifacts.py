"""What runs made, in the store: whole versions or none, with their lineage, beside what was pulled."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from craton.checkpoints.sources import BuiltIn, SourceKind
from craton.errors import CheckpointError, StoreError, UsageError
from craton.store import damaged_models, find, list_models, pull, remove, verify
from craton.store.artifacts import check_model_name, publish_model
from craton.store.manifest import Parent
from craton.store.models import StoredModel
from craton.store.ulid import new_ulid

BASE = (Parent(relation="base", name="other@v1"), Parent(relation="trained_on", name="data.jsonl"))
ADAPTED = (Parent(relation="adapter_of", name="other@v1"),)


def safetensors(values: int = 4) -> bytes:
    header = json.dumps({"weight": {"dtype": "F32", "shape": [values], "data_offsets": [0, 4 * values]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4 * values)


def model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(safetensors())
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(safetensors())


def publish(
    name: str = "mine", build: Callable[[Path], None] = model, parents: tuple[Parent, ...] = BASE, **more: Any
) -> StoredModel:
    return publish_model(name, build, source=f"run:{new_ulid()}", parents=parents, licence="mit", **more)


def ids() -> list[str]:
    return [stored.id for stored in list_models()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own model folder."""
    folder = tmp_path / "pulled"
    folder.mkdir()
    model(folder)
    return folder


def test_a_model_that_a_run_made(craton_home: Path) -> None:
    stages: list[str] = []
    made = publish(progress=lambda stage, done, total: stages.append(stage))
    assert (made.id, made.kind, made.licence, made.parents, made.base) == ("mine@v1", SourceKind.RUN, "mit", BASE, None)
    assert made.source.startswith("run:01")
    assert made.path == craton_home / "models" / "mine" / "v1"
    assert made.is_new
    assert not made.in_place
    assert [file.path for file in made.files] == ["README.md", "config.json", "model.safetensors"]
    assert set(stages) == {"hashing"}
    assert find("mine").path == made.path
    assert verify("mine") == []
    assert list((craton_home / "tmp").iterdir()) == []


def test_an_adapter_says_of_what(craton_home: Path) -> None:
    made = publish(build=adapter, parents=ADAPTED)
    assert (made.kind, made.base) == (SourceKind.ADAPTER, "other@v1")
    assert find("mine").path == craton_home / "models" / "mine" / "v1"
    assert verify("mine@v1") == []
    assert remove("mine") == ["mine@v1"]
    with pytest.raises(ValueError, match="adapter_of"):
        publish(build=adapter)
    assert list_models() == []


def test_each_time_the_next_version() -> None:
    assert [publish().id, publish(build=adapter, parents=ADAPTED).id, publish().id] == ["mine@v1", "mine@v2", "mine@v3"]
    assert find("mine@v1").kind is SourceKind.RUN
    remove("mine@v3")
    (find("mine@v2").path / "manifest.json").write_text("{")
    assert publish().id == "mine@v3"


def test_damage_is_found_and_the_remedy_is_no_pull() -> None:
    path = publish().path
    os.truncate(path / "model.safetensors", 10)
    assert [str(problem) for problem in verify("mine")] == ["changed: model.safetensors"]
    with pytest.raises(StoreError, match="damaged") as caught:
        find("mine")
    assert "craton rm mine@v1" in str(caught.value.remedy)
    assert "pull" not in str(caught.value.remedy)


def test_what_is_pulled_and_what_is_made_have_different_names(folder: Path, fake_model: BuiltIn) -> None:
    pull(str(folder))
    publish("mine")
    for name, owner in (("pulled", "a model from"), ("fake", "a built-in model")):
        with pytest.raises(UsageError, match=f"belongs to {owner}") as caught:
            check_model_name(name)
        assert "--name" in str(caught.value.remedy)
        with pytest.raises(UsageError, match="belongs to"):
            publish(name)
    with pytest.raises(UsageError, match="'mine' belongs to a model from run:"):
        pull(str(folder), name="mine")
    assert pull("mine").id == "mine@v1"  # nothing to fetch
    assert not pull("mine").is_new
    assert ids() == ["mine@v1", "pulled@v1"]


def test_a_name_that_was_pulled_while_the_model_was_built(folder: Path) -> None:
    def build(target: Path) -> None:
        model(target)
        pull(str(folder), name="mine")

    with pytest.raises(UsageError, match="belongs to a model from"):
        publish(build=build)
    assert ids() == ["mine@v1"]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "X", "x@v1", "مدل"])
def test_names_that_are_no_names(name: str) -> None:
    for act in (check_model_name, publish):
        with pytest.raises(UsageError, match="name"):
            act(name)


def test_lineage_that_the_store_does_not_know() -> None:
    with pytest.raises(ValueError, match="grandchild_of"):
        publish(parents=(Parent(relation="grandchild_of", name="x"),))
    with pytest.raises(ValueError, match="somewhere"):
        publish_model("mine", model, source="somewhere", parents=(), licence=None)


def test_a_build_that_fails_or_makes_nothing_leaves_nothing(craton_home: Path) -> None:
    def fail(target: Path) -> None:
        model(target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(build=fail)
    with pytest.raises(CheckpointError, match="no weights"):
        publish(build=lambda target: (target / "config.json").write_text("{}") and None)
    assert [*list_models(), *damaged_models()] == []
    assert list((craton_home / "tmp").iterdir()) == []


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_refuses(craton_home: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def refuse(*arguments: object, **keywords: object) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StoreError, match="No space"):
            publish()
    assert [*list_models(), *damaged_models()] == []
    assert publish().id == "mine@v1"


def test_without_locks_no_version_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    first = publish()
    numbers = iter([1, 1, 2])  # another process published version 1 after we had looked
    monkeypatch.setattr("craton.store.artifacts.next_version", lambda name: next(numbers))
    assert publish().id == "mine@v2"
    assert verify("mine@v1") == verify("mine@v2") == []
    assert find("mine@v1").source == first.source


PUBLISH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_artifacts
print(test_artifacts.publish("mine").id)
"""


def test_processes_that_publish_at_once_get_different_versions() -> None:
    here = str(Path(__file__).parent)
    processes = [
        subprocess.Popen([sys.executable, "-c", PUBLISH, here], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert sorted(process.communicate()[0].strip() for process in processes) == ["mine@v1", "mine@v2", "mine@v3"]
    assert [verify(name) for name in ids()] == [[], [], []]
