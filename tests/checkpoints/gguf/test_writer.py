import contextlib
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.gguf import (
    GGMLType,
    GGUFFile,
    TensorSource,
    TypedValue,
    boolean,
    dequantize,
    f32,
    f64,
    i8,
    i16,
    i32,
    i64,
    quantize,
    string,
    u8,
    u16,
    u32,
    u64,
    write_gguf,
)
from craton.errors import StoreError, UsageError

METADATA = {
    "general.architecture": "llama",
    "general.name": "a name, نام",
    "numbers.u8": u8(255),
    "numbers.i8": i8(-128),
    "numbers.u16": u16(65535),
    "numbers.i16": i16(-32768),
    "numbers.u32": u32(2**32 - 1),
    "numbers.i32": i32(-(2**31)),
    "numbers.u64": u64(2**64 - 1),
    "numbers.i64": i64(-(2**63)),
    "numbers.f32": f32(1e-5),
    "numbers.f64": f64(0.1),
    "flag.on": True,
    "flag.off": False,
    "array.tokens": ["<s>", "", "سلام", "\U0001f30b"],
    "array.scores": f32([0.0, -1.5]),
    "array.ids": i32([3, -1, 2]),
    "array.flags": boolean([True, False]),
}


def source(name: str, values: np.ndarray, type: GGMLType) -> TensorSource:
    return TensorSource(name, values.shape, type, lambda: quantize(values.reshape(-1, values.shape[-1]), type))


def sources() -> list[TensorSource]:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 64)).astype(np.float32)
    stack = rng.normal(size=(2, 2, 3, 32)).astype(np.float32)
    ids = np.arange(-3, 4, dtype="<i4")
    return [
        source("wide.q8", wide, GGMLType.Q8_0),
        source("wide.q4", wide, GGMLType.Q4_0),
        source("norm", wide[0, :7], GGMLType.F32),
        source("stack.f16", stack, GGMLType.F16),
        source("stack.bf16", stack, GGMLType.BF16),
        TensorSource("ids", ids.shape, GGMLType.I32, lambda: ids.view(np.uint8)),
    ]


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, sources())
    return path


def test_what_is_written_is_read(written: Path) -> None:
    with GGUFFile.open(written) as file:
        assert (file.version, file.alignment) == (3, 32)
        plain = {key: value.value if isinstance(value, TypedValue) else value for key, value in METADATA.items()}
        assert file.metadata == plain
        assert list(file.metadata) == list(METADATA)
        assert list(file.tensors) == [tensor.name for tensor in sources()]
        for tensor in sources():
            info = file.tensors[tensor.name]
            assert (info.shape, info.type, info.nbytes) == (tensor.shape, tensor.type, tensor.nbytes)
            assert info.offset % 32 == 0
            assert file.blocks(tensor.name).tobytes() == tensor.blocks().tobytes()
        assert file.array("ids").tolist() == [-3, -2, -1, 0, 1, 2, 3]
        assert file.array("ids").dtype == np.int32
        expected = dequantize(sources()[3].blocks(), GGMLType.F16).reshape(2, 2, 3, 32)
        np.testing.assert_array_equal(file.array("stack.f16"), expected)


def test_a_file_written_from_what_was_read_is_the_same(written: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    with GGUFFile.open(written) as file:
        tensors = [
            TensorSource(info.name, info.shape, info.type, lambda name=info.name: file.blocks(name))
            for info in file.tensors.values()
        ]
        write_gguf(copy, file.typed_metadata, tensors)
    assert copy.read_bytes() == written.read_bytes()


@pytest.mark.peer
def test_the_peer_reads_the_same(written: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(written)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(fields) == list(METADATA)
    with GGUFFile.open(written) as file:
        for key, typed in file.typed_metadata.items():
            assert fields[key].contents() == typed.value
            assert int(fields[key].types[-1]) == typed.type.id
            assert len(fields[key].types) == (2 if isinstance(typed.value, list) else 1)
        assert [tensor.name for tensor in reader.tensors] == list(file.tensors)
        for theirs in reader.tensors:
            ours = file.tensors[theirs.name]
            assert tuple(int(size) for size in theirs.shape[::-1]) == ours.shape
            assert (theirs.tensor_type.name, theirs.data_offset, theirs.n_bytes) == (
                ours.type.name,
                ours.offset,
                ours.nbytes,
            )
            assert theirs.data.tobytes() == file.blocks(theirs.name).tobytes()


NUMBERS = {
    **{t: st.integers(0, 2**bits - 1) for t, bits in [(u8, 8), (u16, 16), (u32, 32), (u64, 64)]},
    **{
        t: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        for t, bits in [(i8, 8), (i16, 16), (i32, 32), (i64, 64)]
    },
    f32: st.floats(width=32, allow_nan=False),
    f64: st.floats(allow_nan=False),
    boolean: st.booleans(),
    string: st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
}
VALUES = st.one_of([st.builds(make, item | st.lists(item, max_size=5)) for make, item in NUMBERS.items()])
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda key: key != "general.alignment"
)
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=15)


@given(
    metadata=st.dictionaries(KEYS, VALUES, max_size=6),
    shapes=st.dictionaries(NAMES, SHAPES, max_size=5),
    alignment=st.none() | st.sampled_from([8, 32, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip(tmp_path_factory, metadata, shapes, alignment) -> None:
    if alignment:
        metadata = {**metadata, "general.alignment": u32(alignment)}
    arrays = {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("gguf") / "x.gguf"
    write_gguf(path, metadata, [source(name, array, GGMLType.F32) for name, array in arrays.items()])
    with GGUFFile.open(path) as file:
        assert file.typed_metadata == metadata
        assert file.alignment == alignment or (alignment is None and file.alignment == 32)
        assert {name: file.array(name).tolist() for name in file.tensors} == {n: a.tolist() for n, a in arrays.items()}


def test_tokens_that_are_not_utf8_keep_their_bytes(tmp_path: Path) -> None:
    tokens = [b"\xff\xfe".decode("utf-8", "surrogateescape"), "plain"]
    path = tmp_path / "x.gguf"
    write_gguf(path, {"tokens": tokens}, [])
    assert b"\xff\xfe" in path.read_bytes()
    with GGUFFile.open(path) as file:
        assert file.metadata["tokens"] == tokens


@pytest.mark.parametrize(
    ("metadata", "tensors", "words"),
    [
        ({"n": 7}, [], "says nothing of its type"),
        ({"": "x"}, [], "a key must have 1 to 65535 bytes"),
        ({"k" * 65_536: "x"}, [], "a key must have 1 to 65535 bytes"),
        ({"k": "\udcff"}, [], "is not Unicode text"),
        ({"k": ["\ud800"]}, [], "is not Unicode text"),
        ({"general.alignment": u32(24)}, [], "the alignment is not a U32 power of two"),
        ({"general.alignment": u64(32)}, [], "the alignment is not a U32 power of two"),
        ({}, [("a", (1,)), ("a", (1,))], "given twice"),
        ({}, [("a" * 64, (1,))], "more than 63 bytes"),
        ({}, [("a", ())], "not 1 to 4 positive dimensions"),
        ({}, [("a", (1, 1, 1, 1, 1))], "not 1 to 4 positive dimensions"),
        ({}, [("a", (2, 0))], "not 1 to 4 positive dimensions"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path: Path, metadata, tensors, words) -> None:
    blocks = np.zeros(4, np.uint8)
    with pytest.raises(UsageError, match=words):
        write_gguf(tmp_path / "x.gguf", metadata, [TensorSource(*t, GGMLType.F32, lambda: blocks) for t in tensors])
    assert list(tmp_path.iterdir()) == []


def test_rows_must_be_whole_blocks(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows of 33 values are not whole Q8_0 blocks of 32"):
        write_gguf(tmp_path / "x.gguf", {}, [TensorSource("a", (2, 33), GGMLType.Q8_0, lambda: np.zeros(0, np.uint8))])


@pytest.mark.parametrize("blocks", [np.zeros(3, np.uint8), np.zeros(1, np.float32)])
def test_blocks_of_another_size_leave_the_old_file(tmp_path: Path, blocks: np.ndarray) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(UsageError, match="which is 4 bytes of uint8"):
        write_gguf(path, {}, [TensorSource("a", (1,), GGMLType.F32, lambda: blocks)])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.gguf", b"what was there")]


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")

    def interrupted() -> np.ndarray:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(path, {}, [TensorSource("a", (1,), GGMLType.F32, interrupted)])
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.gguf", b"what was there")]


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to let a file grow past `size`, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_leaves_the_old_file_and_says_how_much_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"what was there")
    values = np.zeros((64, 1024), np.float32)
    with largest_file(100_000), pytest.raises(StoreError, match="cannot write") as caught:
        write_gguf(path, {}, [source("a", values, GGMLType.F32)])
    assert caught.value.where == str(path)
    assert caught.value.remedy == "make room: the file needs 262,240 bytes"
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("x.gguf", b"what was there")]


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No such file or directory") as caught:
        write_gguf(tmp_path / "nowhere" / "x.gguf", {}, [])
    assert "nowhere" in str(caught.value.where)


def test_a_tensor_is_made_only_when_its_turn_comes(tmp_path: Path) -> None:
    made: list[str] = []

    def make(name: str) -> np.ndarray:
        made.append(name)
        return np.frombuffer(struct.pack("<f", len(made)), np.uint8)

    path = tmp_path / "x.gguf"
    write_gguf(path, {}, (TensorSource(name, (1,), GGMLType.F32, lambda name=name: make(name)) for name in "abc"))
    assert made == ["a", "b", "c"]
    with GGUFFile.open(path) as file:
        assert [file.array(name).item() for name in "abc"] == [1.0, 2.0, 3.0]


def test_the_room_does_not_need_torch() -> None:
    code = "import craton.checkpoints.gguf, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
