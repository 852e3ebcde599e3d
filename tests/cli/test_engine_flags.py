"""The flags of the engine: speculation and stream windows, from the command line to the answer."""

from __future__ import annotations

import json

import pytest
from cyclopts import App

from craton.cli.generate import generate
from craton.errors import ContextOverflow, UnknownName, UsageError

PROMPT = "the code of a is red the code of a is red the code of"


@pytest.fixture
def answer(tiny_model, capsys):
    """Runs `craton generate` with these words and gives its JSON."""
    app = App()
    app.command(generate, name="generate")

    def run(*words: str, prompt: str = PROMPT) -> dict:
        fixed = ["--model", str(tiny_model), "--dtype", "float32", "--threads", "1", "--json"]
        app(["generate", prompt, *fixed, *words], result_action="return_value", exit_on_error=False)
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("temperature", ["0", "0.5"])
def test_speculation_changes_the_work_and_not_the_text(answer, temperature):
    words = ("--max-tokens", "40", "--temperature", temperature, "--seed", "3")
    off, on = answer(*words, "--speculate", "off"), answer(*words)
    assert on["choices"] == off["choices"]
    assert off["usage"]["drafted_tokens"] == 0


def test_guesses_are_counted(answer):
    usage = answer("--max-tokens", "60", "--logit-bias.0", "-100")["usage"]
    assert usage["drafted_tokens"] >= usage["accepted_tokens"] > 0  # greedily, a tiny model goes round in a circle


def test_an_unknown_draft_model_is_refused(answer):
    with pytest.raises((UsageError, UnknownName)):
        answer("--speculate", "no-such-model")


def test_a_stream_window_goes_beyond_the_context(answer, tiny_model):
    long = "zim zam zum what text " * 200
    with pytest.raises(ContextOverflow):
        answer("--max-tokens", "20", prompt=long)
    streamed = answer("--max-tokens", "20", "--stream-window", "64", "--sinks", "2", prompt=long)
    assert streamed["usage"]["prompt_tokens"] > 512
    assert streamed["choices"][0]["finish_reason"] in ("length", "stop")
    with pytest.raises(UsageError, match="more than the context"):
        answer("--stream-window", "512", "--sinks", "4")
