"""`craton index tune`: what is chosen is kept in the index, and what cannot be is refused."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def questions(craton, tiny_model, tmp_path, monkeypatch):
    """An index "docs" of 40 documents that only their words tell apart, and a question about each."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"the code of zim{number} is {number + 100}")
    status, _, err = craton("index", "add", folder, "--encoder", tiny_model, "--threads", "1")
    assert status == 0, err
    rows = [{"question": f"the code of zim{number}", "gold": f"docs/{number}.txt"} for number in range(40)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_fusion_is_tuned_kept_and_shown(craton, questions):
    status, out, err = craton("index", "tune", "docs", questions, "--threads", "1", "--json")
    assert status == 0, err
    found = json.loads(out)
    recall = found["recall_at_5"]
    assert found["replaced"] == "dense"
    assert recall["after"]["value"] == 1.0 > recall["before"]["value"]
    assert found["questions"] + recall["after"]["n"] == 40
    _, out, _ = craton("index", "show", "--json")
    assert json.loads(out)["indexes"][0]["fusion"] == found["fusion"] != "dense"
    status, out, _ = craton("index", "tune", "docs", questions, "--threads", "1")
    assert status == 0
    assert "100.0% before, 100.0% after" in " ".join(out.split())


def test_questions_about_other_documents_are_refused(craton, questions):
    questions.write_text(questions.read_text().replace("docs/", "papers/"))
    status, _, err = craton("index", "tune", "docs", questions)
    assert status == 2
    assert "papers/" in err
    assert craton("index", "tune", "nowhere", questions)[0] == 2
