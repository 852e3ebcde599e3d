"""Layers of settings: what wins, where each value came from, and what is said about keys and values that are wrong."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from craton.config import Settings
from craton.config.resolve import DEFAULT, FLAGS, flag_of, leaves, read_toml, resolve, section_of
from craton.errors import FileFormatError, UnknownName, UsageError


class Optimiser(Settings):
    kind: Literal["adamw", "muon"] = Field("adamw", description="which optimiser")
    learning_rate: float = Field(1e-3, gt=0, description="its peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of the moments")


class Adapter(Settings):
    rank: int = Field(8, ge=1, description="of the update")


class Training(Settings):
    steps: int = Field(100, ge=1, description="how many")
    warmup: int = Field(0, ge=0, description="of them")
    mixture: dict[str, float] = Field(default_factory=dict, description="weights of the sources")
    optimiser: Optimiser = Field(Optimiser(), description="the optimiser")
    adapter: Adapter | None = Field(None, description="the adapter")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Training:
        if self.warmup > self.steps:
            raise ValueError("the warm-up is longer than the run")
        return self


def test_without_layers_everything_is_default() -> None:
    settings, origins = resolve(Training, [])
    assert settings == Training()
    assert origins == dict.fromkeys([key for key, _ in leaves(Training())], DEFAULT)
    assert list(origins) == [
        "steps",
        "warmup",
        "mixture",
        "optimiser.kind",
        "optimiser.learning_rate",
        "optimiser.betas",
        "adapter",
    ]


def test_later_layers_win_key_by_key() -> None:
    settings, origins = resolve(
        Training,
        [
            ("--size 30m", {"steps": 500, "optimiser": {"learning_rate": 0.1, "kind": "muon"}}),
            ("recipe.toml", {"optimiser": {"learning_rate": 0.2}, "mixture": {"a": 1, "b": 2}}),
            (FLAGS, {"optimiser": {"learning_rate": 0.3}, "mixture": {"c": 1}, "adapter": {"rank": 4}}),
        ],
    )
    assert settings == Training(
        steps=500, mixture={"c": 1}, optimiser=Optimiser(learning_rate=0.3, kind="muon"), adapter=Adapter(rank=4)
    )
    assert origins == {
        "steps": "--size 30m",
        "warmup": DEFAULT,
        "mixture": "--mixture",
        "optimiser.kind": "--size 30m",
        "optimiser.learning_rate": "--learning-rate",
        "optimiser.betas": DEFAULT,
        "adapter.rank": "--rank",
    }


def test_an_optional_section_can_be_switched_off_and_on_again() -> None:
    on, off = ("a.toml", {"adapter": {"rank": 4}}), ("b.toml", {"adapter": None})
    settings, origins = resolve(Training, [on, off])
    assert settings.adapter is None
    assert origins["adapter"] == "b.toml"
    settings, origins = resolve(Training, [off, on])
    assert settings.adapter == Adapter(rank=4)
    assert origins["adapter.rank"] == "a.toml"
    assert "adapter" not in origins


def test_layers_are_left_as_they_were() -> None:
    preset = {"optimiser": {"learning_rate": 0.1}}
    resolve(Training, [("preset", preset), (FLAGS, {"optimiser": {"learning_rate": 0.2}})])
    assert preset == {"optimiser": {"learning_rate": 0.1}}


@pytest.mark.parametrize(
    ("layer", "near"),
    [
        ({"step": 1}, "'steps'"),
        ({"optimiser": {"learnin_rate": 1}}, "'optimiser.learning_rate'"),
        ({"learning_rate": 1}, "'optimiser.learning_rate'"),
        ({"optimiser": {"learning-rate": 1}}, "'optimiser.learning_rate'"),
        ({"adapter": {"rnk": 1}}, "'adapter.rank'"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_and_the_file(layer: dict[str, Any], near: str) -> None:
    with pytest.raises(UnknownName, match="unknown setting") as caught:
        resolve(Training, [("first.toml", {"steps": 3}), ("recipe.toml", layer)])
    assert near in str(caught.value.remedy)
    assert caught.value.where == "recipe.toml"


@pytest.mark.parametrize(
    ("layers", "what", "where"),
    [
        ([("r.toml", {"steps": "many"})], "steps: ", "r.toml"),
        ([("r.toml", {"optimiser": {"learning_rate": 1}}), (FLAGS, {"steps": 0})], "steps: ", "--steps"),
        ([(FLAGS, {"optimiser": {"learning_rate": -1}}), ("r.toml", {"steps": 1})], "learning_rate: ", FLAGS),
        ([("r.toml", {"optimiser": {"betas": [0.1, "x"]}})], "optimiser.betas.1: ", "r.toml"),
        ([("r.toml", {"optimiser": 3})], "optimiser: ", "r.toml"),
        ([("r.toml", {"adapter": {"rank": 0}})], "adapter.rank: ", "r.toml"),
        ([("r.toml", {"mixture": {"a": "x"}})], "mixture.a: ", "r.toml"),
        ([("a.toml", {"steps": 5}), ("b.toml", {}), (FLAGS, {"warmup": 9})], "longer than the run", f"a.toml, {FLAGS}"),
    ],
)
def test_wrong_values_name_the_layer_that_set_them(layers: list[Any], what: str, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(Training, layers)
    assert what in caught.value.what
    assert caught.value.where == (where if where != FLAGS else "--learning-rate")


@given(layers=st.lists(st.fixed_dictionaries({}, optional={"steps": st.integers(1, 9), "warmup": st.just(1)})))
def test_the_last_layer_that_has_a_key_wins(layers: list[dict[str, int]]) -> None:
    named = [(f"layer {i}", layer) for i, layer in enumerate(layers)]
    settings, origins = resolve(Training, named)
    for key in ("steps", "warmup"):
        last = next(((name, layer[key]) for name, layer in reversed(named) if key in layer), None)
        assert (origins[key], getattr(settings, key)) == (last or (DEFAULT, getattr(Training(), key)))


def test_flags_and_sections() -> None:
    assert flag_of("optimiser.learning_rate") == "--learning-rate"
    assert section_of(Optimiser) is section_of(Optimiser | None) is Optimiser
    assert section_of(int | None) is section_of(dict[str, int]) is section_of(Literal["a"]) is None


# --- recipe files -------------------------------------------------------------------------------------------------


def test_a_recipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "دستور.toml"
    path.write_text('\ufeffsteps = 3\nname = "سلام"\n[optimiser]\nlearning_rate = 1e-4\n', encoding="utf-8")
    assert read_toml(path) == {"steps": 3, "name": "سلام", "optimiser": {"learning_rate": 1e-4}}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"steps = 3\nname =\n", 2),
        (b"a = 1\n\n[b]\n[b]\n", 4),
        (b"a = 1\nb = 'x\n\n", 2),
        (b"a = 1\nb = 2\na = 3", 3),
        (b"a = 1\nb = '\xff'\n", 2),
        (b"a = " + b"9" * 5000, 1),
    ],
)
def test_a_file_that_is_not_toml_is_refused_with_the_line(tmp_path: Path, content: bytes, line: int) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(content)
    with pytest.raises(FileFormatError) as caught:
        read_toml(path)
    assert caught.value.where == f"{path}:{line}"
    assert "at line" not in caught.value.what


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_toml(tmp_path / "no.toml")
    with pytest.raises(UsageError, match="directory"):
        read_toml(tmp_path)
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000)
    with pytest.raises(FileFormatError, match=r"nested|deep"):
        read_toml(tmp_path / "deep.toml")


@given(raw=st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_bytes(raw)
    with contextlib.suppress(FileFormatError):
        assert isinstance(read_toml(path), dict)
