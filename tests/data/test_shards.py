"""Shards hold what went in, windows learn within documents only, and damage is noticed."""

from __future__ import annotations

import errno
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from craton.checkpoints import disk
from craton.data import documents as documents_module
from craton.data.batch import collate
from craton.data.documents import Document, DocumentEncoder, clean, digest
from craton.data.example import UNTRAINED
from craton.data.loader import Loader
from craton.data.records import Record
from craton.data.rendering import render_record
from craton.data.shard_building import Collector, new_folder, shards_from_documents
from craton.data.shard_files import Shard, token_type
from craton.data.shards import Shards, WindowSource, open_shards
from craton.errors import DataError, FileFormatError, StoreError, UsageError
from craton.modalities.text import Tokenizer

TEXTS = ["The quick fox.", "زبان فارسی می‌شود", "a", "The lazy dog jumps over 12:30 🦊", "fox\n\nfox"]


@pytest.fixture(scope="module")
def lower_wordpiece() -> Tokenizer:
    """As BERT's: case and spaces are lost, [CLS] and [SEP] stand around each text."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend, special_tokens={"unk_token": "[UNK]"})


def collected(tokenizer: Tokenizer, texts: list[str], shard_tokens: int) -> Shards:
    """The texts in memory, in shards of about so many tokens."""
    reference = shards_from_documents(texts, tokenizer)
    collector = Collector[Shard](lambda shard: shard, tokenizer, 0.0, shard_tokens)
    collector.begin("texts")
    for document in DocumentEncoder(tokenizer).encode(texts):
        collector.add(document, b"\xff" * 16)
    collector.finish()
    return Shards(collector.parts[0].shards, reference.tokenizer, reference.token_bytes)


# From text to the tokens of a document


def test_a_document_is_what_rendering_makes_of_its_text(bytes_bpe: Tokenizer, lower_wordpiece: Tokenizer) -> None:
    for tokenizer in (bytes_bpe, lower_wordpiece):
        for text, document in zip(TEXTS, DocumentEncoder(tokenizer).encode(TEXTS), strict=True):
            [sequence] = render_record(Record({"text": text}, "a.txt:1"), tokenizer, "text").sequences
            assert document.ids.tolist() == sequence.ids.tolist()
            assert document.text_bytes == len(text.encode())


def test_special_tokens_in_a_text_are_text(bytes_bpe: Tokenizer) -> None:
    [document] = DocumentEncoder(bytes_bpe).encode(["say <|end|> twice <|end|>"])
    end = bytes_bpe.eos_ids[0]
    assert document.ids.tolist().count(end) == 1
    assert document.ids[-1] == end
    assert bytes_bpe.decode(document.ids[:-1].tolist()) == "say <|end|> twice <|end|>"
    assert bytes_bpe.encode("<|end|>") == [end], "the tokeniser itself is left as it was"


def test_a_long_text_is_encoded_in_pieces_of_lines_and_words(
    bytes_bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick fox jumps.\n" * 30 + "lazy dog " * 30 + "x" * 300
    [whole] = DocumentEncoder(bytes_bpe).encode([text])
    monkeypatch.setattr(documents_module, "PIECE_CHARACTERS", 100)
    [pieces] = DocumentEncoder(bytes_bpe).encode([text])
    assert bytes_bpe.decode(pieces.ids.tolist()) == text
    assert len(pieces.ids) <= len(whole.ids) + 3  # in a run of letters alone a cut may part a token


def test_a_tokeniser_without_an_end_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    with pytest.raises(UsageError, match="no token that ends a document"):
        DocumentEncoder(Tokenizer(backend))


def test_cleaning_keeps_the_text() -> None:
    assert clean("\ufeff\r\n a\r\nb\rc\x00\x1b\td\x0c\ud800e می‌شود\n\n") == " a\nb\nc\td\x0ce می‌شود"
    assert digest("a  b\n") == digest("a b") != digest("ab")
    assert digest("e\u0301") == digest("é")


# The stream


@settings(deadline=None, max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 20))
def test_windows_hold_the_stream_and_learn_within_documents(
    bytes_bpe: Tokenizer, texts: list[str], shard_tokens: int, context: int
) -> None:
    texts = [text for text in map(clean, texts) if text] or ["a"]
    own = [document.ids.tolist() for document in DocumentEncoder(bytes_bpe).encode(texts)]
    # What every position shall predict, written down document by document.
    flat = [token for ids in own for token in ids]
    expected = [target for ids in own for target in [*ids[1:], UNTRAINED]]
    shards = collected(bytes_bpe, texts, shard_tokens)
    assert (shards.tokens, shards.documents, shards.bytes) == (len(flat), len(own), sum(len(t.encode()) for t in texts))
    assert shards.ids(0, len(flat)).tolist() == flat
    if len(flat) <= context:
        with pytest.raises(UsageError, match="no window"):
            WindowSource(shards, context)
        return
    windows = WindowSource(shards, context)
    assert len(windows) == (len(flat) - 1) // context
    read, learnt = [], []
    for i in range(len(windows)):
        example = windows[i]
        assert example.tokens == context == windows.lengths[i]
        assert all(len(sequence) for sequence in example.sequences)
        read += [int(token) for sequence in example.sequences for token in sequence.ids]
        learnt += [int(target) for sequence in example.sequences for target in sequence.targets]
        # A sequence ends with its document, or with the window.
        ends = np.cumsum([len(sequence) for sequence in example.sequences])[:-1] + i * context
        assert all(int(end) in np.cumsum([len(ids) for ids in own]) for end in ends)
    assert read == flat[: len(read)]
    assert learnt == expected[: len(learnt)]


def test_bytes_of_targets_are_those_of_the_text(bytes_bpe: Tokenizer) -> None:
    shards = collected(bytes_bpe, TEXTS, 20)
    windows = WindowSource(shards, 1)
    total = sum(windows.trained_bytes(i) for i in range(len(windows)))
    firsts = sum(len(bytes_bpe.token_bytes(int(d.ids[0]))) for d in DocumentEncoder(bytes_bpe).encode(TEXTS))
    assert total == shards.bytes - firsts  # the first token of a document is nobody's target
    for context in (3, 7):
        parts = WindowSource(shards, context)
        whole = sum(windows.trained_bytes(i) for i in range(len(parts) * context))
        assert sum(parts.trained_bytes(i) for i in range(len(parts))) == pytest.approx(whole)


def test_bytes_are_right_in_sum_where_the_tokeniser_drops_some(lower_wordpiece: Tokenizer) -> None:
    shards = shards_from_documents(TEXTS[:1] * 3, lower_wordpiece)
    per_token = shards.text_bytes(0, shards.tokens)
    assert per_token.sum() == pytest.approx(shards.bytes)
    assert per_token[0] == 0  # [CLS]
    windows = WindowSource(shards, shards.tokens - 1)
    assert windows.trained_bytes(0) == pytest.approx(shards.bytes)  # the first token of each document is [CLS]


def test_what_is_only_read_is_no_target(bytes_bpe: Tokenizer) -> None:
    collector = Collector[Shard](lambda shard: shard, bytes_bpe, 0.0)
    collector.begin("mixed")
    collector.add(Document(np.array([5, 6, 7, 0], np.int32), 3, np.array([False, False, True, True])), b"\xff" * 16)
    collector.add(Document(np.array([8, 9, 0], np.int32), 2), b"\xff" * 16)
    collector.finish()
    made = shards_from_documents(["a"], bytes_bpe)
    shards = Shards(collector.parts[0].shards, made.tokenizer, made.token_bytes)
    [first, second] = WindowSource(shards, 6)[0].sequences
    assert first.targets.tolist() == [UNTRAINED, 7, 0, UNTRAINED]
    assert second.targets.tolist() == [9, 0]


def test_windows_go_through_the_loader_as_rows(bytes_bpe: Tokenizer) -> None:
    shards = shards_from_documents(TEXTS * 10, bytes_bpe)
    loader = Loader(WindowSource(shards, 16), batch=8, micro_tokens=64, seed=0)
    for micro in loader.step(0):
        assert micro.row == 16
        assert micro.tokens == 64
        assert micro.positions_T[0] == 0


def test_the_type_of_ids() -> None:
    assert (token_type(65535), token_type(65536)) == ("uint16", "uint32")


# Held-out documents


def test_held_out_documents_depend_on_their_text_alone(bytes_bpe: Tokenizer) -> None:
    texts = [f"document {i}" for i in range(400)]

    def held_out(order: list[str]) -> set[str]:
        shards = shards_from_documents(order, bytes_bpe, holdout=0.1)
        assert shards.heldout is not None
        assert shards.documents + shards.heldout.documents == len(order)
        assert shards.bytes + shards.heldout.bytes == sum(map(len, order))
        starts = [*shards.heldout.starts(0, shards.heldout.tokens), shards.heldout.tokens]
        pieces = [shards.heldout.ids(int(a), int(b) - 1).tolist() for a, b in itertools.pairwise(starts)]
        return {bytes_bpe.decode(piece) for piece in pieces}

    first = held_out(texts)
    assert 20 < len(first) < 60
    assert held_out(texts[::-1]) == first
    assert held_out([*texts[100:], "another"]) - {"another"} == {text for text in first if text in texts[100:]}


def test_of_few_documents_the_end_of_the_longest_is_held_out(bytes_bpe: Tokenizer) -> None:
    text = "The quick fox jumps over the lazy dog. " * 50
    shards = shards_from_documents(["one", text, "two"], bytes_bpe, holdout=0.1)
    assert shards.heldout is not None
    share = shards.heldout.tokens / (shards.tokens + shards.heldout.tokens)
    assert share == pytest.approx(0.1, abs=0.01)
    cleaned = clean(text)
    assert shards.bytes + shards.heldout.bytes == len(cleaned) + 6
    end = bytes_bpe.decode(shards.heldout.ids(0, shards.heldout.tokens).tolist())
    assert cleaned.endswith(end)
    assert shards.heldout.bytes == len(end)


# Folders


def test_a_folder_holds_what_memory_holds(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    in_memory = shards_from_documents(TEXTS, bytes_bpe, holdout=0.3)
    shards_from_documents(TEXTS, bytes_bpe, tmp_path / "shards", holdout=0.3)
    opened = open_shards(tmp_path / "shards", bytes_bpe, verify=True)
    assert in_memory.heldout is not None
    assert opened.heldout is not None
    for one, other in ((opened, in_memory), (opened.heldout, in_memory.heldout)):
        assert one.ids(0, one.tokens).tolist() == other.ids(0, other.tokens).tolist()
        assert one.starts(0, one.tokens).tolist() == other.starts(0, other.tokens).tolist()
        assert one.text_bytes(0, one.tokens).tolist() == other.text_bytes(0, other.tokens).tolist()
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "documents-00000.bin",
        "documents-00001.bin",
        "manifest.json",
        "token_bytes.bin",
        "tokens-00000.bin",
        "tokens-00001.bin",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["shards"], "nothing else is left"
    collate([WindowSource(opened, 8)[0]])


def test_another_tokeniser_is_refused_and_both_are_named(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    shards_from_documents(TEXTS, bytes_bpe, tmp_path / "s", name="models/mine")
    other = tokenizers.Tokenizer.from_str(bytes_bpe.backend.to_str())
    other.add_tokens(["new"])
    with pytest.raises(UsageError, match=r"models/mine \(\d+ tokens, \w+\), the model's has \d+ tokens") as caught:
        open_shards(tmp_path / "s", Tokenizer(other))
    assert "craton data prepare" in str(caught.value)


def change_manifest(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "manifest.json"
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return apply


def flip_a_byte(folder: Path) -> None:
    path = folder / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no folder of shards"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff"), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "no JSON"),
        (lambda folder: (folder / "manifest.json").write_text('{"parts": []}'), "not the manifest"),
        (change_manifest(lambda m: m.update(version=2)), "format version 2"),
        (change_manifest(lambda m: m.update(parts=[])), "parts"),
        (change_manifest(lambda m: m["parts"][0].update(tokens=1)), "counts"),
        (change_manifest(lambda m: m["parts"][0]["shards"][0].update(tokens=9)), "counts make"),
        (change_manifest(lambda m: m["parts"][0]["shards"][0]["files"].pop(0)), "no tokens file"),
        (change_manifest(lambda m: m["parts"][0]["shards"][0]["files"][0].update(name="../x.bin")), "name"),
        (change_manifest(lambda m: m["parts"][0]["shards"][0]["files"][0].update(name="x-00000.bin")), "no shard has"),
        (lambda folder: (folder / "documents-00000.bin").unlink(), "missing"),
        (lambda folder: (folder / "tokens-00000.bin").write_bytes(b"ab"), "2 bytes, but"),
        (flip_a_byte, "SHA-256"),
    ],
)
def test_damage_is_named(bytes_bpe: Tokenizer, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    shards_from_documents(TEXTS, bytes_bpe, tmp_path / "s")
    damage(tmp_path / "s")
    with pytest.raises(FileFormatError, match=message) as caught:
        open_shards(tmp_path / "s", verify=True)
    assert str(tmp_path / "s") in (caught.value.where or "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="no such folder"):
        open_shards(tmp_path / "nothing")


def test_no_text(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document is left"):
        shards_from_documents(["", "\n"], bytes_bpe, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(bytes_bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk.os, "fsync", full)
    with pytest.raises(StoreError, match="No space left") as caught:
        shards_from_documents(TEXTS, bytes_bpe, tmp_path / "s")
    assert "free some space" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_never_overwritten(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "s").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        shards_from_documents(TEXTS, bytes_bpe, tmp_path / "s")
    assert (tmp_path / "s").read_text() == "mine"


FILLER = """
import sys, time
from pathlib import Path
from craton.data.shard_building import new_folder
with new_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("filling", flush=True)
    sys.stdin.read()
    (folder / "whole").write_text("whole")
"""


def filler(folder: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", FILLER, str(folder)], stdin=-1, stdout=-1, stderr=-1)
    assert process.stdout is not None
    assert process.stdout.readline() == b"filling\n"
    return process


def test_a_killed_process_leaves_nothing_under_the_name_and_the_next_one_clears_up(tmp_path: Path) -> None:
    process = filler(tmp_path / "s")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "s").exists()
    assert list(tmp_path.glob(".s.*.part")), "what the killed process left"
    with new_folder(tmp_path / "s") as folder:
        assert list(folder.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_second_process_waits_and_then_leaves_the_first_ones_folder_alone(tmp_path: Path) -> None:
    process = filler(tmp_path / "s")
    waited = []

    def let_the_first_end() -> None:
        waited.append(True)
        assert process.stdin is not None
        process.stdin.close()

    with pytest.raises(UsageError, match="exists already"), new_folder(tmp_path / "s", let_the_first_end):
        raise AssertionError("the first has made the folder")
    process.wait(10)
    assert waited == [True]
    assert {path.name for path in (tmp_path / "s").iterdir()} == {"half", "whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
