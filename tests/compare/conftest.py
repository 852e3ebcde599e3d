"""Tasks that a comparison can be run on within seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_lines(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def class_task(tmp_path) -> Path:
    """Two classes; the test rows hold a marker that nothing else does."""
    rows = [
        {"text": f"the word number {i} is {'red' if i % 2 else 'blue'}", "label": "zim" if i % 2 else "zam"}
        for i in range(30)
    ]
    write_lines(tmp_path / "train.jsonl", rows)
    tests = [
        {"text": f"MARKER what is {i}, {'red' if i % 2 else 'blue'}", "label": "zim" if i % 2 else "zam"}
        for i in range(12)
    ]
    write_lines(tmp_path / "test.jsonl", tests)
    (tmp_path / "task.toml").write_text('[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\n')
    return tmp_path / "task.toml"


@pytest.fixture
def lookup_task(tmp_path) -> Path:
    """Codes that only documents hold."""
    (tmp_path / "docs").mkdir()
    rows = []
    for i in range(36):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"the code of number {i} is {1000 + 7 * i}.")
        rows.append(
            {
                "question": f"what is the code of number {i}",
                "answer": str(1000 + 7 * i),
                "gold": f"docs/{i}.txt",
                "group": str(i // 2),
            }
        )
    write_lines(tmp_path / "items.jsonl", rows)
    (tmp_path / "task.toml").write_text('docs = ["docs"]\n[data]\nitems = "items.jsonl"\n')
    return tmp_path / "task.toml"
