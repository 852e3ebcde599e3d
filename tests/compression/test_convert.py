"""Converting models: what the new form does at the start, what is written, and what transformers reads of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.compression import convert as converting
from craton.compression.convert import Conversion, convert
from craton.compression.convert_settings import ConvertSettings
from craton.errors import CheckpointError, CratonError, UsageError
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, build
from craton.models.initialisation import initialise
from craton.store.runs import Run
from craton.trunk import ExpertsConfig

WORDS = "the cat sat on the mat and the dog sat on the log while the sun rose over the quiet hill "
CONTEXT = 64


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([WORDS * 30], TokenizerSettings(vocab=300))
    for architecture, changes in {
        "Llama": {},
        "Qwen3": {"head_dim": 8},
        "Qwen2": {},
        "Mistral": {"sliding_window": 32},
        "Mixtral": {"num_local_experts": 2},
    }.items():
        hf = {
            "architectures": [f"{architecture}ForCausalLM"],
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "tie_word_embeddings": architecture == "Llama",
            **changes,
        }
        family = family_of(hf, "test")
        model = build(family.config(Keys(hf, "test")))
        initialise(model, 1)
        save_checkpoint(model, family, folder / architecture.lower(), tokenizer=tokenizer)
    return folder


def converted(models: Path, source: str = "llama", **settings: Any) -> tuple[Conversion, Checkpoint]:
    result = convert(str(models / source), ConvertSettings(**settings), {}, name="converted")
    return result, Checkpoint.open(Path(result.path))


def logits(checkpoint: Checkpoint, length: int = 60) -> torch.Tensor:
    model = checkpoint.load(torch.float32)
    assert isinstance(model, CausalLM)
    ids = torch.randint(0, model.config.vocab, (length,), generator=torch.Generator().manual_seed(0))
    return model(ids, torch.arange(length))


def theirs(result: Conversion, length: int = 60) -> torch.Tensor:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids[None]).logits[0]


@pytest.mark.parametrize("scaling", ["yarn", "linear", "llama3"])
def test_a_longer_context(models, scaling):
    result, new = converted(models, context=256, scaling=scaling)
    rotary = new.config.trunk.layers[0].attention.rotary
    assert (new.family.name, new.config.context) == ("llama", 256)
    assert (rotary.scaling.kind, rotary.scaling.factor) == (scaling, 4.0)
    assert result.difference > 1e-4
    torch.testing.assert_close(logits(new, 200), theirs(result, 200), atol=2e-4, rtol=2e-4)


def test_a_window_everywhere_is_mistral_s(models):
    result, new = converted(models, window=16)
    assert new.family.name == "mistral"
    assert new.hf["sliding_window"] == 16
    old = Checkpoint.open(models / "llama")
    torch.testing.assert_close(logits(new)[:16], logits(old)[:16])  # nothing is out of sight yet
    assert not torch.allclose(logits(new)[40:], logits(old)[40:], atol=1e-3)
    torch.testing.assert_close(logits(new), theirs(result), atol=2e-4, rtol=2e-4)


def test_some_layers_see_everything(models):
    result, new = converted(models, window=16, full_every=2)
    assert [layer.attention.window for layer in new.config.trunk.layers] == [16, None, 16, None]
    assert new.family.name == "smollm3"
    torch.testing.assert_close(logits(new), theirs(result), atol=2e-4, rtol=2e-4)


def test_qwen_3_keeps_its_own_layout(models):
    result, new = converted(models, "qwen3", window=16, full_every=4, context=128)
    assert new.family.name == "qwen3"
    assert [layer.attention.window for layer in new.config.trunk.layers] == [16, 16, 16, None]
    torch.testing.assert_close(logits(new), theirs(result), atol=2e-4, rtol=2e-4)


def test_a_window_is_never_widened(models):
    _, new = converted(models, "mistral", window=48)
    assert {layer.attention.window for layer in new.config.trunk.layers} == {32}


@pytest.mark.parametrize(("source", "family"), [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe")])
def test_experts_begin_as_the_layer_they_were_copied_from(models, source, family):
    result, new = converted(models, source, experts=4, per_token=2)
    assert new.family.name == family
    torch.testing.assert_close(logits(new), logits(Checkpoint.open(models / source)), atol=1e-5, rtol=1e-5)
    assert result.difference < 1e-5
    assert result.numbers[1] > 2 * result.numbers[0]
    experts = new.config.trunk.layers[0].feedforward
    assert isinstance(experts, ExpertsConfig)
    assert (experts.count, experts.per_token) == (4, 2)
    routers = [t for n, t in new.load(torch.float32).state_dict().items() if n.endswith("router.weight")]
    assert all(0.015 < float(router.std()) < 0.025 for router in routers)
    torch.testing.assert_close(logits(new), theirs(result), atol=2e-4, rtol=2e-4)


def test_experts_learn_to_differ(models):
    _, new = converted(models, experts=4)
    model = new.load(torch.float32).requires_grad_(True).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    ids = torch.randint(0, model.config.vocab, (60,), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(model(ids[:-1], torch.arange(59)), ids[1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    a, b = (model.state_dict()[f"trunk.layers.0.feedforward.experts.{n}.up.weight"] for n in (0, 1))
    assert not torch.equal(a, b)


def test_lineage_card_and_run(models):
    result, _ = converted(models, context=128, window=16)
    stored = store.find("converted")
    assert [(p.relation, p.name) for p in stored.parents] == [("converted_from", str(models / "llama"))]
    assert (stored.path / "README.md").is_file()
    run = Run.open(result.run)
    assert run.record.status == "done"
    assert len(result.changes) == 2


REFUSED = {
    "nothing": ({}, "llama", "nothing to convert"),
    "shorter": ({"context": 32}, "llama", "not longer"),
    "no window": ({"full_every": 2}, "llama", "--window"),
    "too many": ({"experts": 2, "per_token": 3}, "llama", "3 of 2"),
    "twice": ({"experts": 2}, "mixtral", "experts already"),
    "no layout": ({"experts": 2}, "qwen2", "no published layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_model_is_refused_before_anything_is_written(models, craton_home, case):
    settings, source, words = REFUSED[case]
    with pytest.raises(UsageError, match=words):
        converted(models, source, **settings)
    assert not (craton_home / "models").exists()
    assert not (craton_home / "runs").exists()


def test_positions_are_stretched_once(models):
    result, _ = converted(models, context=128)
    with pytest.raises(UsageError, match="stretched already"):
        convert(result.model, ConvertSettings(context=512), {}, name="again")


def test_wrong_files_leave_no_model(models, monkeypatch):
    whole = converting.save_checkpoint

    def spoilt(model, *arguments, **options):
        weight = model.trunk.layers[1].attention.q.weight
        kept = weight.clone()
        weight[0, 0] += 1
        try:
            return whole(model, *arguments, **options)
        finally:
            weight.copy_(kept)

    monkeypatch.setattr(converting, "save_checkpoint", spoilt)
    with pytest.raises(CheckpointError, match="other values"):
        converted(models, window=16)
    with pytest.raises(CratonError):
        store.find("converted")


def test_the_command(models, capsys):
    from craton.cli.convert import convert as command

    app = App()
    app.command(command, name="convert")
    source = str(models / "llama")
    app(
        ["convert", source, "--name", "wide", "--window", "16", "--full-every", "2", "--json"],
        result_action="return_value",
    )
    result = json.loads(capsys.readouterr().out)
    assert result["family"] == "smollm3"
    assert result["changes"] == ["attention: a window of 16 in 2 layers, 2 see everything"]
    app(["convert", source, "--name", "moe", "--experts", "4"], result_action="return_value")
    assert "4 experts, 2 a token" in capsys.readouterr().err
