"""What a reference means, which files make a model, and the hub's cache (against a hub of our own on the loopback)."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.sources import (
    BUILT_IN,
    SourceKind,
    hub_snapshot,
    licence_of,
    model_files,
    parse_reference,
)
from craton.errors import (
    CheckpointError,
    CratonError,
    DownloadError,
    FileFormatError,
    StoreError,
    UnknownName,
    UsageError,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# --- references ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()  # a folder of that name does not hide the built-in model
    reference = parse_reference(name)
    assert (reference.kind, reference.text) == (SourceKind.BUILTIN, name)
    assert parse_reference(f"./{name}").kind is SourceKind.FOLDER


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("hf:org/name", "org/name", None),
        ("hf:Org-1/Na.me_2@main", "Org-1/Na.me_2", "main"),
        (f"hf:org/name@{COMMIT}", "org/name", COMMIT),
        ("hf:org/name@refs/pr/1", "org/name", "refs/pr/1"),
    ],
)
def test_hub_references(text: str, repo: str, revision: str | None) -> None:
    reference = parse_reference(text)
    assert (reference.kind, reference.repo, reference.revision) == (SourceKind.HUB, repo, revision)
    assert reference.text == text


@pytest.mark.parametrize(
    "text",
    [
        *("hf:", "hf:name", "hf:a/b/c", "hf:../name", "hf:org/..", "hf:org/na..me", "hf:/etc/passwd", "hf:org/name@"),
        *("hf:org/name@../x", "hf:org/name@a..b", "hf:org/name@/x", "hf:org/na--me", "hf:org /name", "hf:org/name@a b"),
        *("hf:org\\name", "hf:-org/name", "hf:org/نام"),
    ],
)
def test_malformed_hub_references(text: str) -> None:
    with pytest.raises(UsageError, match="does not name a model on the hub"):
        parse_reference(text)


@pytest.mark.parametrize("text", ["", "  ", "a\nb", "a\0b", "\x1b[31m", "hf:org/name\n", "\ud800", "a\x7f"])
def test_empty_names_and_control_characters_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_reference(text)


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "مدل\u200cمن"
    folder.mkdir()
    for name in ("m.gguf", "m.safetensors", "M.GGUF"):
        (folder / name).touch()
    assert parse_reference(folder.name).path == folder
    assert parse_reference(f"./{folder.name}/../{folder.name}/").text == str(folder)
    for name, kind in (("m.gguf", SourceKind.GGUF), ("m.safetensors", SourceKind.SAFETENSORS)):
        reference = parse_reference(f"{folder.name}/{name}")
        assert (reference.kind, reference.path) == (kind, folder / name)
    assert parse_reference(f"{folder.name}/M.GGUF").kind is SourceKind.GGUF
    monkeypatch.setenv("HOME", str(folder))
    assert parse_reference("~/m.gguf").path == folder / "m.gguf"


def test_a_file_of_the_hubs_cache_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "abc").touch()
    (tmp_path / "m.gguf").symlink_to("abc")
    assert parse_reference(str(tmp_path / "m.gguf")).path == tmp_path / "m.gguf"


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "model.pt", "x.PTH"):
        (tmp_path / name).touch()
        with pytest.raises(FileFormatError, match="is a pickle") as caught:
            parse_reference(str(tmp_path / name))
        assert "safetensors" in str(caught.value.remedy)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="not a model file"):
        parse_reference(str(tmp_path / "notes.txt"))
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(UsageError, match="not a model file"):
        parse_reference(str(tmp_path / "pipe.gguf"))


@pytest.mark.parametrize("text", ["no/such", "./no", "../no", "/no/such/thing", "~/no-such", "no.gguf", "no.bin", "a/"])
def test_a_path_with_nothing_there(text: str) -> None:
    with pytest.raises(UsageError, match="no such file or folder") as caught:
        parse_reference(text)
    assert caught.value.code == "usage"


def test_remedies() -> None:
    with pytest.raises(UnknownName) as caught:
        parse_reference("SmolLM2-135M-Instruct")
    assert "'smollm2-135m-instruct'" in str(caught.value.remedy)
    with pytest.raises(UnknownName) as caught:
        parse_reference("my-modle", known=["my-model"])
    assert "'my-model'" in str(caught.value.remedy)
    with pytest.raises(UsageError) as wrong:
        parse_reference("org/name")
    assert "hf:org/name" in str(wrong.value.remedy)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30) | st.text(alphabet="./\\~:@hfabc-_\0\n", max_size=20))
def test_any_text_is_understood_or_refused(text: str) -> None:
    with contextlib.suppress(CratonError):
        reference = parse_reference(text)
        assert reference.repo is None or ".." not in reference.repo
        assert reference.path is None or reference.path.is_absolute()


# --- the files of a model -----------------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def test_model_files_are_the_models_and_nothing_else(tmp_path: Path) -> None:
    mine = ["1_Pooling/config.json", "config.json", "merges.txt", "model.safetensors", "spiece.model", "t.jinja"]
    others = ["pytorch_model.bin", "modeling.py", "README.md", "notes.txt", "onnx/config.json", ".cache/a.json"]
    fill(tmp_path, *mine, *others, "consolidated.safetensors", "checkpoint-5/model.safetensors", "a/b/c.json")
    assert model_files(tmp_path) == mine


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    fill(tmp_path, "config.json")
    with pytest.raises(CheckpointError, match="no weights"):
        model_files(tmp_path)
    fill(tmp_path, "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights here: pytorch_model\.bin"):
        model_files(tmp_path)
    fill(tmp_path, "m.gguf")
    assert model_files(tmp_path) == ["config.json", "m.gguf"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model", "apache-2.0"),
        ('---\nlicense: "mit"\n---\n', "mit"),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense:\n- a\n---\n", None),
        ("\0\ufffd", None),
    ],
)
def test_the_licence_of_a_card(tmp_path: Path, card: str, licence: str | None) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text(card)
    assert licence_of(tmp_path) == licence


# --- the hub ------------------------------------------------------------------------------------------------------


def cached_snapshot(cache: Path, *names: str) -> Path:
    """A repository in the hub cache's published layout: refs, and snapshots of links into blobs."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    for name in names:
        blob = repo / "blobs" / hashlib.sha256(name.encode()).hexdigest()
        fill(blob.parent, blob.name)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    fill(repo / "refs")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that refuses connections."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("revision", "cached_only"), [(None, False), ("main", False), (None, True), ("main", True), (COMMIT, True)]
)
def test_a_cached_snapshot_needs_no_network(no_hub: Path, revision: str | None, cached_only: bool) -> None:
    snapshot = cached_snapshot(no_hub, "config.json", "model.safetensors")
    assert hub_snapshot("org/name", revision, cached_only=cached_only) == snapshot


def test_what_is_not_cached_says_how_to_get_it(no_hub: Path) -> None:
    with pytest.raises(DownloadError, match=r"not .* in the hub's cache") as caught:
        hub_snapshot("org/name", cached_only=True)
    assert "craton pull hf:org/name" in str(caught.value.remedy)
    with pytest.raises(DownloadError, match="Connect"):
        hub_snapshot("org/name", "main")


@pytest.mark.parametrize(
    ("name", "words", "remedy"),
    [
        ("GatedRepoError", "consent", "accept the terms"),
        ("RepositoryNotFoundError", "no such public model", "check the name"),
        ("RevisionNotFoundError", "no such revision", "after @"),
        ("HfHubHTTPError", "HfHubHTTPError: a fault", "try again"),
    ],
)
def test_the_hubs_refusals_in_words(monkeypatch: pytest.MonkeyPatch, name: str, words: str, remedy: str) -> None:
    hub = pytest.importorskip("huggingface_hub")
    kind = getattr(hub.errors, name)

    def refuse(*arguments: Any, **keywords: Any) -> str:
        error = kind.__new__(kind)  # the constructors want a response of the transport
        error.args = ("a fault\nand more",)
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(DownloadError, match=words) as caught:
        hub_snapshot("org/name", "v1")
    assert remedy in str(caught.value.remedy)
    assert caught.value.where == "hf:org/name@v1"


def test_a_full_disk_under_the_cache_is_a_store_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*arguments: Any, **keywords: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(StoreError, match="No space left"):
        hub_snapshot("org/name")


class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a snapshot needs."""

    files: ClassVar = {
        "config.json": b"{}",
        "model.safetensors": bytes(200_000),
        "README.md": b"---\nlicense: mit\n---\n",
        "1_Pooling/config.json": b"{ }",
        "pytorch_model.bin": b"pickle",
        "modeling.py": b"code",
        "onnx/model.json": b"[]",
    }
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        name = path.removeprefix(f"/org/name/resolve/{COMMIT}/")
        if path == "/api/models/org/name/revision/main":
            self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/org/name/tree/{COMMIT}":
            sizes = {name: (len(data), self.etag(data)) for name, data in self.files.items()}
            tree = [{"type": "file", "path": name, "size": size, "oid": oid} for name, (size, oid) in sizes.items()]
            self.answer(json.dumps(tree).encode())
        elif name in self.files:
            data = self.files[name]
            self.answer(data, {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(b"", {"X-Error-Code": "RepoNotFound"}, status=401)

    def answer(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha1(data).hexdigest()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    pytest.importorskip("huggingface_hub")
    Hub.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


PROGRAM = """
import json, sys
from craton.checkpoints.sources import hub_snapshot, model_files
from craton.errors import CratonError
calls = []
try:
    folder = hub_snapshot(sys.argv[1], progress=lambda *call: calls.append(call))
    print(json.dumps({"files": model_files(folder), "calls": calls, "torch": "torch" in sys.modules}))
except CratonError as error:
    print(json.dumps(error.as_dict()))
"""


def test_a_real_fetch_takes_weights_and_settings_only(hub: str, tmp_path: Path) -> None:
    def fetch(endpoint: str, repo: str) -> dict[str, Any]:
        settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", PROGRAM, repo]
        done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
        assert done.stderr == ""  # the library's bars are not ours to print
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    first = fetch(hub, "org/name")
    assert first["files"] == ["1_Pooling/config.json", "config.json", "model.safetensors"]
    assert first["torch"] is False
    stages, done, total = zip(*first["calls"], strict=True)
    assert set(stages) == {"downloading"}
    assert (done[-1], total[-1]) == (200_026, 200_026)
    assert sorted(done) == list(done)
    fetched = {path.partition(f"{COMMIT}/")[2] for path in Hub.asked if "/resolve/" in path}
    assert fetched == {"config.json", "model.safetensors", "README.md", "1_Pooling/config.json"}
    assert all("/org/name" in path for path in Hub.asked)  # and nothing else is told to the hub

    assert fetch("http://127.0.0.1:9", "org/name")["files"] == first["files"]
    assert "no such public model" in fetch(hub, "org/other")["what"]
