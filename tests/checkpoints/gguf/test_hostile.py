"""Files that lie: only a FileFormatError may come out, in little memory, and it says what and where."""

import re
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from craton.checkpoints.gguf import GGUFFile
from craton.errors import FileFormatError

U8, U32, F32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9
HUGE = 2**64 - 1


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def text(value: bytes, length: int | None = None) -> bytes:
    return u64(len(value) if length is None else length) + value


def pair(key: bytes, type: int, value: bytes) -> bytes:
    return text(key) + u32(type) + value


def array(item_type: int, count: int, items: bytes = b"") -> bytes:
    return u32(item_type) + u64(count) + items


def tensor(
    name: bytes = b"t", dims: tuple[int, ...] = (8,), type: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    return text(name) + u32(len(dims) if n_dims is None else n_dims) + u64(*dims) + u32(type) + u64(offset)


def gguf(
    pairs: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    pairs, tensors = pairs or [], tensors or []
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_pairs = len(pairs) if n_pairs is None else n_pairs
    header = b"GGUF" + u32(3) + u64(n_tensors, n_pairs) + b"".join(pairs) + b"".join(tensors)
    return header.ljust(-(-len(header) // alignment) * alignment, b"\0") + data if tensors else header


def refusal(path: Path) -> FileFormatError:
    """The error that opening the file raises, in a bounded amount of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError) as caught:
            GGUFFile.open(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000
    assert str(path) in str(caught.value.where)
    assert caught.value.remedy
    return caught.value


DATA = bytes(64)
HOSTILE = {
    "magic": (b"GGML" + gguf()[4:], "not a GGUF file: it starts with b'GGML'"),
    "web page": (b"<!DOCTYPE html><html>", "not a GGUF file"),
    "version 1": (b"GGUF" + u32(1) + u32(0, 0), "GGUF version 1; only 2 and 3"),
    "version 4": (b"GGUF" + u32(4) + u64(0, 0), "GGUF version 4; only 2 and 3"),
    "version 0": (b"GGUF" + u32(0) + u64(0, 0), "GGUF version 0; only 2 and 3"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
    "only magic": (b"GGUF", "the file ends too early"),
    "less than magic": (b"GG", "the file ends too early"),
    "no counts": (b"GGUF" + u32(3), "the file ends too early"),
    "n_kv huge": (gguf(n_pairs=HUGE), "18446744073709551615 metadata keys; at most 65536 are read"),
    "n_tensors huge": (gguf(n_tensors=HUGE), "18446744073709551615 tensors and 0 metadata keys"),
    "n_kv more than there are": (gguf(n_pairs=1), "the file ends too early"),
    "n_tensors more than there are": (gguf([], [tensor()], DATA, n_tensors=9), "dimensions|too early|bytes"),
    "key length": (gguf([text(b"k", HUGE)]), "a key of 18446744073709551615 bytes, where at most 65535"),
    "key past the end": (gguf([text(b"k", 60_000)]), "60000 bytes should follow, 1 do"),
    "key empty": (gguf([pair(b"", U8, b"\1")]), "an empty key"),
    "key not UTF-8": (gguf([pair(b"\xff", U8, b"\1")]), "a key that is not UTF-8"),
    "key twice": (gguf([pair(b"k", U8, b"\1")] * 2), "the key appears twice"),
    "value missing": (gguf([pair(b"k", U32, b"\1")]), "4 bytes should follow, 1 do"),
    "value type": (gguf([pair(b"k", 13, b"\1")]), "unknown value type 13"),
    "boolean": (gguf([pair(b"k", BOOL, b"\2")]), "a boolean of 2"),
    "string length": (gguf([pair(b"k", STRING, text(b"v", HUGE))]), "a string of 18446744073709551615 bytes"),
    "string past the end": (gguf([pair(b"k", STRING, text(b"v", 2**26))]), "67108864 bytes should follow, 1 do"),
    "string not UTF-8": (gguf([pair(b"k", STRING, text(b"a\xffb"))]), "a string that is not UTF-8"),
    "array type": (gguf([pair(b"k", ARRAY, array(99, 0))]), "unknown value type 99"),
    "array of arrays": (gguf([pair(b"k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\1")))]), "an array of arrays"),
    "array nested deep": (gguf([pair(b"k", ARRAY, array(ARRAY, 1) * 10_000)]), "an array of arrays"),
    "array count huge": (gguf([pair(b"k", ARRAY, array(U8, HUGE))]), "an array of 18446744073709551615 items"),
    "array count overflow": (gguf([pair(b"k", ARRAY, array(U32, 2**62 + 1))]), "an array of 4611686018427387905"),
    "array past the end": (gguf([pair(b"k", ARRAY, array(F32, 2**20))]), "4194304 bytes should follow, 0 do"),
    "array of booleans": (gguf([pair(b"k", ARRAY, array(BOOL, 3, b"\0\1\7"))]), "a boolean of 7"),
    "strings past the end": (gguf([pair(b"k", ARRAY, array(STRING, 2**20))]), "8388608 bytes should follow, 0 do"),
    "strings, one past the end": (
        gguf([pair(b"k", ARRAY, array(STRING, 2, text(b"abcdefgh") + text(b"x", 2**60)))]),
        "1152921504606846976 bytes should follow, 1 do",
    ),
    "strings, a length past the end": (
        gguf([pair(b"k", ARRAY, array(STRING, 3, text(b"abcdefgh") + text(b"x", 3)))]),
        "8 bytes should follow|3 bytes should follow",
    ),
    "strings, the last length cut": (
        gguf([pair(b"k", ARRAY, array(STRING, 2, text(b"abcdefgh") + b"\1\0"))]),
        "8 bytes should follow, 2 do",
    ),
    "name length": (gguf([], [text(b"t", 2**40)], DATA), "a tensor name of 1099511627776 bytes"),
    "name not UTF-8": (gguf([], [tensor(b"\xc0")], DATA), "a tensor name that is not UTF-8"),
    "name twice": (gguf([], [tensor(), tensor(offset=32)], DATA), "the tensor appears twice"),
    "no dimensions": (gguf([], [tensor(dims=())], DATA), "0 dimensions; a tensor has 1 to 4"),
    "five dimensions": (gguf([], [tensor(dims=(1,) * 5)], DATA), "5 dimensions; a tensor has 1 to 4"),
    "n_dims huge": (gguf([], [tensor(n_dims=2**32 - 1)], DATA), "4294967295 dimensions"),
    "dimension zero": (gguf([], [tensor(dims=(8, 0))], DATA), r"a dimension of 0 in the shape \(0, 8\)"),
    "product overflow": (gguf([], [tensor(dims=(2**33, 2**31))], DATA), "73786976294838206464 bytes, of a file of"),
    "product overflow to 8": (gguf([], [tensor(dims=(2**63, 2**63, 4, 8))], DATA), "its data is past the end"),
    "byte size overflow": (gguf([], [tensor(dims=(2**62,))], DATA), "its data is past the end"),
    "part of a block": (gguf([], [tensor(dims=(33, 2), type=8)], DATA), "rows of 33 values are not whole Q8_0 blocks"),
    "type unknown": (gguf([], [tensor(type=99)], DATA), "unknown tensor type 99"),
    "type known by name": (gguf([], [tensor(type=20)], DATA), "the tensor type IQ4_NL cannot be read"),
    "type removed": (gguf([], [tensor(type=4)], DATA), "Q4_2 .removed from GGML. cannot be read"),
    "offset off the alignment": (gguf([], [tensor(offset=8)], DATA), "not at a multiple of the alignment, 32"),
    "offset past the end": (gguf([], [tensor(offset=64)], DATA), "its data is past the end: 32 bytes"),
    "offset huge": (gguf([], [tensor(offset=HUGE - 31)], DATA), "its data is past the end"),
    "one byte short": (gguf([], [tensor(dims=(16,))], DATA[:-1]), "its data is past the end: 64 bytes"),
    "no data at all": (gguf([], [tensor()]), "its data is past the end"),
    "overlap": (gguf([], [tensor(b"a", (16,)), tensor(b"b", offset=32)], DATA), "overlaps with that of tensor 'a'"),
    "same place": (gguf([], [tensor(b"a"), tensor(b"b")], DATA), "overlaps with that of tensor 'a'"),
    **{
        f"alignment {value}": (
            gguf([pair(b"general.alignment", U32, u32(value))], [tensor()], DATA),
            "the alignment is not a U32 power of two from 8 to 65536",
        )
        for value in (0, 1, 4, 24, 2**17, 2**31, 2**32 - 1)
    },
    "alignment text": (gguf([pair(b"general.alignment", STRING, text(b"32"))]), "the alignment is not a U32"),
    "alignment list": (gguf([pair(b"general.alignment", ARRAY, array(U32, 1, u32(32)))]), "the alignment is not a U32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_with_words(case: str, tmp_path: Path) -> None:
    content, words = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    error = refusal(path)
    assert re.search(words, error.what), error.what


def test_the_place_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([pair(b"good", U8, b"\1"), pair(b"bad\n\x1b[31m", U32, b"\1")]))
    # 24 bytes of counts, 17 of the first pair; the second's value comes after 8 + 9 bytes of key and 4 of type.
    assert refusal(path).where == rf"{path}, key 'bad\n\x1b[31m', byte 62"


def sparse(path: Path, head: bytes, size: int) -> Path:
    """A file of `size` bytes that takes no room: `head`, then zeros."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (gguf([pair(b"k", STRING, text(b"", 2**27))]), "a header of more than 128 MiB"),
        (gguf([pair(b"k", ARRAY, array(U8, 2**22 + 1))]), "more than 4194304 items in all"),
        (gguf([pair(b"k", ARRAY, array(STRING, 2**31))]), "more than 4194304 items in all"),
        (gguf(n_pairs=65_536), "an empty key"),
        (gguf(n_tensors=65_536), "0 dimensions"),
    ],
)
def test_a_large_file_does_not_buy_memory(tmp_path: Path, head: bytes, words: str) -> None:
    error = refusal(sparse(tmp_path / "large.gguf", head, 2**33))
    assert words in error.what


def test_the_item_limit_is_for_all_arrays_together(tmp_path: Path) -> None:
    first = pair(b"first", ARRAY, array(U8, 2**18, bytes(2**18)))
    path = sparse(tmp_path / "large.gguf", gguf([first, pair(b"second", ARRAY, array(U8, 2**22 - 2**18 + 1))]), 2**30)
    with pytest.raises(FileFormatError, match="more than 4194304 items in all"):
        GGUFFile.open(path)


DATA_BYTES = 128 + 210
VALID = gguf(
    [
        pair(b"general.architecture", STRING, text(b"llama")),
        pair(b"general.alignment", U32, u32(32)),
        pair(b"flag", BOOL, b"\1"),
        pair(b"tokens", ARRAY, array(STRING, 3, text(b"a") + text(b"") + text(b"\xff"))),
        pair(b"scores", ARRAY, array(F32, 2, struct.pack("<2f", 0.5, 1))),
    ],
    [
        tensor(b"f32", (4, 2), 0, 0),
        tensor(b"q8", (32, 1), 8, 32),
        tensor(b"i8", (3,), 24, 96),
        tensor(b"q6_k", (256,), 14, 128),
    ],
    bytes(position % 251 for position in range(DATA_BYTES)),
)


def read_all(path: Path) -> bool:
    """Whether the file was accepted; then every tensor must be readable. Any error but a FileFormatError passes on."""
    try:
        with GGUFFile.open(path) as file:
            for name, info in file.tensors.items():
                if info.type.name not in ("Q8_1", "Q8_K"):
                    assert file.array(name).shape == info.shape
    except FileFormatError:
        return False
    return True


@pytest.mark.parametrize("version", [2, 3])
def test_the_valid_file_is_valid(tmp_path: Path, version: int) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + u32(version) + VALID[8:])
    assert read_all(path)
    with GGUFFile.open(path) as file:
        assert file.version == version
        assert file.metadata["scores"] == [0.5, 1.0]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for size in range(len(VALID)):
        path.write_bytes(VALID[:size])
        assert not read_all(path), size


def test_every_flipped_bit_of_the_header_is_survived(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    accepted = 0
    header_bits = (len(VALID) - DATA_BYTES) * 8
    for bit in range(header_bits):
        mutated = bytearray(VALID)
        mutated[bit // 8] ^= 1 << bit % 8
        path.write_bytes(mutated)
        accepted += read_all(path)
    assert 0 < accepted < header_bits  # a flip in a string is a sound file; most others are not


NUMBERS = st.sampled_from([0, 1, 2, 4, 31, 255, 2**31, 2**32 - 1, 2**62, 2**63, HUGE])
EDITS = st.lists(st.tuples(st.integers(0, len(VALID) - 9), NUMBERS | st.integers(0, HUGE)), min_size=1, max_size=4)


@given(edits=EDITS, cut=st.none() | st.integers(0, len(VALID)))
@settings(max_examples=300, deadline=None)
def test_numbers_written_anywhere_are_survived(tmp_path_factory, edits, cut) -> None:
    mutated = bytearray(VALID)
    for position, number in edits:
        mutated[position : position + 8] = u64(number)
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(mutated[:cut])
    tracemalloc.start()
    try:
        read_all(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
