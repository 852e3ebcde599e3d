"""What tests of several verbs share: the program in this process, with a store of its own, and a small task."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

import craton.cli


@pytest.fixture
def craton_(tmp_path, monkeypatch, capsys):
    """Run a command; gives its standard output, and fails on another exit status than the one asked for."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))

    def run(*words: object, status: int = 0, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "argv", ["craton", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        got = craton.cli._run()
        out, err = capsys.readouterr()
        assert got == status, out + err
        return out + (err if status else "")

    return run


@pytest.fixture
def task(tmp_path) -> Path:
    rows = [
        {"text": f"the word number {i} is {'red' if i % 2 else 'blue'}", "label": ["zam", "zim"][i % 2]}
        for i in range(60)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
