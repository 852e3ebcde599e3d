"""Preparation: what is read is written, removed with a reason, or refused with its line; never lost, never half."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from craton.data import prepare as prepare_module
from craton.data.documents import clean
from craton.data.example import UNTRAINED
from craton.data.mixture import Mixture, window_source
from craton.data.prepare import Preparation, PrepareSettings, prepare
from craton.data.records import read_records
from craton.data.shards import Shards, WindowSource, open_shards
from craton.data.words import words
from craton.errors import CratonError, DataError, FileFormatError, UsageError
from craton.modalities.text import Tokenizer

QUESTION = "How do I find my card that was sent to me by post two weeks ago?"


def write_jsonl(path: Path, *values: Any) -> str:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    return str(path)


def made(folder: Path, tokenizer: Tokenizer, *sources: str, **options: Any) -> Preparation:
    settings = PrepareSettings(sources=sources, **{"holdout": 0.0, **options})
    return prepare(settings, tokenizer, folder)


def texts_of(shards: Shards, tokenizer: Tokenizer) -> list[str]:
    borders = [*shards.starts(0, shards.tokens).tolist(), shards.tokens]
    pieces = (shards.ids(a, b) for a, b in itertools.pairwise(borders))
    return [tokenizer.decode(piece.tolist()) for piece in pieces]


def removed(folder: Path) -> list[tuple[str, str, str | None]]:
    lines = [json.loads(line) for line in (folder / "removed.jsonl").read_text().splitlines()]
    return [(line["origin"], line["reason"], line["like"]) for line in lines]


def sentences(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "زبان", "فارسی", "می‌شود", "نوشته"]
    return [" ".join(rng.choices(vocabulary, k=rng.randint(5, 60))) + f" {i}" for i in range(count)]


def test_everything_read_is_written_or_accounted_for(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    long = " ".join(f"w{i}" for i in range(80))
    source = write_jsonl(
        tmp_path / "a.jsonl",
        {"text": "سلام دنیا", "id": 1},
        {"text": " \r\n\0"},
        {"text": "سلام  دنیا\n"},
        {"text": long},
        {"text": f"Oh! {QUESTION}"},
        {"text": long.replace("w79", "w0")},
        {"text": "other\r\ntext"},
    )
    against = write_jsonl(tmp_path / "eval.jsonl", {"question": "unrelated"}, {"question": QUESTION})
    done = made(tmp_path / "out", bytes_bpe, source, dedup="minhash", against=(against,))
    assert texts_of(open_shards(tmp_path / "out", bytes_bpe), bytes_bpe) == ["سلام دنیا", long, "other\ntext"]
    assert removed(tmp_path / "out") == [
        (f"{source}:2", "empty", None),
        (f"{source}:3", "duplicate", f"{source}:1"),
        (f"{source}:5", "in evaluation data", f"{against}:2"),
        (f"{source}:6", "near-duplicate", f"{source}:4"),
    ]
    assert done.read.documents == 7
    assert {reason: count.documents for reason, count in done.removed.items()} == {
        "empty": 1,
        "duplicate": 1,
        "in evaluation data": 1,
        "near-duplicate": 1,
    }
    assert done.manifest is not None
    assert done.manifest.parts[0].documents == 3
    assert done.manifest.prepared["removed"]["duplicate"] == {"documents": 1, "bytes": len("سلام  دنیا\n".encode())}


def test_duplicates_stay_where_they_are_wanted(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", *[{"text": "same"}] * 3)
    made(tmp_path / "out", bytes_bpe, source, dedup="none")
    assert open_shards(tmp_path / "out").documents == 3


def test_workers_change_nothing(bytes_bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_RECORDS", 16)
    source = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in sentences(150) + sentences(20)))
    against = write_jsonl(tmp_path / "eval.jsonl", {"text": sentences(150)[7]})
    folders = []
    for workers in (1, 3):
        folders.append(tmp_path / f"out{workers}")
        options = {"workers": workers, "dedup": "minhash", "against": (against,), "holdout": 0.1}
        made(folders[-1], bytes_bpe, source, **options)
    one, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, other)]
    assert one == other
    for manifest in manifests:
        del manifest["created"]
    assert manifests[0] == manifests[1]


def test_mixtures_keep_their_parts_apart(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", *({"text": t} for t in sentences(30, n))) for n in range(2)]
    done = made(tmp_path / "out", bytes_bpe, *sources, weights=(3, 1), context=16)
    shards = open_shards(tmp_path / "out")
    assert [(part.shards.name, part.weight, part.shards.documents) for part in shards.parts] == [
        (sources[0], 3.0, 30),
        (sources[1], 1.0, 30),
    ]
    assert texts_of(shards.parts[1].shards, bytes_bpe) == sentences(30, 1)
    assert shards.tokens == sum(part.shards.tokens for part in shards.parts) == done.tokens
    mixture = window_source(shards, 16)
    assert isinstance(mixture, Mixture)
    assert mixture.shares[0].drawn == pytest.approx(0.75 * len(mixture), abs=1)


def test_chats_and_prompts_learn_their_answers(chat_bpe: Tokenizer, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    chats = write_jsonl(tmp_path / "chats.jsonl", {"messages": messages})
    prompts = write_jsonl(tmp_path / "prompts.jsonl", {"prompt": "fox: ", "completion": "dog"})
    texts = write_jsonl(tmp_path / "texts.jsonl", {"text": "plain"})
    made(tmp_path / "out", chat_bpe, chats, prompts, texts)
    shards = open_shards(tmp_path / "out", chat_bpe)
    learnt = shards.ids(0, shards.tokens)[shards.trained(0, shards.tokens)]
    assert chat_bpe.decode(learnt.tolist(), skip_special_tokens=False) == "A fox.<|end|>dog<|end|>lain<|end|>"
    windows = WindowSource(shards, 8)
    targets = np.concatenate([s.targets for i in range(len(windows)) for s in windows[i].sequences])
    assert 0 < np.count_nonzero(targets != UNTRAINED) < len(targets)


def test_a_label_beside_a_text_is_not_read(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,body\nfox,1,FOX\ndog,0,DOG\n")
    made(tmp_path / "out", bytes_bpe, str(tmp_path / "a.csv"))
    made(tmp_path / "bodies", bytes_bpe, str(tmp_path / "a.csv"), text_key="body")
    assert texts_of(open_shards(tmp_path / "out"), bytes_bpe) == ["fox", "dog"]
    assert texts_of(open_shards(tmp_path / "bodies"), bytes_bpe) == ["FOX", "DOG"]


def test_folders_and_lines(bytes_bpe: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.txt").write_text("three\n")
    (folder / "c.bin").write_bytes(b"\0\1")
    whole = made(tmp_path / "whole", bytes_bpe, str(folder))
    made(tmp_path / "lines", bytes_bpe, str(folder), lines=True)
    assert texts_of(open_shards(tmp_path / "whole"), bytes_bpe) == ["one\ntwo", "three"]
    assert texts_of(open_shards(tmp_path / "lines"), bytes_bpe) == ["one", "two", "three"]
    assert whole.skipped_files == {"binary": 1}


def test_progress_is_told(bytes_bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "CHUNK_RECORDS", 10)
    source = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in sentences(95)))
    seen: list[tuple[int, int]] = []
    settings = PrepareSettings(sources=(source,), holdout=0.0)
    done = prepare(
        settings, bytes_bpe, tmp_path / "out", report=lambda so_far: seen.append((so_far.read.documents, so_far.tokens))
    )
    assert len(seen) == 10
    assert seen == sorted(seen)
    assert seen[-1] == (95, done.tokens)
    assert done.total_bytes == (tmp_path / "a.jsonl").stat().st_size


@pytest.mark.parametrize(
    ("content", "options", "error", "message", "where"),
    [
        ('{"text": "a"}\n{"text": 3}\n', {}, DataError, "text must be text", "a.jsonl:2"),
        ('{"text": "a"}\n{"txt": "b"}\n', {}, DataError, "no schema", "a.jsonl:2"),
        ('{"text": "a"}\n{"text"\n', {}, FileFormatError, "JSON", "a.jsonl:2"),
        ('{"anchor": "a", "positive": "b"}\n', {}, DataError, "the task takes", "a.jsonl:1"),
        ("", {}, FileFormatError, "no records", "a.jsonl"),
        ('{"text": " "}\n', {}, DataError, "no document is left", "a.jsonl"),
        ('{"text": "a"}\n', {"context": 50}, DataError, "2 tokens are left", "a.jsonl"),
        ('{"text": "a"}\n', {"weights": (1, 2)}, UsageError, "1 sources, but 2 weights", None),
        ('{"text": "a"}\n', {"weights": (0,)}, UsageError, "positive numbers", None),
    ],
)
def test_bad_data_is_refused_with_its_place_and_nothing_is_left(
    bytes_bpe: Tokenizer,
    tmp_path: Path,
    content: str,
    options: dict[str, Any],
    error: type[CratonError],
    message: str,
    where: str | None,
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(error, match=message) as caught:
        made(tmp_path / "out", bytes_bpe, str(tmp_path / "a.jsonl"), **options)
    assert (where or "") in (caught.value.where or "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_worker_s_refusal_arrives_whole(chat_bpe: Tokenizer, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]}
    bad = {"messages": [{"role": "usr", "content": "Who?"}, {"role": "assistant", "content": "We."}]}
    source = write_jsonl(tmp_path / "a.jsonl", good, bad)
    errors = []
    for workers in (1, 2):
        with pytest.raises(CratonError) as caught:
            made(tmp_path / "out", chat_bpe, source, workers=workers)
        errors.append((type(caught.value), caught.value.as_dict()))
    assert errors[0] == errors[1]
    assert "a.jsonl:2" in (errors[0][1]["where"] or "")


def test_a_worker_that_dies_is_an_error_and_no_wait(
    bytes_bpe: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill_workers(so_far: Preparation) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    monkeypatch.setattr(prepare_module, "CHUNK_RECORDS", 1)
    source = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in sentences(50)))
    settings = PrepareSettings(sources=(source,), workers=2)
    with pytest.raises(DataError, match="worker process died"):
        prepare(settings, bytes_bpe, tmp_path / "out", report=kill_workers)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


PROGRAM = """
import sys
from craton.data import prepare as module
from craton.data.prepare import PrepareSettings, prepare
from craton.modalities.text import Tokenizer
if __name__ == "__main__":
    source, tokenizer, out = sys.argv[1:]
    settings = PrepareSettings(sources=(source,), dedup="minhash", workers=2)
    module.CHUNK_RECORDS = 16
    def report(so_far):
        print("working", flush=True)
    prepare(settings, Tokenizer.from_folder(tokenizer), out, report=report)
"""


def test_stopped_at_any_time_nothing_half_is_left_and_the_next_run_succeeds(
    bytes_bpe: Tokenizer, tmp_path: Path
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", *({"text": text} for text in sentences(4000)))
    model = tmp_path / "model"
    model.mkdir()
    bytes_bpe.backend.save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    (tmp_path / "program.py").write_text(PROGRAM)
    home = tmp_path / "home"
    home.mkdir()
    for number, stop in enumerate((signal.SIGKILL, signal.SIGINT)):
        program = [sys.executable, str(tmp_path / "program.py"), source, str(model), str(home / "out")]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        time.sleep(0.1 * number)
        process.send_signal(stop)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert not (home / "out").exists()
        if stop == signal.SIGINT:
            assert list(home.iterdir()) == []
    made(home / "out", bytes_bpe, write_jsonl(tmp_path / "b.jsonl", {"text": "fox"}))
    assert [path.name for path in home.iterdir()] == ["out"]


def test_real_questions_against_their_test_set(bytes_bpe: Tokenizer, tmp_path: Path, shared_data: Path) -> None:
    train, test = (shared_data / "banking77" / f"{name}.csv" for name in ("train", "test"))
    done = made(tmp_path / "out", bytes_bpe, str(train), against=(str(test),), dedup="minhash")
    assert done.manifest is not None
    kept = done.manifest.parts[0].documents
    assert kept + sum(count.documents for count in done.removed.values()) == done.read.documents == 10_003
    assert 0 < done.removed["in evaluation data"].documents < 500
    # Each removal holds up when it is read with one's own eyes: the words of the test question are in the document.
    by_origin = {record.origin: record.value["text"] for record in read_records(train)}
    lines = [by_origin[origin] for origin, reason, _ in removed(tmp_path / "out") if reason == "in evaluation data"]
    tests = [" ".join(words(record.value["text"])) for record in read_records(test)]
    for line in lines:
        own = words(line)
        runs = {" ".join(own[i : i + n]) for n in (13, *range(8, 13)) for i in range(len(own) - n + 1)} | {
            " ".join(own)
        }
        assert any(run in question for run in runs for question in tests)


def test_persian_prose_in_and_out(bytes_bpe: Tokenizer, tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "parsinlu" / "text_fa.txt"
    done = made(tmp_path / "out", bytes_bpe, str(source), lines=True, dedup="minhash")
    shards = open_shards(tmp_path / "out", bytes_bpe, verify=True)
    gone = {origin for origin, _, _ in removed(tmp_path / "out")}
    kept = [clean(record.value["text"]) for record in read_records(source, lines=True) if record.origin not in gone]
    assert texts_of(shards, bytes_bpe) == kept
    assert shards.bytes == sum(len(text.encode()) for text in kept)
    assert done.removed["near-duplicate"].documents > 0
