"""`craton merge`: what it writes does what base and adapter did, or it says so and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App
from torch import Tensor

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import classifier_family, family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, CratonError, FileFormatError, UnknownName, UsageError
from craton.finetuning import merge_files
from craton.finetuning.adapter_files import save_adapter
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import adapter_parameters, apply_lora
from craton.finetuning.merge_files import probe, relative_difference
from craton.finetuning.quantized_base import quantize_base
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.modalities.text.token_pieces import byte_level_alphabet
from craton.models import CausalLM, Classifier, build
from craton.store.artifacts import publish_model
from craton.store.manifest import Parent
from craton.store.runs import Run

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
IDS = torch.arange(60) * 7 % 250


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of its own."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes, one merge and three special tokens: 260 in all."""
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*sorted(byte_level_alphabet()), "ab", "<s>", "</s>", "<pad>"],
            "tokenizer.ggml.token_type": [1] * 257 + [3] * 3,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 257,
            "tokenizer.ggml.eos_token_id": 258,
            "tokenizer.ggml.padding_token_id": 259,
        }
    )


@pytest.fixture
def base(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A small random language model with its tokeniser."""
    family = family_of(CONFIG, "test")
    torch.manual_seed(0)
    model = build(family.config(Keys(CONFIG, "test")))
    return save_checkpoint(model, family, tmp_path / "base", tokenizer=tokenizer)


@pytest.fixture
def trained(base: Path, tmp_path: Path) -> Callable[..., tuple[Path, Tensor]]:
    """trained(kind=None, labels=(), size=0.3, names=None, **settings) -> an adapter, and what it makes of IDS.

    names: what the adapter calls its base.
    """

    def make(kind=None, labels=(), size=0.3, names=None, **settings) -> tuple[Path, Tensor]:
        checkpoint = Checkpoint.open(base)
        model, family = checkpoint.load(torch.float32), checkpoint.family
        if labels:
            assert isinstance(model, CausalLM)
            model, family = Classifier.over(model, labels), classifier_family(family)
        if kind:
            quantize_base(model, kind)
        apply_lora(model, LoraSettings(**{"rank": 4, "alpha": 4, **settings}))
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter_parameters(model).values():
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
        folder = save_adapter(model, family, tmp_path / "adapter", base=str(base) if names is None else names)
        return folder, probe(model, IDS)

    return make


@pytest.fixture
def craton(capsys) -> Callable[..., tuple[int, str, str]]:
    """craton(*arguments) -> (exit status, standard output, standard error) of `craton merge`."""
    app = App()
    app.command("craton.cli.merge:merge", name="merge")

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = int(app(["merge", *map(str, arguments)], exit_on_error=False, result_action="return_value") or 0)
        except CratonError as error:
            status = error.exit_status
            print(error)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def outputs(path: Path) -> Tensor:
    return probe(Checkpoint.open(path).load(torch.float32), IDS)


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"rslora": True, "targets": ("q,v",)}])
def test_into_a_folder(trained, craton, tmp_path, tokenizer, settings):
    adapter, adapted = trained(**settings)
    status, out, err = craton(adapter, "--out", tmp_path / "merged")
    assert (status, out) == (0, "")
    assert "original weights" in err
    assert relative_difference(outputs(tmp_path / "merged"), adapted) < 1e-5
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "merged from: `adapter`" in card
    assert "base: `base`" in card
    assert Checkpoint.open(tmp_path / "merged").tokenizer().encode("abc") == tokenizer.encode("abc")


def test_into_the_store_with_lineage_and_a_run(trained, craton, base):
    adapter, adapted = trained()
    status, out, _ = craton(adapter, "--name", "mine", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["target"] == "mine@v1"
    assert result["difference"] < 1e-5
    assert (result["layers"], result["lost"], result["untied"]) == (14, None, False)
    model = store.find("mine")
    assert relative_difference(outputs(model.path), adapted) < 1e-5
    assert {parent.relation: parent.name for parent in model.parents} == {
        "merged_from": str(adapter),
        "base": str(base),
    }
    run = Run.open(result["run"])
    assert (run.kind, run.status, run.record.result["model"]) == ("merge", "done", "mine@v1")
    assert craton(adapter, "--name", "mine")[0] == 0
    assert store.find("mine").id == "mine@v2"


def test_an_adapter_of_the_store_knows_its_base(trained, craton, base, tmp_path):
    adapter, adapted = trained(names="somewhere/else")
    store.pull(str(base), "the-base")
    publish_model(
        "mine",
        lambda folder: shutil.copytree(adapter, folder, dirs_exist_ok=True) and None,
        source="run:01",
        parents=(Parent(relation="adapter_of", name="the-base@v1"),),
        licence=None,
    )
    status, out, _ = craton("mine", "--out", tmp_path / "merged", "--json")
    assert status == 0
    assert (json.loads(out)["adapter"], json.loads(out)["base"]) == ("mine@v1", "the-base@v1")
    assert relative_difference(outputs(tmp_path / "merged"), adapted) < 1e-5


def test_a_tied_head_is_untied_in_the_files(trained, craton, tmp_path):
    adapter, adapted = trained(targets=("head",))
    _, _, err = craton(adapter, "--out", tmp_path / "merged")
    assert "no longer tied" in err
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    assert relative_difference(outputs(tmp_path / "merged"), adapted) < 1e-5


@pytest.mark.parametrize("kind", ["nf4", "int4-minmax"])
def test_an_adapter_of_a_quantised_base_is_merged_into_what_it_was_trained_on(trained, craton, tmp_path, kind):
    adapter, adapted = trained(kind=kind)
    _, out, _ = craton(adapter, "--out", tmp_path / "merged", "--json")
    result = json.loads(out)
    assert result["base_weights"] == f"dequantised {kind}"
    assert kind in " ".join(result["notes"])
    assert relative_difference(outputs(tmp_path / "merged"), adapted) < 1e-5


def test_a_classifier(trained, craton, tmp_path):
    labels = ("کارت گم شد", "top up", "balance")
    adapter, adapted = trained(labels=labels)
    assert craton(adapter, "--out", tmp_path / "merged")[0] == 0
    assert Checkpoint.open(tmp_path / "merged").config.labels == labels
    assert relative_difference(outputs(tmp_path / "merged"), adapted) < 1e-5


@pytest.mark.parametrize(("kind", "tolerance"), [("Q8_0", 0.05), ("Q4_0", 0.5)])
def test_requantised(trained, craton, tmp_path, kind, tolerance):
    adapter, adapted = trained()
    _, out, _ = craton(adapter, "--out", tmp_path / "merged.gguf", "--requantize", kind, "--json")
    result = json.loads(out)
    assert 0 < result["lost"] < tolerance
    assert 1e-4 < result["difference"] < tolerance
    assert kind in Checkpoint.open(tmp_path / "merged.gguf").quantized_kinds()
    assert relative_difference(outputs(tmp_path / "merged.gguf"), adapted) < tolerance


def test_small_changes_that_few_bits_lose_are_said(trained, craton, tmp_path):
    adapter, _ = trained(size=0.02)
    _, _, err = craton(adapter, "--out", tmp_path / "merged.gguf", "--requantize", "Q4_0")
    assert "100% is lost in Q4_0" in err
    assert "note:" in err


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, UsageError, "one target"),
        ({"out": "x", "name": "x"}, UsageError, "one target"),
        ({"out": "base"}, UsageError, "exists already"),
        ({"out": "x", "requantize": "Q8_0"}, UsageError, "GGUF file"),
        ({"name": "x", "requantize": "Q8_0"}, UsageError, "GGUF file"),
        ({"out": "x.gguf"}, UsageError, "needs a kind"),
        ({"out": "x.gguf", "requantize": "Q3_K"}, UnknownName, "Q3_K"),
        ({"name": "Not A Name"}, UsageError, "stored model's name"),
        ({"out": "x", "base": "nothing-of-this-name"}, UsageError, "base is not here"),
    ],
)
def test_wrong_targets_cost_nothing(trained, tmp_path, arguments, error, match):
    adapter, _ = trained()
    if "out" in arguments:
        arguments = {**arguments, "out": tmp_path / arguments["out"]}
    with pytest.raises(error, match=match):
        merge_files.merge_files(str(adapter), **arguments)
    assert not (tmp_path / "x").exists()


def test_a_base_that_is_not_named_or_not_there(trained, tmp_path):
    adapter, _ = trained(names="")
    with pytest.raises(UsageError, match="does not say") as caught:
        merge_files.merge_files(str(adapter), out=tmp_path / "x")
    assert "--base" in (caught.value.remedy or "")
    adapter, _ = trained(names=str(tmp_path / "gone"))
    with pytest.raises(UsageError, match="base is not here") as caught:
        merge_files.merge_files(str(adapter), out=tmp_path / "x")
    assert "--base" in (caught.value.remedy or "")


def test_adapters_that_are_none(trained, base, tmp_path):
    with pytest.raises(UsageError, match="no adapter"):
        merge_files.merge_files(str(base), out=tmp_path / "x")
    adapter, _ = trained()
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="pickle"):
        merge_files.merge_files(str(adapter), out=tmp_path / "x")


def test_the_wrong_base_is_found_out(trained, tmp_path, tokenizer):
    other = {**CONFIG, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    family = family_of(other, "test")
    save_checkpoint(build(family.config(Keys(other, "test"))), family, tmp_path / "other", tokenizer=tokenizer)
    adapter, _ = trained()
    with pytest.raises(CheckpointError, match="this model asks for"):
        merge_files.merge_files(str(adapter), base=str(tmp_path / "other"), out=tmp_path / "x")


@pytest.mark.parametrize("target", [{"out": "x"}, {"name": "x"}, {"out": "x.gguf", "requantize": "Q4_0"}])
def test_what_was_written_wrong_is_an_error_and_is_gone(trained, tmp_path, craton_home, monkeypatch, target):
    adapter, _ = trained()
    real_folder, real_gguf = merge_files.save_checkpoint, merge_files.save_gguf

    def spoil(model):
        model.load_state_dict({name: tensor.flip(0) for name, tensor in model.state_dict().items()})
        return model

    monkeypatch.setattr(merge_files, "save_checkpoint", lambda model, *a, **k: real_folder(spoil(model), *a, **k))
    monkeypatch.setattr(merge_files, "save_gguf", lambda model, *a, **k: real_gguf(spoil(model), *a, **k))
    if "out" in target:
        target = {**target, "out": tmp_path / target["out"]}
    with pytest.raises(CheckpointError, match="give other outputs"):
        merge_files.merge_files(str(adapter), **target)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "x.gguf").exists()
    assert not (craton_home / "models").exists()
    assert Run.open("last").status == "failed"


def test_an_adapter_cut_short_is_refused(trained, tmp_path):
    adapter, _ = trained()
    file = SafetensorsFile.open(adapter / "adapter_model.safetensors")
    kept = {name: file.tensor(name).clone() for name in list(file.tensors)[:-1]}
    write_safetensors(file.path, kept)
    with pytest.raises(CheckpointError, match="incomplete"):
        merge_files.merge_files(str(adapter), out=tmp_path / "x")
