"""Where the home folder is, and what is said when it cannot be used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from craton.errors import StoreError
from craton.store.folders import home, make_folder


def test_the_order_of_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("CRATON_HOME", "~/mine")
    assert home() == tmp_path / "user" / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CRATON_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("CRATON_HOME", "")
    assert home() == tmp_path / "data" / "craton"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert home() == tmp_path / "user" / ".local" / "share" / "craton"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert home() == tmp_path / "user" / ".local" / "share" / "craton"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="a file, not a folder") as caught:
        home()
    assert "CRATON_HOME" in str(caught.value.remedy)
    with pytest.raises(StoreError, match="cannot create the folder"):
        make_folder(tmp_path / "file" / "models")


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "permissions"), (errno.EROFS, "read-only"), (errno.ENOSPC, "free some space")],
)
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=os.strerror(number)) as caught:
        make_folder(tmp_path / "models")
    assert remedy in str(caught.value.remedy)
    assert caught.value.where == str(tmp_path / "models")
