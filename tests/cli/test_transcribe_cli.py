"""`craton transcribe` as a user meets it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from craton.cli import main

soundfile = pytest.importorskip("soundfile")


@pytest.fixture
def craton(monkeypatch, capsys):
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def speech(spoken_prompts) -> Path:
    return next(path for path, _ in spoken_prompts if path.stem == "vm-tmpexists")


TEXT = "There is a temporary greeting which overrides your standard greetings."


@pytest.mark.usefixtures("whisper_folder")
class TestGoodFiles:
    def test_text(self, craton, speech):
        status, out, err = craton("transcribe", speech)
        assert (status, out.strip()) == (0, TEXT)
        assert "times as fast" in err

    def test_several_files_and_their_order(self, craton, speech, tmp_path):
        quiet = tmp_path / "quiet.wav"
        soundfile.write(quiet, np.zeros(16_000), 16_000)
        assert craton("transcribe", quiet, speech)[1] == f"{quiet}:\n{speech}:\n{TEXT}\n"

    @pytest.mark.parametrize("format", ["srt", "vtt", "json"])
    def test_formats_into_a_folder(self, craton, speech, tmp_path, format):
        status, out, _ = craton("transcribe", speech, "--format", format, "--out", tmp_path / "new", "--word-times")
        assert (status, out) == (0, "")
        text = (tmp_path / "new" / f"vm-tmpexists.{format}").read_text(encoding="utf-8")
        assert "temporary" in text
        assert ("-->" in text) == (format != "json")

    def test_json(self, craton, speech):
        status, out, err = craton("transcribe", speech, "--json", "--word-times", "--beam", "2")
        document = json.loads(out)
        (one,) = document["transcripts"]
        assert (status, err, one["text"], one["file"]) == (0, "", TEXT, str(speech))
        assert one["segments"][0]["words"][0]["word"] == " There"

    def test_standard_input(self, craton, speech, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(speech.read_bytes())))
        assert craton("transcribe")[1].strip() == TEXT

    def test_what_the_model_cannot_do(self, craton, speech):
        status, _, err = craton("transcribe", speech, "--translate")
        assert status == 2
        assert "English alone" in err

    @pytest.mark.parametrize("name", ["text", "empty", "nan", "cut"])
    def test_bad_files(self, craton, speech, tmp_path, name):
        path = tmp_path / "bad.wav"
        if name == "text":
            path.write_text("not sound")
        elif name == "empty":
            soundfile.write(path, np.zeros(0), 16_000)
        elif name == "nan":
            soundfile.write(path, np.full(16_000, np.nan), 16_000, subtype="FLOAT")
        else:
            path.write_bytes(speech.read_bytes()[:-1000])
        status, out, err = craton("transcribe", path)
        assert (status, out) == (2, "")
        assert "bad.wav" in err
        assert "remedy" in err
        assert "bfloat16" not in err  # said when a model is loaded, which nothing here was worth
        status, out, _ = craton("transcribe", path, "--json")
        assert status == 2
        assert json.loads(out)["error"]["code"] == "bad_file"


@pytest.mark.usefixtures("whisper_folder")
class TestOneOfSeveralIsDamaged:
    """What was done is given all the same, the damaged one is named, and the exit status is 2."""

    @pytest.fixture
    def files(self, tmp_path) -> list[Path]:
        """Two silent recordings, and a text between them that passes for a third."""
        folder = tmp_path / "sound"
        folder.mkdir()
        paths = [folder / name for name in ("one.wav", "two.wav")]
        for seconds, path in enumerate(paths, 1):
            soundfile.write(path, np.zeros(seconds * 16_000), 16_000)
        bad = folder / "bad.wav"
        bad.write_text("not sound")
        return [paths[0], bad, paths[1]]

    @pytest.mark.parametrize("place", [0, 1])
    def test_json(self, craton, files, place):
        files.insert(place, files.pop(1))
        status, out, err = craton("transcribe", *files, "--json")
        document = json.loads(out)
        assert (status, err) == (2, "")
        assert [(Path(one["file"]).name, one["duration"]) for one in document["transcripts"]] == [
            ("one.wav", 1.0),
            ("two.wav", 2.0),
        ]
        (bad,) = document["unreadable"]
        assert (Path(bad["file"]).name, bad["code"]) == ("bad.wav", "bad_file")
        assert bad["what"]
        assert bad["remedy"]

    def test_text_and_a_folder(self, craton, files, tmp_path):
        status, out, err = craton("transcribe", *files)
        good = [path for path in files if path.stem != "bad"]
        assert (status, out) == (2, "".join(f"{path}:\n" for path in good))
        assert f"left out: {files[0].with_name('bad.wav')}" in err
        status, out, err = craton("transcribe", *files, "--out", tmp_path / "new", "--format", "json")
        assert (status, out) == (2, "")
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.json", "two.json"]
        assert json.loads((tmp_path / "new" / "two.json").read_text(encoding="utf-8"))["duration"] == 2.0
        assert "bad.wav" in err

    def test_all_are(self, craton, tmp_path):
        for name in ("a.wav", "b.wav"):
            (tmp_path / name).write_text("not sound")
        status, out, err = craton("transcribe", tmp_path / "a.wav", tmp_path / "b.wav", "--out", tmp_path / "new")
        assert (status, out) == (2, "")
        assert "none of the 2 files" in err
        assert "a.wav" in err
        assert "b.wav" in err
        assert not (tmp_path / "new").exists()
        status, out, _ = craton("transcribe", tmp_path / "a.wav", tmp_path / "b.wav", "--json")
        assert (status, json.loads(out)["error"]["code"]) == (2, "bad_file")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["none.wav"], "no such sound file"),
        (["a.wav", "b.wav", "--format", "srt"], "--out"),
        (["x/a.wav", "y/a.wav", "--out", "o"], "two files would be written"),
        (["a.wav", "--beam", "0"], "beam"),
        (["a.wav", "--format", "pdf"], "pdf"),
    ],
)
def test_wrong_use(craton, arguments, word):
    status, out, err = craton("transcribe", *arguments)
    assert status in (1, 2)
    assert word in err + out


def test_nothing_to_transcribe(craton, monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    status, _, err = craton("transcribe")
    assert status == 2
    assert "nothing to transcribe" in err


def test_a_model_that_hears_nothing(craton, speech, minilm_folder):
    status, _, err = craton("transcribe", speech, "-m", minilm_folder)
    assert status == 2
    assert "hears nothing" in err


class TestLive:
    @pytest.mark.usefixtures("whisper_folder")
    def test_a_pipe(self, craton, speech, monkeypatch):
        from craton.modalities.audio import read_audio

        raw = (np.concatenate((read_audio(speech), np.zeros(16_000))) * 32767).astype("<i2").tobytes()
        for flags in ((), ("--json",)):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
            status, out, _ = craton("transcribe", "--live", *flags)
            assert status == 0
            said = out if not flags else " ".join(json.loads(line)["text"] for line in out.splitlines())
            assert "temporary greeting" in " ".join(said.split())

    @pytest.mark.parametrize("flags", [("a.wav",), ("--format", "srt"), ("--out", "folder")])
    def test_wrong_use(self, craton, flags):
        status, _, err = craton("transcribe", "--live", *flags)
        assert status == 2
        assert "standard input" in err
