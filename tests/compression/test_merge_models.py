"""Merging models: each method by its formula, and what is written holds what was computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import pi
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclopts import App
from torch import Tensor

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.compression import merge_models as merging
from craton.compression.merge_models import combine, dropped, elected_mean, merge_models, slerp, trimmed
from craton.compression.merge_settings import MergeSettings
from craton.errors import CheckpointError, CratonError, UsageError
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import build
from craton.models.initialisation import initialise
from craton.store.runs import Run

WORDS = "the cat sat on the mat and the dog sat on the log while the sun rose over the quiet hill "


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `a`, `b`, `base` of one shape; `deep` of another; `stranger` with another tokeniser; `other` family."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer([WORDS * 30], TokenizerSettings(vocab=300))
    strange = train_tokenizer([WORDS[::-1] * 30], TokenizerSettings(vocab=300))
    plain: dict[str, Any] = {"tie_word_embeddings": True}
    made: dict[str, tuple[int, dict[str, Any], Any]] = {
        "base": (0, plain, tokenizer),
        "a": (1, plain, tokenizer),
        "b": (2, plain, tokenizer),
        "deep": (3, {**plain, "num_hidden_layers": 3}, tokenizer),
        "stranger": (4, plain, strange),
        "other": (5, {**plain, "architectures": ["Qwen3ForCausalLM"], "head_dim": 8}, tokenizer),
    }
    for name, (seed, changes, words) in made.items():
        hf = {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **changes,
        }
        family = family_of(hf, "test")
        model = build(family.config(Keys(hf, "test")))
        initialise(model, seed)
        save_checkpoint(model, family, folder / name, tokenizer=words)
    return folder


def weights(path: Path | str) -> dict[str, Tensor]:
    return dict(Checkpoint.open(path).load(torch.float32).state_dict())


def merge(folder: Path, names: str, **settings: Any):
    base = settings.pop("base", None)
    chosen = MergeSettings(**settings, base=str(folder / base) if base else None)
    return merge_models([str(folder / name) for name in names.split()], chosen, name="merged")


# --- the formulae --------------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_sphere():
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        angle = torch.tensor(share * pi / 2)
        torch.testing.assert_close(slerp(x, y, share), 2 * torch.stack((angle.cos(), angle.sin())))
    torch.testing.assert_close(slerp(x, 3 * x, 0.5), 2 * x)  # parallel: the line between them
    torch.testing.assert_close(slerp(torch.zeros(2), y, 0.5), y / 2)


def test_ties_trims_elects_and_averages_those_that_agree():
    change = torch.tensor([0.1, -3.0, 2.0, -0.5])
    assert trimmed(change, 0.5).tolist() == [0.0, -3.0, 2.0, 0.0]
    assert trimmed(change, 1.0).tolist() == change.tolist()
    changes = [torch.tensor([1.0, 4.0, 0.0, -1.0]), torch.tensor([3.0, -1.0, 2.0, -3.0])]
    assert elected_mean(changes, (0.5, 0.5)).tolist() == [2.0, 4.0, 2.0, -2.0]
    # By weight: the second now outvotes the first where they disagree.
    assert elected_mean(changes, (0.1, 0.9)).tolist() == pytest.approx([2.8, -1.0, 2.0, -2.8])


def test_dare_drops_a_share_and_keeps_the_mean():
    change = torch.ones(100_000)
    kept = dropped(change, 0.25, seed=3)
    assert set(kept.unique().tolist()) == {0.0, 4.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.03)
    assert torch.equal(kept, dropped(change, 0.25, seed=3))
    assert not torch.equal(kept, dropped(change, 0.25, seed=4))


def test_two_models_drop_different_parts_of_one_tensor():
    base = torch.zeros(1000)
    found = combine([base + 1, base + 1], base, MergeSettings(method="dare", base="x"), (0.5, 0.5), "w")
    assert set(found.unique().tolist()) == {0.0, 1.0, 2.0}  # dropped by both, by one, by none


# --- whole models --------------------------------------------------------------------------------------------------


def test_a_soup_is_the_weighted_mean(folder):
    result = merge(folder, "a b", weights=(3.0, 1.0))
    assert result.weights == (0.75, 0.25)
    a, b, merged = weights(folder / "a"), weights(folder / "b"), weights(result.path)
    for name in merged:
        torch.testing.assert_close(merged[name], 0.75 * a[name] + 0.25 * b[name])
    assert 0 < result.distance[0] < result.distance[1]


def test_with_a_base_changes_are_added_to_it(folder):
    merged = weights(merge(folder, "a b", base="base").path)
    a, b, base = (weights(folder / name) for name in ("a", "b", "base"))
    for name in merged:
        torch.testing.assert_close(merged[name], base[name] + ((a[name] - base[name]) + (b[name] - base[name])) / 2)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_methods_of_changes(folder, method):
    merged = weights(merge(folder, "a b", method=method, base="base", density=0.4, seed=5).path)
    a, b, base = (weights(folder / name) for name in ("a", "b", "base"))
    settings = MergeSettings(method=method, base="x", density=0.4, seed=5)
    name = "trunk.layers.1.feedforward.up.weight"
    key = "model.layers.1.mlp.up_proj.weight"
    expected = combine([a[name], b[name]], base[name], settings, (0.5, 0.5), key)
    torch.testing.assert_close(merged[name], expected)
    # Where all models are the base, all methods give the base.
    same = weights(merge(folder, "base base", method=method, base="base").path)
    assert all(torch.equal(same[name], base[name]) for name in base)


def test_one_model_keeps_its_place_on_the_sphere(folder):
    merged = weights(merge(folder, "a b", method="slerp", weights=(1.0, 0.0)).path)
    assert all(torch.allclose(merged[name], tensor, atol=1e-6) for name, tensor in weights(folder / "a").items())


def test_the_number_format_of_the_first_stays(folder, tmp_path):
    opened = Checkpoint.open(folder / "a")
    save_checkpoint(opened.load(torch.bfloat16), opened.family, tmp_path / "half", tokenizer=opened.tokenizer())
    result = merge_models([str(tmp_path / "half"), str(folder / "b")], MergeSettings(), name="merged")
    assert Checkpoint.open(result.path).stored_kind() == "BF16"


def test_lineage_and_run(folder):
    store.pull(str(folder / "a"), "one")
    result = merge_models(["one", str(folder / "b")], MergeSettings(base=str(folder / "base")), name="merged")
    assert [(parent.relation, Path(parent.name).name) for parent in store.find("merged").parents] == [
        ("merged_from", "one@v1"),
        ("merged_from", "b"),
        ("base", "base"),
    ]
    run = Run.open(result.run)
    assert (run.kind, run.status, run.record.result["model"]) == ("merge", "done", "merged@v1")
    assert store.verify("merged") == []


@pytest.mark.peer
def test_transformers_opens_the_result(folder):
    transformers = pytest.importorskip("transformers")
    result = merge(folder, "a b")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ids_T = torch.arange(20)
    with torch.inference_mode():
        ours = Checkpoint.open(result.path).load(torch.float32)(ids_T, torch.arange(20))
        torch.testing.assert_close(ours, theirs(ids_T[None]).logits[0], rtol=1e-3, atol=1e-3)


def test_what_was_written_wrong_is_an_error_and_is_gone(folder, craton_home, monkeypatch):
    real = merging.save_checkpoint

    def spoil(model, *rest, **more):
        flipped = {name: tensor.flip(0).clone() for name, tensor in model.state_dict().items()}
        other = build(model.config)
        other.load_state_dict(flipped)
        return real(other, *rest, **more)

    monkeypatch.setattr(merging, "save_checkpoint", spoil)
    with pytest.raises(CheckpointError, match="other values"):
        merge(folder, "a b")
    assert not (craton_home / "models").exists()
    assert Run.open("last").status == "failed"


@pytest.mark.parametrize(
    ("names", "settings", "match"),
    [
        ("a deep", {}, "differ in shape: trunk.layers: 2 and 3"),
        ("a other", {}, "a llama and a qwen3"),
        ("a stranger", {}, "other tokens"),
        ("a b", {"base": "deep"}, "differ in shape"),
        ("a", {}, "one model is no merge"),
        ("a b base", {"method": "slerp"}, "between two models"),
        ("a b", {"method": "ties"}, "what they changed it from"),
        ("a b", {"weights": (1.0,)}, "1 weights for 2 models"),
        ("a b", {"weights": (1.0, -1.0)}, "0 or more"),
    ],
)
def test_models_that_do_not_fit_are_refused(folder, names, settings, match, craton_home):
    with pytest.raises(UsageError, match=match):
        merge(folder, names, **settings)
    assert not (craton_home / "runs").exists()


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def craton(capsys) -> Callable[..., tuple[int, str, str]]:
    app = App()
    app.command("craton.cli.merge:merge", name="merge")

    def run(*arguments: Any) -> tuple[int, str, str]:
        try:
            status = int(app(["merge", *map(str, arguments)], exit_on_error=False, result_action="return_value") or 0)
        except CratonError as error:
            status = error.exit_status
            print(error)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_from_the_command_line(craton, folder):
    given = [folder / "a", folder / "b", "--method", "ties", "--base", folder / "base", "--weights", "0.7,0.3"]
    status, out, _ = craton(*given, "--density", "0.3", "--name", "soup", "--json")
    assert status == 0
    told = json.loads(out)
    assert (told["model"], told["method"], told["weights"]) == ("soup@v1", "ties", [0.7, 0.3])
    status, _, err = craton(*given, "--name", "soup")
    assert status == 0
    assert "soup@v2" in err
    assert "weight 0.7" in err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["a", "b"], "--name NAME"),
        (["a", "b", "--name", "x", "--out", "x"], "into the store"),
        (["a", "b", "--name", "x", "--weights", "half"], "not a list of numbers"),
        (["a", "b", "--name", "x", "--density", "0"], "density"),
        (["a", "--name", "x", "--method", "ties"], "for several models"),
        (["a", "--name", "x"], "no adapter"),
    ],
)
def test_wrong_flags_teach(craton, folder, arguments, match):
    words = [folder / word if (folder / word).is_dir() else word for word in arguments]
    status, out, _ = craton(*words)
    assert status == 2
    assert match in out
