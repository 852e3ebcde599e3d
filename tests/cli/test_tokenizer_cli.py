"""`craton tokenizer` as a user meets it: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import BY_ARCHITECTURE
from craton.checkpoints.save import save_checkpoint
from craton.cli import main
from craton.modalities.text import Tokenizer
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

ENGLISH = "The quick brown fox jumps over the lazy dog; it doesn't run any more than 1234 times.\n" * 20
PERSIAN = "زبان فارسی از راست به چپ نوشته می‌شود و کتاب‌های بسیاری به این زبان نوشته شده است.\n" * 20

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def craton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """craton(*arguments) -> (exit status, standard output, standard error), in this process, 100 columns wide."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["craton", "tokenizer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        status = 0
        try:
            main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def persian(tmp_path: Path) -> Path:
    path = tmp_path / "fa.txt"
    path.write_text(PERSIAN, encoding="utf-8")
    return path


@pytest.fixture
def english(tmp_path: Path) -> Path:
    path = tmp_path / "en.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    return path


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """A random Llama with a byte-level BPE of English, its head tied."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([ENGLISH], TokenizerSettings(vocab=300))
    norm = NormConfig(kind="rms")
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=24, activation="silu", gated=True),
        norm=norm,
    )
    trunk = TrunkConfig(width=16, layers=(layer,), final_norm=norm)
    model = CausalLM(CausalLMConfig(vocab=300, context=512, tied=True, trunk=trunk))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return save_checkpoint(model, BY_ARCHITECTURE["LlamaForCausalLM"], tmp_path / "model", tokenizer=tokenizer)


# --- train --------------------------------------------------------------------------------------------------------


def test_train_says_what_was_read_learnt_and_written(craton: Run, persian: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "fa"
    status, text, _ = craton("train", persian, "--vocab", "300", "--out", out)
    assert status == 0
    for words in ("1 document", "3 kB", "300 tokens", "7 special", "256 bytes", "37 pieces", "نوشته", "3 files"):
        assert words in text
    assert f"craton tokenizer fertility FILE --with smollm2-135m-instruct {out}\n" in text
    assert "asked" not in text
    assert Tokenizer.from_folder(out).vocab_size == 300
    assert [path.name for path in out.parent.iterdir()] == ["fa"]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_train_gives_json_and_the_same_files_again(craton: Run, persian: Path, tmp_path: Path, kind: str) -> None:
    arguments = ["train", persian, "--kind", kind, "--vocab", "290", "--reserve", "2", "--json", "--out"]
    status, text, _ = craton(*arguments, tmp_path / "a")
    facts = json.loads(text)
    assert status == 0
    assert facts.pop("seconds") >= 0
    assert facts == {
        "folder": str(tmp_path / "a"),
        "kind": kind,
        "vocab": 290,
        "asked": 290,
        "special": 9,
        "documents": 1,
        "bytes": len(PERSIAN.encode()),
    }
    assert craton(*arguments, tmp_path / "b")[0] == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_train_says_when_the_corpus_is_too_small(craton: Run, persian: Path, tmp_path: Path) -> None:
    status, text, _ = craton("train", persian, "--vocab", "32k", "--out", tmp_path / "x")
    assert status == 0
    assert "32,000 were asked for; the corpus is too small for more" in text


def test_train_reads_records_and_folders(craton: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    chat = {"messages": [{"role": "user", "content": "qqq qqq"}, {"role": "assistant", "content": "zzz zzz"}]}
    rows = [{"text": "text text", "id": "hidden hidden"}, chat, {"prompt": "ppp ppp", "completion": "ccc ccc"}]
    (corpus / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (corpus / "b.txt").write_text("one one\ntwo two\n")
    status, text, _ = craton("train", corpus, "--vocab", "1k", "--out", tmp_path / "x", "--json")
    assert (status, json.loads(text)["documents"]) == (0, 4)
    learnt = Tokenizer.from_folder(tmp_path / "x")
    for word in ("qqq", "zzz", "ppp", "ccc", "one", "text"):
        assert len(learnt.encode(word)) < len(word)
    assert len(learnt.encode("hidden")) == 6  # a record with a text is its text
    assert len(learnt.encode("assistant")) == 9  # roles are no text
    status, text, _ = craton("train", corpus / "b.txt", "--lines", "--out", tmp_path / "y", "--json")
    assert json.loads(text)["documents"] == 2


@pytest.mark.parametrize(
    ("written", "number"), [("300", 300), ("0.3k", 300), ("1,000", 1000), ("1K", 1000), ("0.001m", 1000)]
)
def test_sizes_in_words(craton: Run, persian: Path, tmp_path: Path, written: str, number: int) -> None:
    out = craton("train", persian, "--vocab", written, "--out", tmp_path / "x", "--json")[1]
    assert json.loads(out)["asked"] == number


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--vocab", "many"], "32k"),
        (["--vocab", "0"], "32k"),
        (["--vocab", "1.5"], "32k"),
        (["--vocab", "100"], "too few for 7 special"),
        (["--vocab", "1000m"], "vocab"),
        (["--reserve", "-1"], "reserve"),
        (["--kind", "wordpiece"], "unigram"),
        (["--vocab", "264", "--kind", "unigram"], "different characters"),
    ],
)
def test_train_refuses_and_leaves_nothing(
    craton: Run, persian: Path, tmp_path: Path, flags: list[str], words: str
) -> None:
    status, text, err = craton("train", persian, "--out", tmp_path / "x", *flags)
    assert status == 2
    assert words in text + err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fa.txt"]


def test_train_needs_text(craton: Run, tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    for corpus, words in (
        ([], "no corpus"),
        ([tmp_path / "blank.jsonl"], "no text"),
        ([tmp_path / "blnk.jsonl"], "blank"),
    ):
        status, _, err = craton("train", *corpus, "--out", tmp_path / "x")
        assert status == 2
        assert words in err
    assert not (tmp_path / "x").exists()


def test_what_is_there_is_never_overwritten(craton: Run, persian: Path, small_model: Path) -> None:
    before = {path: path.read_bytes() for path in small_model.iterdir()}
    for arguments in (["train", persian], ["extend", small_model, persian]):
        status, _, err = craton(*arguments, "--out", small_model)
        assert status == 2
        assert "exists already" in err
    assert {path: path.read_bytes() for path in small_model.iterdir()} == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX")
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "craton.cli", "tokenizer", "train", str(pipe), "--out", str(tmp_path / "x")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with pipe.open("wb", buffering=0) as writer:  # which waits until the other end is read
        process.send_signal(signal.SIGINT)
        # A signal between two instructions does not wake the read that follows: a line does.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        with contextlib.suppress(BrokenPipeError):
            writer.write(b"one line\n")
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "nothing was written" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe.txt"]


# --- fertility ----------------------------------------------------------------------------------------------------


def test_fertility_of_each_file_beside_each_tokeniser(
    craton: Run, persian: Path, english: Path, small_model: Path, tmp_path: Path
) -> None:
    craton("train", persian, "--vocab", "400", "--out", tmp_path / "own")
    arguments = ["fertility", persian, english, "--with", small_model, tmp_path / "own"]
    status, text, _ = craton(*arguments)
    assert status == 0
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("tokens/word") == 3  # twice above figures, once where it is explained
    files = json.loads(craton(*arguments, "--json")[1])["files"]
    assert [(file["documents"], file["bytes"]) for file in files] == [
        (1, len(PERSIAN.encode())),
        (1, len(ENGLISH.encode())),
    ]
    assert [file["words"] for file in files] == [17 * 20, 18 * 20]
    costs = {(i, row["tokenizer"]): row for i, file in enumerate(files) for row in file["tokenizers"]}
    model, own = str(small_model), str(tmp_path / "own")
    assert costs[0, own]["tokens_per_word"] < costs[0, model]["tokens_per_word"] / 2
    assert costs[1, model]["tokens_per_word"] < costs[1, own]["tokens_per_word"] / 2
    row = costs[0, own]
    assert row["tokens"] == len(Tokenizer.from_folder(tmp_path / "own").encode(PERSIAN))
    assert row["tokens_per_byte"] * row["bytes_per_token"] == pytest.approx(1)
    assert (row["exact"], row["altered_documents"]) == (True, 0)
    assert f"{row['tokens']:,}" in text
    assert f"{row['tokens_per_word']:.2f}" in text


def test_fertility_beside_models_of_the_store(
    craton: Run, english: Path, smollm2_gguf: Path, minilm_folder: Path
) -> None:
    both = json.loads(craton("fertility", english, "-w", smollm2_gguf, minilm_folder, "--json")[1])["files"][0]
    exact = {row["tokenizer"]: row["exact"] for row in both["tokenizers"]}
    assert exact == {str(smollm2_gguf): True, str(minilm_folder): False}
    assert "1 altered" in craton("fertility", english, "-w", minilm_folder)[1]
    default = json.loads(craton("fertility", english, "--json")[1])["files"][0]["tokenizers"]
    assert [row["tokenizer"] for row in default] == ["smollm2-135m-instruct"]
    assert default[0]["tokens"] == both["tokenizers"][0]["tokens"]


def test_fertility_needs_no_torch(persian: Path, small_model: Path) -> None:
    program = (
        "import sys\nfrom craton.cli import main\n"
        f"sys.argv = ['craton', 'tokenizer', 'fertility', {str(persian)!r}, '--with', {str(small_model)!r}]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_fertility_refuses(craton: Run, persian: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (["fertility"], "no text to measure"),
        (["fertility", persian, "--with", "smolm2-135m-instruct"], "smollm2-135m-instruct"),
        (["fertility", tmp_path / "fb.txt", "--with", tmp_path], "tokenizer.json"),
    ):
        status, _, err = craton(*arguments)
        assert status == 2
        assert words in err


def test_text_on_a_terminal_cannot_act_on_it(craton: Run, tmp_path: Path) -> None:
    (tmp_path / "evil.txt").write_text("\x1b[31mred[/] [bold]word word\n" * 9)
    status, text, _ = craton("train", tmp_path / "evil.txt", "--out", tmp_path / "x")
    assert status == 0
    assert "\x1b" not in text


# --- extend -------------------------------------------------------------------------------------------------------


def test_extend_says_what_became_of_tokeniser_and_model(
    craton: Run, persian: Path, small_model: Path, tmp_path: Path
) -> None:
    status, text, _ = craton("extend", small_model, persian, "--add", "60", "--out", tmp_path / "x")
    assert status == 0
    for words in ("1 document", "60 pieces on top of 300 tokens", "for each word of it", "float32", "5 files"):
        assert words in text
    assert "train it on the new language" in text
    facts = json.loads(craton("extend", small_model, persian, "--add", "9k", "--out", tmp_path / "y", "--json")[1])
    assert facts["asked"] == 9000
    assert 60 < facts["added"] < 9000
    assert facts["vocab"] == 300 + facts["added"]
    assert facts["tokens_per_word"]["new"] < facts["tokens_per_word"]["old"] / 3
    assert facts["tokens_per_word"]["bytes"] == facts["bytes"] == len(PERSIAN.encode())


def test_an_extended_model_reads_old_texts_as_before(
    craton: Run, persian: Path, small_model: Path, tmp_path: Path
) -> None:
    craton("extend", small_model, persian, "--add", "60", "--out", tmp_path / "x")
    before, after = Checkpoint.open(small_model), Checkpoint.open(tmp_path / "x")
    assert (after.config.vocab, after.hf["vocab_size"], after.hf["tie_word_embeddings"]) == (360, 360, True)
    assert after.hf["eos_token_id"] == before.hf["eos_token_id"] == [0, 2]
    ids = before.tokenizer().encode(ENGLISH)[:200]
    assert after.tokenizer().encode(ENGLISH)[:200] == ids
    assert after.tokenizer().chat_template == before.tokenizer().chat_template
    logits = [
        c.load(torch.float32)(torch.tensor(ids), torch.arange(len(ids)))  # type: ignore[arg-type]
        for c in (before, after)
    ]
    torch.testing.assert_close(logits[1][:, :300], logits[0])


@pytest.mark.peer
def test_transformers_opens_an_extended_model(craton: Run, persian: Path, small_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    craton("extend", small_model, persian, "--add", "60", "--out", tmp_path / "x")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "x").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "x")
    checkpoint = Checkpoint.open(tmp_path / "x")
    ids = checkpoint.tokenizer().encode(PERSIAN[:300])
    assert tokenizer(PERSIAN[:300])["input_ids"] == ids
    assert max(ids) >= 300
    model: Any = checkpoint.load(torch.float32)
    with torch.inference_mode():
        ours = model(torch.tensor(ids), torch.arange(len(ids)))
        torch.testing.assert_close(theirs(torch.tensor([ids])).logits[0], ours, rtol=1e-4, atol=1e-4)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight


def test_extend_refuses_what_it_cannot_and_leaves_nothing(
    craton: Run, persian: Path, small_model: Path, minilm_folder: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    for arguments, words in (
        ([minilm_folder, persian], "byte-level BPE"),
        ([small_model], "no corpus"),
        ([small_model, persian, "--add", "some"], "--add"),
        ([small_model, tmp_path / "fb.txt"], "fa.txt"),
        (["nomodel", persian], "nomodel"),
    ):
        status, _, err = craton("extend", *arguments, "--out", tmp_path / "x")
        assert status == 2
        assert words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.slow
def test_smollm2_extended_by_persian_still_answers(
    craton: Run, smollm2_gguf: Path, shared_data: Path, tmp_path: Path
) -> None:
    from craton.inference.model import load

    corpus = shared_data / "parsinlu" / "text_fa.txt"
    facts = json.loads(craton("extend", smollm2_gguf, corpus, "--add", "2k", "--out", tmp_path / "fa", "--json")[1])
    assert facts["tokens_per_word"]["new"] < facts["tokens_per_word"]["old"] / 2
    assert facts["tokens_per_word"]["bytes"] > 1_000_000
    answers = [
        load(str(path), dtype="float32").generate("The capital of France is", max_tokens=8).text
        for path in (smollm2_gguf, tmp_path / "fa")
    ]
    assert answers[0] == answers[1]
