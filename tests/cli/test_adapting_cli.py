"""The verbs of adapting and judging, in one process on a tiny model: what they print, keep and refuse."""

from __future__ import annotations

import json

import pytest

from craton.evaluation.tasks import Sealed
from craton.inference.model import Model

WORDS = "the code of a is red blue green zim zam what text class answer question document number word small large "


@pytest.fixture(scope="module")
def model(tiny_model) -> str:
    return str(tiny_model)


def test_an_index_is_made_shown_updated_and_removed(craton_, model, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# Red\n\nthe code of red is 12\n")
    (docs / "b.txt").write_text("the code of blue is 34\n")
    said = json.loads(craton_("index", "add", docs, "--encoder", model, "--threads", 1, "--json"))
    assert (len(said["added"]), said["documents"]) == (2, 2)
    (docs / "b.txt").write_text("the code of blue is 56\n")
    (docs / "a.md").unlink()
    said = json.loads(craton_("index", "update", "--threads", 1, "--json"))
    assert (said["changed"], said["removed"], said["embedded"]) == (["docs/b.txt"], ["docs/a.md"], 1)
    [shown] = json.loads(craton_("index", "show", "--index", "docs", "--json"))["indexes"]
    assert shown["sources"] == [{"name": "docs/b.txt", "kind": "text"}]
    found = json.loads(
        craton_("ask", "what is the code of blue", "-m", model, "--threads", 1, "--max-tokens", 8, "--json")
    )
    assert found["sources"][0]["document"] == "docs/b.txt"
    assert "the code of blue is 56" in found["prompt"]
    craton_("index", "rm", "--index", "docs")
    assert json.loads(craton_("index", "show", "--json"))["indexes"] == []
    assert "unknown index" in craton_("ask", "x", status=2)


def test_a_bad_file_that_was_named_fails_and_the_good_ones_stay(craton_, model, tmp_path):
    (tmp_path / "good.txt").write_text("the code of red is 12")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xfd bad \x00")
    said = craton_("index", "add", tmp_path / "good.txt", tmp_path / "bad.txt", "--encoder", model, status=2)
    assert "bad.txt" in said
    [shown] = json.loads(craton_("index", "show", "--index", "docs", "--json"))["indexes"]
    assert [one["name"] for one in shown["sources"]] == ["good.txt"]


def test_prompts_are_run_saved_and_shown(craton_, model, tmp_path):
    (tmp_path / "p.md").write_text(
        '+++\nsystem = "answer"\n[answer]\nchoices = ["zim", "zam"]\n+++\n{{ input }} {{ colour }}\n'
    )
    rows = '{"input": "the word", "colour": "red"}\n{"input": "a", "colour": "blue"}\n'
    out = craton_("prompt", "run", tmp_path / "p.md", "-m", model, "--threads", 1, stdin=rows)
    assert len(out.splitlines()) == 2
    assert set(out.split()) <= {"zim", "zam"}
    assert "colour" in craton_("prompt", "run", tmp_path / "p.md", "x", "-m", model, status=2)
    saved = [
        json.loads(craton_("prompt", "save", tmp_path / "p.md", "--name", "mine", "--json"))["id"] for _ in range(2)
    ]
    assert saved == ["mine@v1", "mine@v2"]
    shown = json.loads(craton_("prompt", "show", "mine@v1", "--json"))
    assert shown["variables"] == ["colour", "input"]
    assert "mine@v2" in craton_("list", "--json")
    assert "is a prompt" in craton_("generate", "x", "-m", "mine", status=2)


def test_a_search_reports_on_the_test_and_keeps_what_it_found(craton_, model, task):
    words = [
        "prompt",
        "optimize",
        task,
        "-m",
        model,
        "--encoder",
        model,
        "--trials",
        3,
        "--proposals",
        1,
        "--threads",
        1,
    ]
    found = json.loads(craton_(*words, "--name", "best", "--json"))
    assert found["stored"] == "best@v1"
    assert len(found["trials"]) == 3
    assert found["before"]["n"] == found["after"]["n"] > 10
    assert found["gain"]["low"] <= found["gain"]["value"] <= found["gain"]["high"]
    assert json.loads(craton_("prompt", "show", "best", "--json"))["digest"] == found["digest"]


def test_a_best_prompt_that_cannot_be_written_is_refused_before_the_search(craton_, model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "generate", lambda *_, **__: pytest.fail("a model was asked"))
    said = craton_("prompt", "optimize", task, "-m", model, "--out", tmp_path / "nowhere" / "p.toml", status=2)
    assert "there is no folder" in said
    assert "make it first" in said


def test_a_best_prompt_is_written_as_a_file(craton_, model, task, tmp_path):
    out = tmp_path / "p.toml"
    words = ["-m", model, "--encoder", model, "--trials", 2, "--proposals", 0, "--threads", 1, "--token-budget", 1]
    found = json.loads(craton_("prompt", "optimize", task, *words, "--out", out, "--json"))
    assert json.loads(craton_("prompt", "show", out, "--json"))["digest"] == found["digest"]
    assert [trial["items"] for trial in found["trials"]] == [1]
    assert found["stopped"] == "tokens"


def test_no_model_reads_a_test_row_in_the_search(craton_, model, tmp_path, monkeypatch):
    for name, count, mark in (("train", 40, ""), ("test", 12, "SEALED ")):
        rows = [
            {"text": f"{mark}the word number {i} is {'red' if i % 2 else 'blue'}", "label": ["zam", "zim"][i % 2]}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.toml").write_text('[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\n')
    read: dict[str, list[str]] = {"searching": [], "testing": []}
    phase = ["searching"]
    submit, score, embed, unseal = Model._submit, Model.score, Model.embed, Sealed.open

    def spy_submit(self, prompt, settings):
        read[phase[0]].append(self.tokenizer.decode(prompt))
        return submit(self, prompt, settings)

    def spy_score(self, pairs):
        read[phase[0]] += [self.tokenizer.decode([*context, *more]) for context, more in pairs]
        return score(self, pairs)

    def spy_embed(self, texts):
        read[phase[0]] += texts
        return embed(self, texts)

    def spy_open(self):
        phase[0] = "testing"
        return unseal(self)

    monkeypatch.setattr(Model, "_submit", spy_submit)
    monkeypatch.setattr(Model, "score", spy_score)
    monkeypatch.setattr(Model, "embed", spy_embed)
    monkeypatch.setattr(Sealed, "open", spy_open)
    words = ["-m", model, "--encoder", model, "--trials", 8, "--proposals", 2, "--threads", 1, "--json"]
    found = json.loads(craton_("prompt", "optimize", tmp_path / "task.toml", *words))
    tried = [trial["prompt"] for trial in found["trials"]]
    assert {"generate", "likelihood", "calibrated"} == {prompt["answer"]["scoring"] for prompt in tried}
    assert {"similar", "diverse"} & {prompt["examples"]["choose"] for prompt in tried}
    assert len(read["searching"]) > 100
    assert any("Write one sentence" in text for text in read["searching"])
    assert not [text for text in read["searching"] if "SEALED" in text]
    assert sum("SEALED" in text for text in read["testing"]) >= 24  # the eye that looks for it sees it


def test_models_are_measured_with_intervals_and_in_pairs(craton_, model, task, tmp_path):
    (tmp_path / "text.txt").write_text(WORDS * 30)
    report = tmp_path / "r.html"
    words = ["eval", model, task, tmp_path / "text.txt", "--threads", 1, "--limit", 12, "--report", report, "--json"]
    answered, foretold = json.loads(craton_(*words))["evaluations"]
    figure = answered["figures"]["accuracy"]
    assert figure["n"] == 12
    assert figure["low"] <= figure["value"] <= figure["high"]
    assert 0 < foretold["figures"]["bits_per_byte"]["value"] < 10
    page = report.read_text()
    assert "<script" not in page
    assert "12" in page
    pair = json.loads(craton_("eval", model, task, "--baseline", model, "--threads", 1, "--limit", 12, "--json"))
    assert pair["evaluations"][0]["difference"]["value"] == 0
    assert "no task" in craton_("eval", model, status=2)


@pytest.mark.parametrize("flags", [["--choices", "zim", "--choices", "zam"], ["--regex", "z[ia]m"]])
def test_the_form_of_an_answer_is_a_flag(craton_, model, flags):
    out = craton_("generate", "the", "-m", model, "--threads", 1, "--max-tokens", 8, *flags)
    assert out.strip() in ("zim", "zam")


def test_a_schema_is_given_as_text_or_as_a_file(craton_, model, tmp_path):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    (tmp_path / "s.json").write_text(json.dumps(schema))
    for given in (json.dumps(schema), tmp_path / "s.json"):
        out = craton_("generate", "the", "-m", model, "--threads", 1, "--max-tokens", 40, "--json-schema", given)
        assert isinstance(json.loads(out)["a"], bool)
    assert "not JSON" in craton_("generate", "the", "-m", model, "--json-schema", "{", status=2)
