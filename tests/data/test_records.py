"""Reading records: every format to the same objects, every fault with its line, no input that breaks or hangs it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import sys
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.data import json_values
from craton.data.records import Reading, Record, read_records
from craton.errors import CratonError, DownloadError, FileFormatError, UsageError

ROWS = [{"text": "first, «نخست»"}, {"text": 'second "quoted"\u2028line'}, {"text": "third"}]


def read(path: str | Path, **options: Any) -> list[Record]:
    return list(read_records(path, **options))


def values(records: list[Record]) -> list[dict[str, Any]]:
    return [record.value for record in records]


def lines_of(records: list[Record]) -> list[str]:
    return [record.origin.rpartition(":")[2] for record in records]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_file


def dump(rows: list[dict[str, Any]], end: str = "\n") -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "A.JSONL"])
def test_json_lines_with_any_line_end_and_mark(write, name: str, mark: bytes, end: str) -> None:
    path = write(name, mark + dump(ROWS, end).encode())
    records = read(path)
    assert values(records) == ROWS
    assert [record.origin for record in records] == [f"{path}:{i}" for i in (1, 2, 3)]


def test_blank_lines_count_but_are_no_records(write) -> None:
    path = write("a.jsonl", '\n{"text": "a"}\n  \n\n{"text": "b"}')
    assert lines_of(read(path)) == ["2", "5"]


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list(write, indent: int | None) -> None:
    assert values(read(write("a.json", json.dumps(ROWS, indent=indent)))) == ROWS


def test_a_json_list_gives_the_line_on_which_each_object_begins(write) -> None:
    assert lines_of(read(write("a.json", '[\n{"a": 1}, {\n"a": 2},\n\n {"a": 3}\n]\n'))) == ["2", "2", "5"]


def test_one_json_object_over_several_lines(write) -> None:
    assert values(read(write("a.json", json.dumps(ROWS[0], indent=2)))) == ROWS[:1]


json_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_objects = st.dictionaries(
    json_text,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | json_text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(json_text, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(json_objects, min_size=1, max_size=5),
    indent=st.sampled_from([None, 0, 3]),
    escaped=st.booleans(),
    listed=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_json_is_what_the_json_module_makes_of_it_whatever_the_size_of_a_read(
    rows: list[dict[str, Any]], indent: int | None, escaped: bool, listed: bool, chunk: int, scratch: Path
) -> None:
    texts = [json.dumps(row, indent=indent, ensure_ascii=escaped) for row in rows]
    content = "[" + ",\n".join(texts) + "]" if listed else "\n\n".join(texts)
    (scratch / "a.json").write_bytes(content.encode())
    with mock.patch.object(json_values, "CHUNK_BYTES", chunk):
        records = read(scratch / "a.json")
    assert values(records) == rows
    places, line = [], 1
    for text in texts:
        places.append(str(line))
        line += text.count("\n") + (1 if listed else 2)
    assert lines_of(records) == places


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=2, max_size=2),
        min_size=1,
        max_size=6,
    ),
    delimiter=st.sampled_from([",", "\t"]),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_csv_is_what_the_csv_module_wrote(rows: list[list[str]], delimiter: str, end: str, scratch: Path) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "label"])
    places = []
    for row in rows:
        places.append(str(buffer.getvalue().count("\n") + 1))
        writer.writerow(row)
    path = scratch / f"a.{'csv' if delimiter == ',' else 'tsv'}"
    path.write_bytes(buffer.getvalue().encode())
    records = read(path)
    assert [list(record.value.values()) for record in records] == rows
    assert lines_of(records) == places


def test_csv_with_an_unnamed_column_as_pandas_writes_it(write) -> None:
    assert values(read(write("a.csv", ",text\n0,a\n"))) == [{"": "0", "text": "a"}]


@pytest.fixture
def parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def test_parquet(parquet, tmp_path: Path) -> None:
    import pyarrow

    rows = [{"messages": [{"role": "user", "content": f"سلام {i}"}], "n": i} for i in range(600)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    records = read(path)
    assert values(records) == rows
    assert records[599].origin == f"{path}#600"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FileFormatError, match="not Parquet"):
        read(path)


def test_parquet_with_damaged_pages_is_a_bad_file(parquet, tmp_path: Path) -> None:
    import pyarrow

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"text": f"{i} {i * i}"} for i in range(2000)]), path)
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match="not Parquet"):
        read(path)


def test_parquet_without_its_library_says_what_to_install(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match="pyarrow") as caught:
        read(write("a.parquet", b"PAR1"))
    assert caught.value.remedy == "pip install 'craton[data]'"


def test_a_text_file_is_one_document_or_one_a_line(write) -> None:
    path = write("a.txt", "\ufeffone\r\n\ntwo\u2028still\n")
    assert values(read(path)) == [{"text": "one\r\n\ntwo\u2028still\n"}]
    assert [(r.value["text"], r.origin) for r in read(path, lines=True)] == [
        ("one", f"{path}:1"),
        ("two\u2028still", f"{path}:3"),
    ]


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_packed_files(write, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    packed = pack(dump(ROWS * 400).encode())
    path = write(f"a.jsonl{suffix}", packed)
    assert values(read(path)) == ROWS * 400
    assert values(read(write(f"a.txt{suffix}", pack(b"hello")))) == [{"text": "hello"}]
    for content in (packed[:-20], b"no such thing", packed[:30] + b"\xff" * 30 + packed[60:]):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=suffix):
            read(path)


# --- faults, each with its place -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 2, "byte 24 of the file"),
        ("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', 2, "byte 26 of the file"),
        ("a.csv", b"text,label\na,b\n\xe9t\xe9,c\n", 3, "byte 15 of the file"),
        ("a.txt", b"fine\nfine\nna\xefve\n", 3, "byte 12 of the file"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), 1, "UTF-16"),
        ("a.json", "[]".encode("utf-16"), 1, "UTF-16"),
        ("a.txt", "hello".encode("utf-16"), 1, "UTF-16"),
        ("a.jsonl", '{"a": 1}\n["text"]\n', 2, "a list"),
        ("a.jsonl", '{"a": 1}\n"text"\n', 2, "a string"),
        ("a.json", "[{}, 7]", 1, "a number"),
        ("a.jsonl", '{"a": 1}\n{"a": 1\n', 2, "not JSON"),
        ("a.jsonl", '{"a": NaN}', 1, "NaN"),
        ("a.json", '[{"a": -Infinity}]', 1, "-Infinity"),
        ("a.jsonl", '{"a": 1, "b": {"c": 1, "c": 2}}', 1, "'c' appears twice"),
        ("a.jsonl", '{"a": "\\ud800"}', 1, "surrogate"),
        ("a.json", '[{"a": 1},\n {"a": "\\uDC00"}]', 2, "surrogate"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, 1, "nested too deeply"),
        ("a.json", '[\n{"a": 1}\n{"a": 2}]', 3, "a comma or the end"),
        ("a.json", '[{"a": 1}]\n\n{}', 3, "the list has ended"),
        ("a.json", '[{"a": 1},\n{"a": ]', 2, "not JSON"),
        ("a.json", '[{"a": 1},\n', 2, "a comma or the end"),
        ("a.csv", "text,label\na,b\n\nc\n", 4, "1 fields, the header 2"),
        ("a.csv", "text,label\na,b,c\n", 2, "3 fields, the header 2"),
        ("a.csv", "text,text\na,b\n", 1, "'text' twice"),
        ("a.csv", 'text,label\na,b\n"open,c\nd,e\n', 3, "not CSV"),
        ("a.tsv", 'text\tlabel\n"a"b\tc\n', 2, "not TSV"),
    ],
)
def test_a_fault_is_named_with_its_line(write, name: str, content: str | bytes, line: int, words: str) -> None:
    path = write(name, content)
    with pytest.raises(FileFormatError) as caught:
        read(path)
    assert words in caught.value.what
    assert caught.value.where == f"{path}:{line}"


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.txt", "a.txt.gz"])
def test_an_empty_file_is_an_error(write, name: str, content: str) -> None:
    raw = content.encode()
    path = write(name, gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(FileFormatError, match="there are no records") as caught:
        read(path)
    assert caught.value.where == str(path)


def test_a_header_alone_is_no_data(write) -> None:
    with pytest.raises(FileFormatError, match="there are no records"):
        read(write("a.csv", "text,label\n"))


def test_a_binary_file_is_no_text(write) -> None:
    with pytest.raises(FileFormatError, match="binary"):
        read(write("model.bin", b"\x00\x01\x02"))


def test_a_missing_file_suggests_its_siblings(write, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "trian.jsonl")
    assert caught.value.remedy == "did you mean 'train.jsonl'?"
    with pytest.raises(UsageError) as caught:
        read(tmp_path / "nowhere" / "x.jsonl")
    assert "does not exist either" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="no file matches"):
        read(f"{tmp_path}/**/*.csv")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(write) -> None:
    path = write("a.jsonl", "{}")
    path.chmod(0)
    with pytest.raises(CratonError, match="Permission"):
        read(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt", "a.csv"])
def test_ten_million_characters_in_one_line(write, name: str) -> None:
    text = "سلام x" * 1_700_000
    content = {"a.jsonl": dump([{"text": text}]), "a.json": f"[{dump([{'text': text}])}]"}.get(name, f"text\n{text}\n")
    path = write(name, content)
    began = time.process_time()
    (record,) = read(path)
    assert len(record.value["text"]) >= 10_000_000
    with pytest.raises(FileFormatError, match="longer than 1 MiB") as caught:
        read(path, max_record_bytes=1 << 20)
    assert time.process_time() - began < 10
    assert str(path) in str(caught.value.where)


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(write) -> None:
    path = write("a.csv", 'text\nfine\n"open\n' + "and on\n" * 1000)
    with pytest.raises(FileFormatError, match="the row is longer") as caught:
        read(path, max_record_bytes=1000)
    assert caught.value.where == f"{path}:3"
    assert "quote" in str(caught.value.remedy)


def test_memory_stays_flat(tmp_path: Path) -> None:
    # 12 MB of records, of which at most one and a buffer are held at a time.
    row = {"text": "x" * 1000}
    (tmp_path / "a.jsonl").write_text(dump([row] * 6000))
    (tmp_path / "a.json").write_text("[" + ",".join([json.dumps(row)] * 6000) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records([tmp_path / "a.jsonl", tmp_path / "a.json"])) == 12_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


SEEDS = [
    dump(ROWS).encode(),
    json.dumps(ROWS, indent=1).encode(),
    b'text,label\n"a, b",1\n"multi\nline",2\n',
    b'{"a": "\\ud83d\\ude00", "b": [1, {"c": null}]}\n',
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 4))] = draw(st.binary(max_size=4))
        if not content:
            break
    return bytes(content)


@settings(max_examples=400, deadline=None)
@given(
    content=st.binary(max_size=200) | damaged(),
    kind=st.sampled_from(["jsonl", "json", "csv", "tsv", "txt", "py", "jsonl.gz", "csv.xz"]),
    by_line=st.booleans(),
)
def test_any_bytes_are_records_or_a_clear_error(content: bytes, kind: str, by_line: bool, scratch: Path) -> None:
    path = scratch / f"any.{kind}"
    path.write_bytes(content)
    records, error = [], None
    try:
        records = read(path, lines=by_line, max_record_bytes=150)
    except CratonError as caught:
        error = caught
    assert records or error
    assert error is None or str(path) in str(error.where)
    for record in records:
        assert isinstance(record.value, dict)
        assert record.origin.startswith(f"{path}:")
        json.dumps(record.value, ensure_ascii=False).encode()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


# --- folders, patterns, several sources ----------------------------------------------------------------------------


@pytest.fixture
def folder(write, tmp_path: Path) -> Path:
    write("d/b.txt", "b")
    write("d/a/z.py", "print()")
    write("d/a.jsonl", dump(ROWS[:1]))
    write("d/a/.hidden.txt", "no")
    write("d/.git/config", "no")
    write("d/a/module.pyc", b"\x00\x01")
    write("d/a/__init__.py", "")
    write("d/a/latin.txt", "é".encode("latin-1"))
    write("d/empty.jsonl", "")
    (tmp_path / "d" / "broken").symlink_to("nowhere")
    (tmp_path / "d" / "loop").symlink_to(".")
    return tmp_path / "d"


def test_a_folder_is_read_in_order_and_what_is_skipped_is_counted(folder: Path) -> None:
    reading = Reading()
    records = read(folder, reading=reading)
    assert [Path(r.origin).relative_to(folder).as_posix() for r in records] == ["a/z.py:1", "a.jsonl:1", "b.txt:1"]
    assert reading == Reading(files=3, records=3, skipped={"hidden": 1, "binary": 1, "empty": 2, "not UTF-8": 1})


def test_bad_bytes_in_a_table_are_an_error_in_a_folder_too(write, tmp_path: Path) -> None:
    write("d/a.jsonl", b'{"text": "\xff"}')
    with pytest.raises(FileFormatError, match="UTF-8"):
        read(tmp_path / "d")


def test_a_folder_of_nothing(write, tmp_path: Path) -> None:
    write("d/a.pyc", b"\0")
    with pytest.raises(FileFormatError, match="1 binary"):
        read(tmp_path / "d")


def test_patterns_and_several_sources(folder: Path) -> None:
    assert values(read(f"{folder}/**/*.py")) == [{"text": "print()"}]
    records = read([folder / "b.txt", str(folder / "a.jsonl"), folder / "b.txt"])
    assert values(records) == [{"text": "b"}, ROWS[0], {"text": "b"}]
    with pytest.raises(FileFormatError, match="there are no records"):
        read([folder / "b.txt", folder / "empty.jsonl"])


def test_a_file_whose_name_looks_like_a_pattern(write) -> None:
    assert values(read(write("a[1].txt", "x"))) == [{"text": "x"}]


# --- the hub -------------------------------------------------------------------------------------------------------


class DatasetNotFoundError(Exception):
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A `datasets` library that notes how it is called and has one data set."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Iterator[dict[str, Any]]:
        calls.append((path, name, options))
        if path != "org/name":
            raise DatasetNotFoundError(f"Dataset '{path}' doesn't exist on the Hub.\nlong story")
        return iter([{"text": "a"}, {"text": "b"}])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


def test_a_data_set_of_the_hub_is_streamed_and_runs_no_code(hub: list[tuple[Any, ...]]) -> None:
    records = read("hf:org/name:test")
    assert [(r.value["text"], r.origin) for r in records] == [("a", "hf:org/name:test#1"), ("b", "hf:org/name:test#2")]
    read("hf:org/name/config")
    assert hub == [
        ("org/name", None, {"split": "test", "streaming": True}),
        ("org/name", "config", {"split": "train", "streaming": True}),
    ]


def test_faults_of_the_hub(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"doesn't exist on the Hub\.\n  where"):
        read("hf:org/other")
    with pytest.raises(UsageError, match="no data set's name"):
        read("hf:a/b/c/d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs datasets"):
        read("hf:org/name")


# --- real data -----------------------------------------------------------------------------------------------------


def test_real_files(shared_data: Path) -> None:
    banking = read(shared_data / "banking77" / "train.csv")
    assert len(banking) == 10_003
    assert len({r.value["category"] for r in banking}) == 77
    # Some questions run over several lines, so the last line is beyond the number of rows.
    last = banking[-1]
    content = (shared_data / "banking77" / "train.csv").read_text(encoding="utf-8").split("\n")
    assert last.value["text"].split("\n")[0] in content[int(lines_of([last])[0]) - 1]
    assert len(read(shared_data / "parsinlu" / "sentiment_movie_dev.jsonl")) == 360
    assert len(read(shared_data / "tinyshakespeare")) == 1
