"""Recordings with texts from folders and tables, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from craton.data.speech import read_speech
from craton.errors import CratonError, DataError, FileFormatError, UsageError

soundfile = pytest.importorskip("soundfile")


def write(path, seconds=0.5, rate=16_000, level=0.25):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.full(int(seconds * rate), level, np.float32), rate, subtype="FLOAT")


def test_a_folder_of_sounds_with_texts_beside_them(tmp_path):
    for name, text in (("b/two.wav", "Two  words\n"), ("a.flac", "\ufeffone")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, np.full(4000, 0.25), 16_000)
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    write(tmp_path / ".hidden/three.wav")
    found = read_speech([str(tmp_path)])
    assert found.texts == ("one", "Two words")
    assert [len(samples) for samples in found.recordings] == [4000, 4000]
    assert found.recordings[0].dtype == np.int16
    assert set(found.recordings[0].tolist()) == {8192}
    assert found.seconds == 0.5


def test_a_table_names_files_beside_it(tmp_path):
    write(tmp_path / "sounds/a.wav", level=2.0)  # beyond full scale
    (tmp_path / "t.jsonl").write_text(json.dumps({"audio": "sounds/a.wav", "text": " hello "}))
    (tmp_path / "t.csv").write_text("audio,text\nsounds/a.wav,hello\n")
    found = read_speech([str(tmp_path / "t.jsonl"), str(tmp_path / "t.csv")])
    assert found.texts == ("hello", "hello")
    assert found.recordings[0].max() == 32767
    assert found.origins == (str(tmp_path / "t.jsonl") + ":1", str(tmp_path / "t.csv") + ":2")


def test_a_split_is_a_partition_and_the_digest_knows_every_change(tmp_path):
    lines = []
    for number in range(8):
        write(tmp_path / f"{number}.wav", level=number / 10)
        lines.append(json.dumps({"audio": f"{number}.wav", "text": str(number)}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    found = read_speech([str(tmp_path / "t.jsonl")])
    training, held_out = found.split(0.25, seed=3)
    assert len(held_out) == 2
    assert sorted(training.texts + held_out.texts) == sorted(found.texts)
    assert found.split(0.25, seed=3)[1].texts == held_out.texts
    assert len(found.split(0.0, seed=3)[1]) == 0
    assert len(found.take([]).split(0.5, seed=3)[0]) == 0
    assert len({found.digest, training.digest, held_out.digest, found.take(range(7, -1, -1)).digest}) == 4


@pytest.mark.parametrize(
    ("files", "error", "match"),
    [
        ({}, UsageError, "no recordings"),
        ({"a.wav": None}, DataError, "no text"),
        ({"a.wav": None, "a.txt": b" \n"}, DataError, "empty"),
        ({"a.wav": None, "a.txt": b"\xff\xfe\xfa"}, FileFormatError, "UTF-8"),
        ({"a.wav": None, "a.txt": b"x" * ((1 << 20) + 1)}, FileFormatError, "1 MiB"),
        ({"a.wav": b"no sound", "a.txt": b"a"}, FileFormatError, "not a sound"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, error, match):
    for name, content in files.items():
        if content is None:
            write(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=match):
        read_speech([str(tmp_path)])


@pytest.mark.parametrize(
    "record", [{"text": "a"}, {"audio": 3, "text": "a"}, {"audio": "a.wav"}, {"audio": "a.wav", "text": ""}]
)
def test_records_that_are_refused(tmp_path, record):
    write(tmp_path / "a.wav")
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    with pytest.raises(DataError) as caught:
        read_speech([str(tmp_path / "t.jsonl")])
    assert caught.value.where.endswith("t.jsonl:1")
    assert caught.value.remedy


def test_other_sources_are_refused(tmp_path):
    write(tmp_path / "a.wav")
    for source in (tmp_path / "a.wav", tmp_path / "nothing"):
        with pytest.raises(CratonError) as caught:
            read_speech([str(source)])
        assert caught.value.remedy
