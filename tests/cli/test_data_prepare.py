"""`craton data prepare` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from cyclopts import App
from tokenizers import models, pre_tokenizers

from craton.cli.data_prepare import prepare
from craton.data import prepare as prepare_module
from craton.data.shards import open_shards
from craton.errors import UnknownName, UsageError

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a tokeniser of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({"<|end|>": 256, **{c: i for i, c in enumerate(alphabet)}}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<|end|>"])
    folder = tmp_path / "model"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """run(*arguments) -> (standard output, standard error)."""
    app = App(result_action="return_value", suppress_keyboard_interrupt=False)
    app.command(prepare)

    def call(*arguments: object) -> tuple[str, str]:
        app(["prepare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return out, err

    return call


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "متن.jsonl"
    lines = [{"text": "سلام دنیا"}, {"text": "fox"}, {"text": "fox "}, {"text": "a b c d e f g h i"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_table_accounts_for_every_document(run: Run, texts: Path, model: Path, tmp_path: Path) -> None:
    against = tmp_path / "eval.jsonl"
    against.write_text('{"q": "A b c, d e f g h i!"}\n')
    out, _ = run(texts, "-t", model, "-o", tmp_path / "out", "--against", against, "--context", 5, "--holdout", 0)
    rows = [line.split() for line in out.splitlines()]
    assert ["duplicate", "−1", "−4", "B"] in rows
    assert ["in", "evaluation", "data", "−1", "−17", "B"] in rows
    assert ["to", "train", "2", "20", "B", "22"] in rows
    assert f"{texts}:3" in out
    assert f"{against}:1" in out
    assert "ends in <|end|>" in out
    assert "4 windows of 5 tokens" in out
    assert open_shards(tmp_path / "out").documents == 2


def test_json_is_one_document(run: Run, texts: Path, model: Path, tmp_path: Path) -> None:
    out, err = run(texts, "-t", model, "-o", tmp_path / "out", "--holdout", 0, "--context", 5, "--json")
    value = json.loads(out)
    assert err == ""
    assert value["read"] == {"documents": 4, "bytes": 41}
    assert value["removed"] == {"duplicate": {"documents": 1, "bytes": 4}}
    assert value["parts"] == [{"name": str(texts), "weight": 1.0, "tokens": 40, "documents": 3, "bytes": 37}]
    assert value["heldout"] is None
    assert value["windows"] == 7
    assert value["tokenizer"]["vocab_size"] == 257


def test_a_mixture_says_how_often_each_part_is_read(run: Run, texts: Path, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("fox " * 49 + "fox")
    out, _ = run(texts, other, "-t", model, "-o", tmp_path / "out", "--weights", "0.5,0.5", "--holdout", 0)
    assert "an epoch reads" in out
    assert "3.00 ×" in out  # 40 tokens of 240
    assert [part.weight for part in open_shards(tmp_path / "out").parts] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--weights", "a,b"], UsageError, "numbers with commas"),
        (["--weights", "1,2"], UsageError, "1 sources, but 2 weights"),
        (["--holdout", "0.9"], UsageError, "holdout"),
        (["--workers", "0"], UsageError, "workers"),
        (["--tokenizer", "no-such-model"], UnknownName, "no-such-model"),
    ],
)
def test_wrong_use(
    run: Run, texts: Path, model: Path, tmp_path: Path, flags: list[str], error: type[UsageError], message: str
) -> None:
    tokenizer = [] if "--tokenizer" in flags else ["-t", str(model)]
    with pytest.raises(error, match=message):
        run(texts, "-o", tmp_path / "out", *tokenizer, *flags)
    assert not (tmp_path / "out").exists()


def test_no_sources(run: Run, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sources"):
        run("-t", model, "-o", tmp_path / "out")


def test_stopped_by_the_user_it_says_that_nothing_was_written(
    run: Run,
    texts: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module._Run, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        run(texts, "-t", model, "-o", tmp_path / "out")
    assert "nothing was written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", texts.name]


def test_torch_is_not_imported_for_a_tokeniser_s_folder(texts: Path, model: Path, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\nfrom craton.cli.data_prepare import prepare\n"
        f"prepare({str(texts)!r}, tokenizer={str(model)!r}, out=Path({str(tmp_path / 'out')!r}))\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
