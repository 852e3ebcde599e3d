"""`craton serve` and `craton bench serve`: flags, keys, refusals, and a load against a real server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
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


def test_percentiles_are_of_the_sample():
    from craton.serving.load import Sample, summary

    samples = [Sample(0.0, first_token=i / 100, between=[0.1], ended=1.0, tokens=2) for i in range(1, 101)]
    samples.append(Sample(0.0, error="HTTP 503"))
    found = summary(samples, 10.0)
    assert found["first_token_seconds"] == {"p50": 0.51, "p95": 0.96, "p99": 1.0}
    assert (found["errors"], found["tokens_per_second"]) == (1, 20.0)
    assert found["error_kinds"] == {"HTTP 503": 1}
