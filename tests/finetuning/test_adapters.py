"""Settings of adapters, and what their targets mean."""

from __future__ import annotations

import subprocess
import sys
from math import sqrt

import pytest

from craton.config import parse
from craton.errors import UnknownName, UsageError
from craton.finetuning.adapters import LoraSettings, select_linears

LAYER = (
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.o",
    "feedforward.gate",
    "feedforward.up",
    "feedforward.down",
)
DENSE = [*(f"trunk.layers.{n}.{part}" for n in range(12) for part in LAYER), "head"]
SPARSE = [
    "trunk.layers.0.attention.q",
    "trunk.layers.0.feedforward.router",
    "trunk.layers.0.feedforward.experts.0.up",
    "trunk.layers.0.feedforward.experts.1.up",
    "trunk.layers.0.feedforward.shared.up",
]


def ends(target: str, names: list[str] = DENSE) -> set[str]:
    return {name.rpartition(".")[2] for name in select_linears([target], names)}


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("all", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("all-linear", {"q", "k", "v", "o", "gate", "up", "down"}),
        ("attention", {"q", "k", "v", "o"}),
        ("mlp", {"gate", "up", "down"}),
        ("q_proj", {"q"}),
        ("gate_up_proj", {"gate", "up"}),
        ("query_key_value", {"q", "k", "v"}),
        ("lm_head", {"head"}),
        ("head", {"head"}),
        ("*", {"q", "k", "v", "o", "gate", "up", "down", "head"}),
        ("feedforward.*", {"gate", "up", "down"}),
        ("re:[qk]", {"q", "k"}),
    ],
)
def test_targets_by_name_and_pattern(target: str, parts: set[str]) -> None:
    assert ends(target) == parts


def test_targets_are_joined_in_the_order_of_the_model() -> None:
    settings = LoraSettings(targets="v_proj, q")
    assert settings.targets == ("v_proj", "q")
    chosen = select_linears(settings.targets, DENSE)
    assert chosen == [name for name in DENSE if name[-1] in "qv"]


def test_layers_by_number() -> None:
    assert len(select_linears(["trunk.layers.[0-3].*"], DENSE)) == 4 * len(LAYER)
    assert len(select_linears([r"re:layers\.(1|11)\..*"], DENSE)) == 2 * len(LAYER)
    assert select_linears(["layers.1.attention.q"], DENSE) == ["trunk.layers.1.attention.q"]


def test_a_regular_expression_keeps_its_commas() -> None:
    assert LoraSettings(targets=(r"re:layers\.\d{1,2}\..*q", "k,v")).targets == (r"re:layers\.\d{1,2}\..*q", "k", "v")


def test_a_classifier_s_backbone_is_a_trunk_as_well() -> None:
    names = [f"backbone.{name}" for name in DENSE]
    assert len(select_linears(["all"], names)) == 12 * len(LAYER)
    assert ends("attention", names) == {"q", "k", "v", "o"}


def test_routers_are_never_adapted() -> None:
    assert "trunk.layers.0.feedforward.router" not in select_linears(["all"], SPARSE)
    assert select_linears(["experts.*"], SPARSE) == SPARSE[2:4]
    with pytest.raises(UsageError, match="router"):
        select_linears(["router"], SPARSE)


@pytest.mark.parametrize("target", ["embedding", "embed_tokens", "wte", "emb*"])
def test_embeddings_are_refused_in_words(target: str) -> None:
    with pytest.raises(UsageError, match="an embedding cannot"):
        select_linears([target], DENSE)


def test_a_target_that_means_nothing_is_not_passed_over() -> None:
    with pytest.raises(UnknownName, match=r"'q_prj'") as caught:
        select_linears(["all", "q_prj"], DENSE)
    assert caught.value.remedy is not None
    with pytest.raises(UnknownName) as caught:
        select_linears(["attn"], DENSE)
    assert "attention" in (caught.value.remedy or "")
    with pytest.raises(UsageError, match="not a regular expression"):
        select_linears(["re:("], DENSE)


def test_scales() -> None:
    assert LoraSettings(rank=16, alpha=32).scale == 2
    assert LoraSettings(rank=16, alpha=32, rslora=True).scale == 8
    assert LoraSettings(rank=2, alpha=1, rslora=True).scale == pytest.approx(1 / sqrt(2))


@pytest.mark.parametrize(
    "values",
    [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"targets": ()}, {"targets": 3}, {"r": 8}],
)
def test_bad_settings(values: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        parse(LoraSettings, values, where="test")


def test_settings_need_no_torch() -> None:
    program = "import sys, craton.finetuning.adapters; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
