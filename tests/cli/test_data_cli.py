"""`craton data inspect` as a user meets it, and tokens as they stand on a terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from craton.cli import data as data_verbs
from craton.cli import main
from craton.cli.token_view import HEAD, TAIL, paint, visible
from craton.data.inspection import Token

CHATS = [
    {"messages": [{"role": "user", "content": "Say «hi»."}, {"role": "assistant", "content": "hi\nthere"}]},
    {"messages": [{"role": "user", "content": "پایتخت؟"}, {"role": "assistant", "content": "تهران"}]},
]


@pytest.fixture
def craton(monkeypatch, capsys):
    """craton(*arguments) -> (exit status, standard output, standard error), in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write_file(name: str, *rows: object) -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write_file


# --- the verb ------------------------------------------------------------------------------------------------------


def test_learnt_tokens_are_marked_where_there_is_no_colour(craton, write, smollm2_gguf) -> None:
    path = write("chats.jsonl", *CHATS)
    status, out, _ = craton("data", "inspect", path, "-m", str(smollm2_gguf))
    assert status == 0
    assert f"{path}:1" in out
    assert "⟦hi¦⏎\n¦there¦<|im_end|>⟧⏎" in out
    assert "Say·«hi».<|im_end|>" in out.replace("¦", "")
    for fact in ("schema", "messages", "2 from 1 file", "duplicates", "Arabic", "8,192", "the model's context"):
        assert fact in out
    assert "\x1b" not in out


def test_learnt_tokens_are_bold_and_green_on_a_terminal(craton, write, smollm2_gguf, monkeypatch) -> None:
    for no_colour, marked in ((False, False), (True, True)):
        screen = io.StringIO()
        terminal = Console(file=screen, force_terminal=True, color_system="standard", no_color=no_colour, width=200)
        monkeypatch.setattr(data_verbs, "stdout", terminal)
        craton("data", "inspect", write("chats.jsonl", CHATS[0]), "-m", str(smollm2_gguf))
        assert ("\x1b[1;32mthere\x1b[0m" in screen.getvalue()) is not marked
        assert ("\x1b[2mSay\x1b[0m" in screen.getvalue()) is not marked or no_colour
        assert ("⟦" in screen.getvalue()) is marked


def test_problems_end_with_1_and_name_their_lines(craton, write, smollm2_gguf) -> None:
    path = write("a.jsonl", *CHATS, {"messages": CHATS[0]["messages"][:1]}, {"messages": [{"role": "usr"}]})
    status, out, err = craton("data", "inspect", path, "-m", str(smollm2_gguf))
    assert status == 1
    assert f"{path}:3: no token is trained (a conversation needs a turn of the assistant)" in err
    assert f"{path}:4, messages[0].role: unknown role 'usr' (did you mean 'user'?)" in err
    assert "problems" in out
    status, out, _ = craton("data", "inspect", path, "-m", str(smollm2_gguf), "--json")
    document = json.loads(out)
    assert status == 1
    assert document["problem_count"] == 2
    assert [problem["where"].split(",")[0] for problem in document["problems"]] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian.jsonl"], "did you mean 'train.jsonl'"),
        (["bad.jsonl"], "bad.jsonl:2"),
        (["mixed.jsonl"], "are mixed"),
        (["train.jsonl", "--task", "classify"], "the task takes records of the schema 'labelled'"),
        (["train.jsonl", "--task", "clasify"], "classify"),
        (["train.jsonl", "--text-key", "mesages"], "did you mean 'messages'"),
        (["train.jsonl", "--max-tokens", "1"], "max_tokens"),
        ([], "no data"),
    ],
)
def test_what_cannot_be_read_ends_with_2(craton, write, monkeypatch, arguments: list[str], hint: str) -> None:
    path = write("train.jsonl", CHATS[0])
    write("mixed.jsonl", CHATS[0], {"text": "a"})
    folder = Path(path).parent
    (folder / "bad.jsonl").write_bytes(Path(path).read_bytes() + b"\xff\n")
    monkeypatch.chdir(folder)
    status, out, err = craton("data", "inspect", *arguments)
    assert status == 2
    assert hint in out + err
    assert "Traceback" not in err


def test_without_a_model_records_are_shown_as_they_are(craton, write) -> None:
    status, out, _ = craton("data", "inspect", write("a.jsonl", {"text": "one two\n\x1b[31m\u202ethree", "label": "x"}))
    assert status == 0
    assert "text: one two\n\\x1b[31m\\u202ethree" in out
    assert "1: x 1" in out


def test_a_table_with_keys_of_its_own(craton, shared_data, minilm_folder) -> None:
    source = str(shared_data / "banking77" / "test.csv")
    arguments = ["--label-key", "category", "--task", "classify", "-m", str(minilm_folder), "--json"]
    status, out, _ = craton("data", "inspect", source, *arguments)
    document = json.loads(out)
    assert status == 0
    assert (document["schema"], document["records"], document["tokens"]["trained"]) == ("labelled", 3080, 0)
    assert len(document["labels"]) == 77
    assert "category read as label" in document["decisions"]


def test_long_documents_are_counted(craton, shared_data, smollm2_gguf) -> None:
    source = str(shared_data / "parsinlu" / "text_fa.txt")
    arguments = ["--lines", "--max-tokens", "512", "--overlong", "split", "-m", str(smollm2_gguf), "--json", "-n", "0"]
    tokens = json.loads(craton("data", "inspect", source, *arguments)[1])["tokens"]
    assert tokens["overlong"] == tokens["split"] > 0
    # Every token but the first of each document is learnt, wherever it was split.
    assert tokens["trained"] == tokens["total"] - 6236


@pytest.mark.parametrize("arguments", [["--help"], ["PATH"]])
def test_without_a_model_torch_is_not_imported(write, arguments: list[str]) -> None:
    given = [write("a.jsonl", CHATS[0]) if argument == "PATH" else argument for argument in arguments]
    program = (
        "import sys\nfrom craton.cli.data import data\n"
        f"try:\n    data(['inspect', *{given!r}])\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the view ------------------------------------------------------------------------------------------------------


def shown(*tokens: tuple[str, bool], colour: bool = False) -> str:
    return paint([Token(text, trained, text.startswith("<|")) for text, trained in tokens], colour).plain


def test_borders_and_white_space_are_visible() -> None:
    assert shown(("a b", False), ("\n", False), ("\tc", True), ("", True), ("é", True)) == "a·b¦⏎\n⟦→c¦▫¦é⟧"
    assert shown(("a", False), ("b", True), colour=True) == "a¦b"
    assert shown(("می\u200cشود", True), ("\u200c", True)) == "⟦\u2068می\u200cشود\u2069¦\\u200c⟧"


def test_right_to_left_tokens_cannot_move_their_neighbours() -> None:
    assert shown((" سلام", True), ("!", True), ("12", True)) == "⟦\u2068·سلام\u2069¦!¦12⟧"


@given(st.text())
def test_no_text_acts_on_the_terminal(text: str) -> None:
    for character in visible(text):
        assert unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in "\n\u200c\u200d"


def test_of_a_long_sequence_both_ends_are_shown() -> None:
    tokens = [(str(i), i % 2 == 0) for i in range(1000)]
    plain = shown(*tokens)
    assert plain.startswith("⟦0⟧1⟦2⟧3")
    assert plain.endswith("⟦998⟧999")
    hidden = 1000 - HEAD - TAIL
    assert f"… {hidden} tokens, {hidden // 2} of them trained …" in plain
