"""The benchmark of spoken digits: which recordings are tested, and what counts as right."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

soundfile = pytest.importorskip("soundfile")
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return pytest.importorskip("spoken_digits")


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "recordings.zip"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("recordings/README", "no sound")
        for name in ("3_theo_0.wav", "3_theo_12.wav", "7_george_4.wav"):
            buffer = io.BytesIO()
            soundfile.write(buffer, np.zeros(800), 8000, format="WAV")
            files.writestr(f"recordings/{name}", buffer.getvalue())
    return path


def test_names_say_digit_speaker_and_number(benchmark, archive, tmp_path):
    found = benchmark.unpack(archive, tmp_path, 50)
    assert [(one.digit, one.speaker, one.index) for one in found] == [(3, "theo", 0), (3, "theo", 12), (7, "george", 4)]
    assert all(len(one.samples) == 1600 and one.path.is_file() for one in found)
    assert len(benchmark.unpack(archive, tmp_path, 5)) == 2
    assert len(benchmark.spread(found, 2)) == 2


def test_a_transcript_is_right_if_it_is_the_digit_and_nothing_else(benchmark, archive, tmp_path):
    recordings = benchmark.unpack(archive, tmp_path, 50)
    texts = iter(["Three.", "3, 3", " 7!"])
    model = SimpleNamespace(transcribe=lambda samples: SimpleNamespace(text=next(texts)))
    assert benchmark.heard(model, recordings) == [True, False, True]
    value, said = benchmark.figure([True, False, True])
    assert value == pytest.approx(66.67, abs=0.01)
    assert said.startswith("n 3, 95 % interval")


def test_it_skips_with_the_reason_where_the_data_is_absent(tmp_path):
    command = [sys.executable, str(FOLDER / "spoken_digits.py"), "--data", str(tmp_path / "nothing.zip")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "skipped" in done.stdout
