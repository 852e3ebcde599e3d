"""benchmarks/serving.py: its prompts, its figures, and a turn against a real server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are programs in a folder, not a package

import harness  # noqa: E402
from contenders import serve_process  # noqa: E402

import serving as benchmark  # noqa: E402


def test_there_are_different_prompts_for_every_request_of_a_run():
    needed = sum(benchmark.FULL.clients.values()) + 1
    found = benchmark.prompts(needed)
    assert len(set(found)) == needed
    assert found == benchmark.prompts(needed)
    assert min(map(len, found)) < 200 < 1000 < max(map(len, found))


def test_a_turn_gives_a_figure_for_every_case(server, model_id):
    scope = benchmark.Scope({1: 1, 2: 3}, 1, answers=(3, 6), system_chars=200)
    # The tiny model reads 512 short tokens: its prompts are short.
    found = dict(benchmark.ask_all(server.url, model_id, scope, ["red is", "blue is", "red and", "blue and", "a"]))
    names = ("throughput", "first-token-p95", "between-tokens-p95")
    assert set(found) == {f"{name}/clients={n}" for name in names for n in (1, 2)} | {"prefix/first", "prefix/later"}
    assert all(figure > 0 for figure in found.values())


def test_a_request_that_fails_ends_a_turn(server):
    with pytest.raises(harness.ContenderError, match=r"1 of 1 requests failed: .*404"):
        next(benchmark.ask_all(server.url, "nobody", benchmark.QUICK, ["red"]))


def test_medians_become_cases_and_who_was_not_measured_is_absent():
    figures = {
        "throughput/clients=1": {"Craton": [10.0, 30.0, 20.0], "transformers serve": [5.0]},
        "prefix/first": {"Craton": [0.5]},
    }
    found = benchmark.as_cases(
        figures, {"transformers serve": "it fell over"}, {"Craton": "a", "transformers serve": ""}
    )
    throughput, prefix = found["throughput/clients=1"], found["prefix/first"]
    assert (throughput["ours"], throughput["ratio"]) == (20, {"transformers serve": 4})
    assert "absent" not in throughput
    assert prefix["absent"] == {"transformers serve": "it fell over"}
    assert prefix["unit"] == "s"


def test_a_server_that_is_not_there_or_does_not_start_says_why():
    missing = serve_process.Server(["true"], "m", "/", needs=("no_such_module",))
    with pytest.raises(harness.ContenderError, match="not installed"), missing.running(1):
        pass
    broken = serve_process.Server([sys.executable, "-c", "raise SystemExit('no luck')"], "m", "/")
    with pytest.raises(harness.ContenderError, match="did not start: no luck"), broken.running(1):
        pass
