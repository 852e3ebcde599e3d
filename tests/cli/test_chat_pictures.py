"""`craton chat --image`: pictures in a conversation, as a user meets them."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from tests.inference.test_pictures import write_seeing

import craton as library
from craton.cli import main
from craton.modalities.image import encode_png

FILES = ("one.png", "two.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_seeing(tmp_path_factory.mktemp("models") / "smolvlm")
    for seed, name in enumerate(FILES):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        (folder.parent / name).write_bytes(encode_png(pixels))
    (folder.parent / "text.png").write_text("no picture")
    return folder


@pytest.fixture
def craton(monkeypatch, capsys, folder):
    monkeypatch.chdir(folder.parent)

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


def expected(folder, *files, text="What is this?", **fields) -> str:
    shown = [{"type": "image", "image": str(folder.parent / file)} for file in files]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]
    return library.load(folder, threads=1).chat(messages, max_tokens=8, **fields).text


def test_one_question_about_two_pictures(craton, folder):
    chosen = ("--image", FILES[0], "--image", FILES[1], "--max-tokens", "8", "--temperature", "0", "--threads", "1")
    status, out, err = craton("chat", str(folder), *chosen, "What is this?")
    assert (status, out) == (0, expected(folder, *FILES) + "\n")
    assert "prompt" in err


def test_pictures_go_with_the_next_message_and_are_saved_as_files(craton, folder, tmp_path):
    script = f"/image {FILES[0]}\n/image missing.png\nWhat is this?\n/save {tmp_path / 'said.json'}\n/reset\n"
    status, out, err = craton(
        "chat", str(folder), "--max-tokens", "8", "--temperature", "0", "--threads", "1", stdin=script
    )
    assert status == 0
    assert out.startswith(expected(folder, FILES[0]) + "\n")
    assert "1 picture goes" in err
    assert "missing.png" in err
    saved = json.loads((tmp_path / "said.json").read_text())["messages"]
    assert saved[0]["content"][0] == {"type": "image", "image": FILES[0]}


@pytest.mark.parametrize(("file", "said"), [("missing.png", "missing.png"), ("text.png", "not a picture")])
def test_a_file_that_is_no_picture_is_named(craton, folder, file, said):
    status, out, err = craton("chat", str(folder), "--image", file, "What?")
    assert status != 0
    assert out == ""
    assert said in err


def test_a_model_that_does_not_see_says_so(craton, tiny_model):
    status, _, err = craton("chat", str(tiny_model), "--image", FILES[0], "What?")
    assert status == 2
    assert "does not see" in err
