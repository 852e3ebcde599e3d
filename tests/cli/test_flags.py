"""Settings as flags: what the help shows, what arrives, and what is said about values that are no values."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from cyclopts import App
from pydantic import Field, PositiveInt

from craton.cli.flags import Flags, flags_of, given
from craton.config import Settings
from craton.config.resolve import FLAGS, resolve
from craton.errors import UsageError


class Optimiser(Settings):
    kind: Literal["adamw", "muon"] = Field("adamw", description="which optimiser")
    learning_rate: float = Field(1e-3, gt=0, description="its peak")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of the moments")


class Training(Settings):
    steps: PositiveInt | None = Field(None, description="how many (none: by the size)")
    packing: bool = Field(True, description="documents share a row")
    lengths: tuple[int, ...] = Field((), description="of the rows")
    mixture: dict[str, float] = Field(default_factory=dict, description="as --mixture.NAME WEIGHT")
    optimiser: Optimiser = Field(Optimiser(), description="What changes the weights.")


@pytest.fixture
def run():
    """run(*tokens) -> the layer that a verb with the flags of Training and one of its own is called with."""
    app = App()
    layers: list[dict[str, Any]] = []

    @app.default
    def verb(data: str, /, *, flags: Flags[Training] | None = None, json: bool = False) -> None:
        layers.append(given(flags))

    def call(*tokens: str) -> dict[str, Any]:
        app(["data", *tokens], exit_on_error=False, print_error=False, result_action="return_value")
        return layers[-1]

    call.app = app
    return call


def test_only_what_was_given_arrives_nested_as_the_settings_are(run):
    assert run() == run("--json") == {}
    assert run("--steps", "3", "--no-packing", "--learning-rate", "1e-4", "--lengths", "1", "--lengths", "2") == {
        "steps": 3,
        "packing": False,
        "lengths": (1, 2),
        "optimiser": {"learning_rate": 1e-4},
    }
    assert run("--mixture.a", "1", "--mixture.b", "2.5") == {"mixture": {"a": 1.0, "b": 2.5}}
    assert run("--betas", "0.8", "0.9", "--kind", "muon") == {"optimiser": {"betas": (0.8, 0.9), "kind": "muon"}}


def test_the_layer_resolves(run):
    settings, origins = resolve(
        Training, [("r.toml", {"steps": 9, "packing": False}), (FLAGS, run("--packing", "--kind", "muon"))]
    )
    assert settings == Training(steps=9, optimiser=Optimiser(kind="muon"))
    assert [origins[key] for key in ("steps", "packing", "optimiser.kind")] == ["r.toml", "--packing", "--kind"]


def test_values_out_of_range_are_left_to_the_resolution_of_all_layers(run):
    layer = run("--steps", "0")
    with pytest.raises(UsageError, match="steps: ") as caught:
        resolve(Training, [(FLAGS, layer)])
    assert caught.value.where == "--steps"


@pytest.mark.parametrize(("text", "number"), [("7", 7), ("1e9", 10**9), ("1_000", 1000), ("9" * 20, 10**20 - 1)])
def test_whole_numbers(run, text, number):
    assert run("--steps", text) == {"steps": number}


@pytest.mark.parametrize(
    ("tokens", "what"),
    [
        (["--steps", "3.5"], "whole number"),
        (["--steps", "1.5e0"], "whole number"),
        (["--steps", "inf"], "whole number"),
        (["--steps", "none"], "whole number"),
        (["--learning-rate", "fast"], "not a number"),
        (["--kind", "adam"], "adamw"),
        (["--learnin-rate", "1"], "--learning-rate"),
        (["--optimiser.learning-rate", "1"], "--optimiser"),
    ],
)
def test_what_is_no_value_is_refused(run, tokens, what):
    with pytest.raises(Exception, match=what):
        run(*tokens)


def test_the_help_shows_descriptions_and_defaults(run, capsys):
    with pytest.raises(SystemExit):
        run.app(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "--steps INT how many (none: by the size)",
        "--packing --no-packing documents share a row [default: True]",
        "Optimiser",
        "What changes the weights.",
        "--learning-rate FLOAT its peak [default: 0.001]",
        "--betas FLOAT FLOAT of the moments [default: 0.9 0.95]",
        "which optimiser [choices: adamw, muon] [default: adamw]",
    ):
        assert part in text
    assert "None" not in text
    assert "--empty" not in text


def test_a_flag_that_two_settings_claim_is_a_mistake_of_ours():
    class Clash(Settings):
        learning_rate: float = Field(1.0, description="one")
        optimiser: Optimiser = Field(Optimiser(), description="two")

    with pytest.raises(TypeError, match=r"optimiser.learning_rate and learning_rate are both --learning-rate"):
        flags_of(Clash)
