"""The benchmark of fewer bits for an encoder and a recogniser: what is scored, by what, and a whole case."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("soundfile", reason="sounds need soundfile")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # benchmarks are programs in a folder, not a package

import encoder_compression as benchmark  # noqa: E402
from harness import ContenderError, Document  # noqa: E402


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of its own, to which the variable goes back behind each test."""
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Two articles of two paragraphs, four questions."""
    data = [
        {"paragraphs": [paragraph("the red code", "what red code"), paragraph("zim zam zum", "what zum", "what zim")]},
        {"paragraphs": [paragraph("blue class of text", "what class"), paragraph("a number")]},
    ]
    path = tmp_path / "xquad.json"
    path.write_text(json.dumps({"data": data}))
    return path


def paragraph(context: str, *questions: str) -> dict[str, object]:
    return {"context": context, "qas": [{"question": question} for question in questions]}


def bench(score: list[float], weights: list[float], clusters: list[int] | None = None) -> benchmark.Bench:
    plain_N = np.array(score)
    return benchmark.Bench("none", {}, "%", True, lambda model: plain_N, np.array(weights), clusters, plain_N)


def test_a_figure_is_that_of_all_items_together() -> None:
    assert bench([100, 0, 200], [10, 20, 30]).figure(np.array([100.0, 0, 200])) == 5


def test_the_difference_is_an_interval_of_clusters() -> None:
    plain = bench([0.0] * 200, [1.0] * 200)
    assert plain.difference(np.zeros(200)) == "each item the same"
    worse_N = np.random.default_rng(0).binomial(1, 0.5, 20).repeat(10).astype(float)
    wide = bench([0.0] * 200, [1.0] * 200, [item // 10 for item in range(200)])
    (low, high), (least, most) = ([*map(float, one.difference(worse_N).split(" to "))] for one in (plain, wide))
    assert least < low < worse_N.mean() < high < most


def test_questions_know_their_paragraph_and_their_article(questions: Path) -> None:
    paragraphs, asked = benchmark.read_questions(questions)
    assert paragraphs == ["the red code", "zim zam zum", "blue class of text", "a number"]
    assert asked == [("what red code", 0, 0), ("what zum", 1, 0), ("what zim", 1, 0), ("what class", 2, 1)]


def test_gains_fall_with_the_place_of_the_right_paragraph() -> None:
    places = {"x": [1.0, 0.0], "y": [0.0, 1.0], "near x": [0.9, 0.1], "one": [0.6, 0.8]}
    found_N = benchmark.gains(
        lambda texts: np.array([places[text] for text in texts], np.float32),  # type: ignore[arg-type]
        ["x", "y", "one"],
        [("near x", 0), ("near x", 2), ("near x", 1)],
    )
    assert found_N == pytest.approx([1, 1 / np.log2(3), 1 / 2])


@pytest.mark.slow
def test_an_encoder_in_fewer_bits_stands_beside_itself(questions: Path, tiny_model: Path, tmp_path: Path) -> None:
    plain = benchmark.searching(str(tiny_model), questions, quick=False)
    assert plain.clusters == [0, 0, 0, 1]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("the code of red is zim blue green word " * 3 for _ in range(99)))
    told = {"calibration": (str(text),), "samples": 4, "window": 32}
    small = benchmark.Bench(**{**vars(plain), "told": told})
    for one in (small.bits(8, ("awq", "rtn")), small.zeros("2:4", ("wanda", "magnitude"))):
        assert one["limit"] == one["peers"]["as it is"]
        assert set(one["peers"]) == {"as it is", "RTN"} or set(one["peers"]) == {"as it is", "magnitude"}
        assert all("MB" in said for said in one["settings"].values())
    assert "AWQ" in small.bits(8, ("awq",))["settings"]["as it is"]


def test_no_prompt_that_calibrates_is_scored(tmp_path: Path) -> None:
    texts = tmp_path / "usr/share/doc/asterisk-core-sounds-en"
    folder = tmp_path / "usr/share/asterisk/sounds/en_US_f_Allison"
    texts.mkdir(parents=True)
    folder.mkdir(parents=True)
    for number in range(210):
        (folder / f"{number}.wav").touch()
    lines = "\n".join(f"{number}: please say the number {number}" for number in range(210))
    (texts / "core-sounds-en.txt.gz").write_bytes(gzip.compress(lines.encode()))
    scored, others = benchmark.parted(tmp_path, 60)
    assert len(scored) == len({path for path, _ in scored}) == 60
    assert len(others) >= 80
    assert not {path for path, _ in scored} & set(others)


def test_words_are_compared_as_the_other_benchmark_compares_them() -> None:
    pytest.importorskip("transformers", reason="the normaliser is transformers'")
    words = benchmark.normaliser()
    assert words("Press the * key, please.") == ["press", "the", "star", "key", "please"]


def test_what_is_absent_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    with pytest.raises(ContenderError, match="Debian"):
        benchmark.hearing("none", tmp_path, tmp_path, quick=True)
    path = tmp_path / "figures.json"
    told = ["--xquad", str(tmp_path / "none"), "--sounds", str(tmp_path), "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["encoder_compression.py", *told])
    assert benchmark.main() == 0
    assert "minilm is not measured" in (said := capsys.readouterr().err)
    assert "whisper is not measured" in said
    document: Document = json.loads(path.read_text())
    assert document["cases"] == {}
