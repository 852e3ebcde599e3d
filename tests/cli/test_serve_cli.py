"""`craton serve` and `craton bench serve`: flags, keys, refusals, and a load against a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from craton.cli import bench, serve
from craton.errors import UsageError

pytest.importorskip("uvicorn", reason="needs the extra [serve]")


def call(app, *words: object) -> int:
    """Run a verb; gives its exit status. Refusals are raised."""
    try:
        app([str(word) for word in words])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_help_needs_no_torch_and_no_server():
    code = (
        "import sys; from craton.cli.serve import serve; from craton.cli.bench import bench\n"
        "for app in (serve, bench):\n"
        "    try: app(['--help'])\n"
        "    except SystemExit: pass\n"
        "loaded = {'torch', 'uvicorn', 'starlette'} & set(sys.modules)\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for flag in ("--host", "--api-key-file", "--max-body-bytes", "--request-timeout", "--log-prompts", "--drain"):
        assert flag in done.stdout


def test_keys_are_made_listed_and_removed(tmp_path, capsys):
    path = tmp_path / "keys.json"
    assert call(serve.serve, "key", "add", "alice", "--api-key-file", path) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("craton-")
    assert key not in path.read_text()
    call(serve.serve, "key", "list", "--api-key-file", path, "--json")
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["keys"]] == ["alice"]
    call(serve.serve, "key", "rm", "alice", "--api-key-file", path)
    with pytest.raises(UsageError, match="unknown key"):
        serve.serve(["key", "rm", "alice", "--api-key-file", str(path)])


def test_a_key_is_given_a_rank_and_rights(tmp_path, capsys):
    path = tmp_path / "keys.json"
    call(serve.serve, "key", "add", "ops", "--admin", "--priority", "5", "--api-key-file", path)
    call(serve.serve, "key", "add", "batch", "--priority", "-5", "--api-key-file", path)
    capsys.readouterr()
    call(serve.serve, "key", "list", "--api-key-file", path, "--json")
    found = json.loads(capsys.readouterr().out)["keys"]
    assert [(one["name"], one["priority"], one["admin"]) for one in found] == [("ops", 5, True), ("batch", -5, False)]
    assert "hash" not in found[0]
    call(serve.serve, "key", "list", "--api-key-file", path)
    assert "priority 5\tadmin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "much"], "no size"),
        (["--host", "0.0.0.0"], "no keys"),
        (["--port", "70000"], "port"),
        (["no-such-model", "--port", "0"], "no-such-model"),
    ],
)
def test_what_cannot_be_served_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=said):
        serve.serve(words)


def test_settings_come_from_a_file_and_flags_go_before_it(tmp_path, monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr("craton.serving.server.run", lambda models, settings, **rest: seen.append((models, settings)))
    recipe = tmp_path / "serve.toml"
    recipe.write_text("port = 9000\nqueue = 3\n")
    call(serve.serve, "some-model", "--recipe", recipe, "--queue", "5")
    [(models, settings)] = seen
    assert models == ("some-model",)
    assert (settings.port, settings.queue) == (9000, 5)


def test_the_example_is_a_recipe(tmp_path, monkeypatch):
    seen: list[object] = []
    monkeypatch.setattr("craton.serving.server.run", lambda models, settings, **rest: seen.append(settings))
    text = (Path(__file__).parents[2] / "examples" / "serve" / "serve.toml").read_text()
    recipe = tmp_path / "serve.toml"
    recipe.write_text(text)
    call(serve.serve, "some-model", "--recipe", recipe)
    assert (seen[0].host, seen[0].memory_bytes) == ("0.0.0.0", 8 * 10**9)


def test_a_load_is_measured(tiny_model, tmp_path, capsys):
    from craton.serving.server import serve as run
    from craton.serving.settings import ServeSettings

    started, found = threading.Event(), []

    def on_start(server, state, port) -> None:
        found.append((server, port))
        started.set()

    thread = threading.Thread(
        target=lambda: asyncio.run(run([str(tiny_model)], ServeSettings(port=0), threads=1, on_start=on_start))
    )
    thread.start()
    try:
        assert started.wait(60)
        port = found[0][1]
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text('{"prompt": "what is red"}\nwhat is blue\n')
        words = ["serve", f"http://127.0.0.1:{port}", "--requests", 12, "--rate", 100, "--max-tokens", 6]
        assert call(bench.bench, *words, "--prompts", prompts, "--json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["requests"], report["errors"], report["model"]) == (12, 0, tiny_model.name)
        assert 12 <= report["completion_tokens"] <= 72
        assert report["first_token_seconds"]["p50"] <= report["first_token_seconds"]["p99"]
        assert call(bench.bench, *words, "--model", "nobody") == 1
        assert "HTTP 404" in capsys.readouterr().err
    finally:
        found[0][0].should_exit = True
        thread.join()
    with pytest.raises(UsageError, match="no OpenAI-compatible server"):
        bench.bench(["serve", f"http://127.0.0.1:{port}"])


def test_requests_are_what_was_asked_for():
    from craton.serving.load import Load

    plain = Load(["a", "b"], "m", max_tokens=(4, 8, 16)).body(3)
    assert plain["messages"] == [{"role": "user", "content": "b"}]
    assert plain["max_tokens"] == 4
    assert "temperature" not in plain
    common = Load(["a"], "m", system="be brief", temperature=0.0).body(0)
    assert common["messages"][0] == {"role": "system", "content": "be brief"}
    assert common["temperature"] == 0.0


def test_a_server_that_ends_its_streams_without_a_last_word_is_understood(monkeypatch):
    from craton.serving import load

    ends: list[str | None] = ["stop", None]

    async def lines(*_: object):
        said = {"choices": [{"delta": {"content": "x"}, "finish_reason": ends.pop(0)}]}
        yield f"data: {json.dumps(said)}"

    monkeypatch.setattr(load, "_lines", lines)
    found = asyncio.run(load.run_load("http://127.0.0.1:1", load.Load(["a"], "m", 2, rate=0, clients=1)))
    assert (found["requests"], found["errors"], found["completion_tokens"]) == (2, 1, 1)


def test_a_clients_time_begins_when_it_sends_and_a_due_requests_when_it_is_due(monkeypatch):
    from craton.serving import load

    async def answer(url, body, key, sample) -> None:
        await asyncio.sleep(0.05)
        sample.first_token = time.perf_counter() - sample.started

    monkeypatch.setattr(load, "_ask", answer)
    closed = asyncio.run(load.run_load("", load.Load(["a"], "m", 6, rate=0, clients=1)))
    due = asyncio.run(load.run_load("", load.Load(["a"], "m", 6, rate=1e6, clients=1)))
    # Six in a row: the last of those that were due at once has waited for five before it.
    assert closed["first_token_seconds"]["p99"] < due["first_token_seconds"]["p99"] / 2


def test_percentiles_are_of_the_sample():
    from craton.serving.load import Sample, summary

    samples = [Sample(0.0, first_token=i / 100, between=[0.1], ended=1.0, tokens=2) for i in range(1, 101)]
    samples.append(Sample(0.0, error="HTTP 503"))
    found = summary(samples, 10.0)
    assert found["first_token_seconds"] == {"p50": 0.51, "p95": 0.96, "p99": 1.0}
    assert (found["errors"], found["tokens_per_second"]) == (1, 20.0)
    assert found["error_kinds"] == {"HTTP 503": 1}
