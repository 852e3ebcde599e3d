"""Model cards: what the hub reads, what people read, and nothing that was not measured or is nobody's business."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from craton.checkpoints.sources import BuiltIn
from craton.store import pull
from craton.store.artifacts import publish_model
from craton.store.cards import duration, hub_id, model_card
from craton.store.manifest import Parent
from craton.store.runs import Run

CONFIG = {"data": "/home/me/data/متن|x.jsonl", "optimiser": {"learning_rate": 0.001, "kind": "adamw"}, "note": "a\nb"}
ORIGINS = {
    "data": "--data",
    "optimiser.learning_rate": "/home/me/recipe.toml",
    "optimiser.kind": "default",
    "note": "--note",
}


def create(monkeypatch: pytest.MonkeyPatch, *parents: Parent, kind: str = "finetune") -> Run:
    argv = ["/home/me/.venv/bin/craton", "finetune", "m", "/home/me/my data.jsonl", "--out=/home/me/x", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", argv)
    return Run.create(kind, config=CONFIG, provenance=ORIGINS, parents=parents)


def front_matter(card: str) -> dict[str, Any]:
    """The front matter as another YAML reader understands it."""
    yaml = pytest.importorskip("yaml")
    begin, matter, _ = card.split("---\n", 2)
    assert begin == ""
    return yaml.safe_load(matter)


def test_an_adapter_on_a_built_in_model(monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(
        monkeypatch,
        Parent(relation="adapter_of", name="smollm2-135m-instruct"),
        Parent(relation="trained_on", name="hf:mteb/banking77:train"),
        Parent(relation="trained_on", name="/home/me/my data.jsonl"),
    )
    with run.lock():
        for step in range(1, 101):
            run.log_metrics(step, {"loss": 5 / step + (step == 100)})
        run.log_metrics(100, {"held_out/loss": 0.25})
        card = model_card(run, name="banking", licence="Apache-2.0", metrics={"accuracy": 0.9137, "f1": 0.9})
    assert front_matter(card) == {
        "license": "apache-2.0",
        "library_name": "peft",
        "base_model": ["HuggingFaceTB/SmolLM2-135M-Instruct"],
        "base_model_relation": "adapter",
        "datasets": ["mteb/banking77"],
        "metrics": ["accuracy", "f1"],
        "tags": ["craton", "finetune"],
    }
    for part in (
        "# banking",
        "after 100 steps",
        "- adapter of: `smollm2-135m-instruct`",
        "- trained on: `my data.jsonl`",
        f"- run: `{run.id}`",
        "| accuracy | 0.9137 |",
        "| `optimiser.learning_rate` | `0.001` | recipe.toml |",
        "| `data` | `متن\\|x.jsonl` | --data |",
        "| `note` | `a b` | --note |",
        "Lowest training loss: 0.05051 at step 99.",
        "| 1 | 5 |",
        "| 100 | 1.05 |",
        "Lowest held-out loss: 0.25 at step 100.",
        "craton finetune m 'my data.jsonl' --out=x --rank 8\n",
        "Not assessed: bias, safety",
    ):
        assert part in card
    assert "optimiser.kind" not in card
    assert "/home/me" not in card


def test_a_model_from_scratch_that_nobody_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run.create("pretrain", config={"steps": 1}, provenance={"steps": "default"})
    card = model_card(run, name="small", licence=None, metrics={})
    assert front_matter(card) == {"library_name": "transformers", "tags": ["craton", "pretrain"]}
    assert "## Evaluation\n\nNot measured." in card
    assert "## Loss\n\nNot recorded." in card
    assert "Every setting had its default value." in card


@pytest.mark.parametrize(
    ("relation", "theirs", "library"),
    [
        ("base", "finetune", "transformers"),
        ("adapter_of", "adapter", "peft"),
        ("merged_from", "merge", "transformers"),
        ("quantised_from", "quantized", "transformers"),
        ("distilled_from", None, "transformers"),
    ],
)
def test_relations_as_the_hub_calls_them(
    monkeypatch: pytest.MonkeyPatch, relation: str, theirs: str | None, library: str
) -> None:
    run = create(monkeypatch, Parent(relation=relation, name="hf:org/Name@main"))
    matter = front_matter(model_card(run, name="x", licence=None, metrics={}))
    assert matter.get("base_model_relation") == theirs
    assert matter.get("base_model") == (["org/Name"] if theirs else None)
    assert matter["library_name"] == library


def test_a_base_that_the_hub_does_not_have_is_in_the_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    run = create(monkeypatch, Parent(relation="base", name="mine@v1"))
    card = model_card(run, name="x", licence=None, metrics={})
    assert "base_model" not in front_matter(card)
    assert "base_model_relation" not in front_matter(card)
    assert "- base: `mine@v1`" in card


def test_what_the_hub_calls_a_stored_model(tmp_path: Path, fake_model: BuiltIn) -> None:
    pull("fake", name="renamed")
    assert hub_id("renamed@v1") is None  # the fake is not on the hub
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    pull(str(folder))
    assert hub_id("mine") is hub_id("mine@v9") is hub_id("unknown") is hub_id("/a/b.jsonl") is None
    assert hub_id("hf:org/name") == "org/name"
    assert hub_id("minilm-l6-v2@v3") == hub_id("minilm-l6-v2") == "sentence-transformers/all-MiniLM-L6-v2"


def test_the_hubs_own_library_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run = create(monkeypatch, Parent(relation="adapter_of", name="smollm2-135m-instruct"))
    card = hub.ModelCard(model_card(run, name="مدل", licence="apache-2.0", metrics={"accuracy": 0.5}))
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert card.data.library_name == "peft"
    assert card.data.metrics == ["accuracy"]


def test_the_store_reads_the_licence_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = create(monkeypatch)

    def build(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
        card = model_card(run, name="mine", licence="MIT", metrics={})
        (folder / "README.md").write_text(card, encoding="utf-8")

    made = publish_model("mine", build, source=f"run:{run.id}", parents=(), licence="mit")
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "other"))
    assert pull(str(made.path), name="again").licence == "mit"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
