"""The long-context tests on tiny models: what they ask, what they count, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from cyclopts import App

import craton
from craton.errors import CratonError, DataError, UsageError
from craton.evaluation.long_context import measure, needle, perplexity_by_position, streamed_by_position
from craton.inference.model import Model
from craton.inference.scoring import Score
from craton.inference.streaming import StreamWindow


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Model:
    return craton.load(tiny_model, dtype="float32", threads=1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the code of a is red blue green zim zam zum what text class answer question " * 60)
    return path


def ids_of(model: Model, text: Path) -> list[int]:
    return model.tokenizer.encode(text.read_text(), add_special_tokens=False)


def test_a_reader_that_sees_the_fact_finds_it(model, monkeypatch):
    asked: list[list[int]] = []

    def score(pairs):
        asked.extend(context for context, _ in pairs[:1])
        said = [model.tokenizer.decode(context) for context, _ in pairs]
        words = [model.tokenizer.decode(continuation).strip() for _, continuation in pairs]
        return [Score(0.0 if word in text else -1.0, 1, True, []) for text, word in zip(said, words, strict=True)]

    monkeypatch.setattr(model, "score", score)
    cells = needle(model, [300, 500], (0.0, 0.5, 1.0), trials=2)
    assert [(c.length, c.depth) for c in cells] == [(n, d) for n in (300, 500) for d in (0.0, 0.5, 1.0)]
    assert all(c.found == 1 and c.rank == 1 for c in cells)
    assert all(n - 12 <= len(context) <= n for context, n in zip(asked, [300] * 6 + [500] * 6, strict=True))
    # The fact stands where it was asked to be.
    fact = [model.tokenizer.decode(context).index("secret word") for context in asked[:6:2]]
    assert fact[0] < 10 < fact[1] < fact[2]


def test_a_reader_that_sees_nothing_ranks_by_chance(model, monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def score(pairs):
        return [Score(float(value), 1, False, []) for value in torch.rand(len(pairs), generator=generator)]

    monkeypatch.setattr(model, "score", score)
    [cell] = needle(model, [400], (0.5,), trials=200)
    assert 4.5 < cell.rank < 6.5
    assert cell.found < 0.25


def test_the_same_seed_asks_the_same(model):
    assert needle(model, [300], (0.5,), trials=2) == needle(model, [300], (0.5,), trials=2)


def test_perplexity_by_position_is_that_of_whole_windows(model, text):
    ids = ids_of(model, text)
    bins = perplexity_by_position(model, ids, bins=4, window=101)
    start = [] if model.start_id is None else [model.start_id]
    size = 101 - len(start)
    windows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
    assert sum(b.tokens for b in bins) == sum(len(w) - (not start) for w in windows)
    logprobs = []
    for window in windows:
        whole = [*start, *window]
        logprobs_TV = model.logits(whole[:-1]).log_softmax(-1)
        logprobs.append(logprobs_TV.gather(1, torch.tensor(whole[1:])[:, None])[:, 0])
    per_window = torch.stack(logprobs)
    first, last = bins[0].first - (not start), bins[0].last - (not start)
    assert bins[0].perplexity == pytest.approx(math.exp(-float(per_window[:, first:last].mean())), rel=1e-3)


def test_a_stream_that_never_fills_reads_as_the_whole_does(model, text):
    ids = ids_of(model, text)[:200]
    streamed = streamed_by_position(model, ids, StreamWindow(400, 4), bins=1)
    score = model.score(
        [([model.start_id] if model.start_id is not None else ids[:1], ids if model.start_id is not None else ids[1:])]
    )
    assert streamed[0].perplexity == pytest.approx(math.exp(-score[0].logprob / len(score[0].token_logprobs)), rel=1e-3)


def test_a_stream_reads_a_text_of_any_length(model, text):
    ids = ids_of(model, text)
    assert len(ids) > model.context
    bins = streamed_by_position(model, ids, StreamWindow(64, 4), bins=5)
    assert sum(b.tokens for b in bins) in (len(ids), len(ids) - 1)
    assert all(math.isfinite(b.perplexity) for b in bins)


def test_what_cannot_be_measured_is_refused(model, text, tmp_path):
    with pytest.raises(UsageError, match="more than the context"):
        needle(model, [model.context + 1])
    with pytest.raises(UsageError, match="no room"):
        needle(model, [20])
    with pytest.raises(DataError, match="fewer than one window"):
        perplexity_by_position(model, ids_of(model, text)[:50])
    with pytest.raises(UsageError, match="none is named"):
        measure(model, stream=StreamWindow(64, 4))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(CratonError, match="UTF-8"):
        measure(model, tmp_path / "bad.txt", lengths=[300])


def test_the_command(tiny_model, text, capsys):
    from craton.cli.evaluate import evaluate

    app = App()
    app.command(evaluate, name="eval")
    words = ["eval", str(tiny_model), str(text), "--long-context", "--lengths", "260", "--stream-window", "64"]
    app([*words, "--json"], result_action="return_value")
    found = json.loads(capsys.readouterr().out)
    assert [cell["length"] for cell in found["needle"]] == [260] * 3
    assert len(found["positions"]) == len(found["streamed"]) == 8
    app(words[:-2], result_action="return_value")
    out = capsys.readouterr().out
    assert "mean rank" in out
    assert "perplexity of text.txt by position" in out
