"""Reading and writing safetensors: against the reference package, and against files that lie."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from craton.checkpoints.safetensors import SafetensorsFile, open_weights, write_safetensors
from craton.errors import CheckpointError, CratonError, FileFormatError, StoreError, UsageError

ALL_DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.uint16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def random_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(ALL_DTYPES):
        values = torch.randint(0, 2, (3, i + 1), generator=generator)
        tensors[f"block.{i}"] = values.to(torch.float32).to(dtype)
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "نام": torch.arange(3)}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8)

    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(flat(a), flat(b))


# --- good files ---------------------------------------------------------------------------------------------------


def test_every_dtype_survives_a_round_trip(tmp_path: Path) -> None:
    tensors = random_tensors()
    (path,) = write_safetensors(tmp_path / "model.safetensors", tensors, {"note": "متن"})
    weights = open_weights(path)
    assert weights.metadata == {"format": "pt", "note": "متن"}
    assert weights.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same(weights.tensor(name), tensor), name
        assert weights.tensors[name].shape == tuple(tensor.shape)
        assert weights.tensors[name].nbytes == tensor.nbytes


@pytest.mark.peer
def test_bytes_equal_the_reference_writer(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    # One type of each width: among types of one width the reference has an order of its own.
    types = {"u": torch.uint8, "h": torch.bfloat16, "f": torch.float32, "g": torch.float32, "i": torch.int64}
    tensors = {f"نام.{name}": torch.arange(5).to(dtype) for name, dtype in types.items()}
    (path,) = write_safetensors(tmp_path / "model.safetensors", tensors)
    assert path.read_bytes() == reference.save(tensors, {"format": "pt"})


@pytest.mark.peer
def test_reads_what_the_reference_wrote_and_the_reverse(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    tensors = random_tensors()
    reference.save_file(tensors, tmp_path / "theirs.safetensors", {"a": "b"})
    weights = SafetensorsFile.open(tmp_path / "theirs.safetensors")
    assert weights.metadata == {"a": "b"}
    assert all(same(weights.tensor(name), tensor) for name, tensor in tensors.items())
    write_safetensors(tmp_path / "ours.safetensors", tensors)
    loaded = reference.load_file(tmp_path / "ours.safetensors")
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.peer
def test_a_sharded_folder_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    state = model.state_dict()
    files = write_safetensors(tmp_path / "model.safetensors", state, max_shard_bytes=6000)
    assert len(files) > 2
    assert files[-1].name == "model.safetensors.index.json"
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_real_weights_agree_with_the_reference(minilm_folder: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    weights = open_weights(minilm_folder)
    expected = reference.load_file(minilm_folder / "model.safetensors")
    assert weights.tensors.keys() == expected.keys()
    assert all(same(weights.tensor(name), tensor) for name, tensor in expected.items())


def test_tensors_are_private_writable_views_that_outlive_the_file(tmp_path: Path) -> None:
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"a": torch.arange(6.0), "b": torch.ones(2)})
    before = path.read_bytes()
    weights = SafetensorsFile.open(path)
    a, again, b = weights.tensor("a"), weights.tensor("a"), weights.tensor("b")
    assert a.data_ptr() == again.data_ptr()
    assert a.data_ptr() - b.data_ptr() == weights.tensors["a"].offset - weights.tensors["b"].offset
    del weights, again
    gc.collect()
    a += 1
    assert a.tolist() == [1, 2, 3, 4, 5, 6]
    assert b.tolist() == [1, 1]
    assert path.read_bytes() == before


def test_a_misaligned_tensor_is_read_right(tmp_path: Path) -> None:
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9)}
    path = raw_file(tmp_path / "w.safetensors", header, b"\x07" + struct.pack("<2f", 1.5, -2.0))
    b = SafetensorsFile.open(path).tensor("b")
    assert b.tolist() == [1.5, -2.0]
    assert b.data_ptr() % 4 == 0


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": entry("U8", [1], 0, 1)}).encode().ljust(length)
    assert SafetensorsFile.open(raw_file(tmp_path / "w.safetensors", text, b"\x05")).tensor("a").item() == 5


def test_reading_a_header_does_not_import_torch(tmp_path: Path) -> None:
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2)})
    program = (
        "import sys; from craton.checkpoints.safetensors import open_weights; "
        f"print(list(open_weights({str(path)!r}).tensors), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["['a']", "False"]


# --- files that lie -----------------------------------------------------------------------------------------------

HOSTILE_HEADERS: dict[str, tuple[object, bytes]] = {
    "unknown dtype": ({"a": entry("Q8", [1], 0, 1)}, b"\0"),
    "dtype is a list": ({"a": entry(["F32"], [1], 0, 4)}, b"\0" * 4),
    "negative size": ({"a": entry("U8", [-1], 0, 1)}, b"\0"),
    "two negative sizes": ({"a": entry("U8", [-1, -1], 0, 1)}, b"\0"),
    "float size": ({"a": entry("U8", [1.0], 0, 1)}, b"\0"),
    "boolean size": ({"a": entry("U8", [True], 0, 1)}, b"\0"),
    "NaN size": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"\0"),
    "thousands of digits": (b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"\0"),
    "product overflows": ({"a": entry("F32", [2**40, 2**40], 0, 4)}, b"\0" * 4),
    "product wraps to the right size": ({"a": entry("U8", [2**32, 2**32, 1], 0, 0)}, b""),
    "overflow behind a zero": ({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, b""),
    "shape too large for the bytes": ({"a": entry("F32", [3], 0, 8)}, b"\0" * 8),
    "shape too small for the bytes": ({"a": entry("F32", [1], 0, 8)}, b"\0" * 8),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, b"\0"),
    "rank of 65": ({"a": entry("U8", [1] * 65, 0, 1)}, b"\0"),
    "begin after end": ({"a": entry("U8", [1], 1, 0)}, b"\0"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 1]}}, b"\0"),
    "past the end": ({"a": entry("U8", [8], 0, 8)}, b"\0" * 7),
    "far past the end": ({"a": entry("U8", [2**50], 0, 2**50)}, b"\0"),
    "bytes of no tensor": ({"a": entry("U8", [8], 0, 8)}, b"\0" * 9),
    "hole": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"\0" * 3),
    "hole at the start": ({"a": entry("U8", [1], 1, 2)}, b"\0" * 2),
    "overlap": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"\0" * 3),
    "two tensors, one place": ({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"\0" * 2),
    "duplicate name": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
    ),
    "duplicate key": (b'{"a":{"dtype":"U8","dtype":"F32","shape":[1],"data_offsets":[0,1]}}', b"\0"),
    "missing key": ({"a": {"dtype": "U8", "shape": [1]}}, b"\0"),
    "surplus key": ({"a": {**entry("U8", [1], 0, 1), "more": 1}}, b"\0"),
    "entry is a list": ({"a": [1]}, b"\0"),
    "name of a megabyte": ({"a" * 1_000_000: entry("U8", [1], 0, 1)}, b"\0"),
    "metadata is a list": ({"__metadata__": []}, b""),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, b""),
    "not JSON": (b"{not json}", b""),
    "not UTF-8": (b'{"\xff":1}', b""),
    "UTF-16": ("{}".encode("utf-16-le"), b""),
    "deep nesting": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b""),
    "a list": (b"[]", b""),
    "too many tensors": (b'{"a":[' + b",".join([b"{}"] * 250_001) + b"]}", b""),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
def test_a_lying_header_is_refused(tmp_path: Path, case: str) -> None:
    header, data = HOSTILE_HEADERS[case]
    path = raw_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(FileFormatError) as caught:
        SafetensorsFile.open(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 100_000_001, 3])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(FileFormatError, match="the header claims"):
        SafetensorsFile.open(raw_file(tmp_path / "w.safetensors", b"{}", length=length))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "first 8 bytes"),
        (b"\0" * 7, "first 8 bytes"),
        (b"\0" * 64, "first 8 bytes"),
        (pickle.dumps({"a": 1}, protocol=2), "pickle"),
        (pickle.dumps({"a": 1}, protocol=4), "pickle"),
        (b"PK\x03\x04" + b"\0" * 60, "pickle"),
        (b"GGUF" + b"\3\0\0\0" + b"\0" * 60, "GGUF"),
        (b"version https://git-lfs.example/spec/v1\noid sha256:00\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_look_alikes_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=words):
        open_weights(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int8)})
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(FileFormatError):
            SafetensorsFile.open(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bits_never_escape_as_anything_else(tmp_path: Path, data: st.DataObject) -> None:
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(2, 3), "b": torch.ones(2).half()})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        file = SafetensorsFile.open(path)
        tensors = {name: file.tensor(name) for name in file.tensors}
    except CratonError:
        return
    # What is still accepted stays inside the file.
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
headers = st.dictionaries(
    st.text(max_size=4),
    st.fixed_dictionaries({"dtype": st.sampled_from(["U8", "F32"]) | json_values, "shape": json_values})
    | st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "F4"]),
            "shape": st.lists(st.integers(-1, 5), max_size=3),
            "data_offsets": st.lists(st.integers(-1, 9), max_size=3),
        }
    ),
    max_size=4,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=headers, data=st.binary(max_size=8))
def test_any_json_header_is_read_or_refused(tmp_path: Path, header: dict[str, Any], data: bytes) -> None:
    path = raw_file(tmp_path / "w.safetensors", header, data)
    try:
        file = SafetensorsFile.open(path)
    except FileFormatError:
        return
    assert sum(info.nbytes for info in file.tensors.values()) == len(data)


def test_a_file_replaced_after_opening_is_noticed(tmp_path: Path) -> None:
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(4)})
    file = SafetensorsFile.open(path)
    write_safetensors(path, {"a": torch.ones(1)})
    with pytest.raises(FileFormatError, match="changed"):
        file.tensor("a")


def test_unknown_names_and_packed_floats_are_refused(tmp_path: Path) -> None:
    file = SafetensorsFile.open(raw_file(tmp_path / "w.safetensors", {"a": entry("F4", [4], 0, 2)}, b"\0\0"))
    with pytest.raises(CheckpointError, match="no tensor 'b'"):
        file.tensor("b")
    with pytest.raises(CheckpointError, match="F4"):
        file.tensor("a")


@pytest.mark.parametrize("path", ["nowhere.safetensors", "nowhere", "\0", "x" * 5000])
def test_a_missing_file_is_wrong_use(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="no such file"):
        open_weights(tmp_path / path)


# --- folders and shards -------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "sharded"
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", {f"t{i}": torch.full((4,), float(i)) for i in range(3)}, None, 20)
    return folder


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def test_shards_read_as_one(shards: Path) -> None:
    weights = open_weights(shards)
    assert [file.path.name for file in weights.files] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [weights.tensor(f"t{i}")[0].item() for i in range(3)] == [0, 1, 2]
    assert json.loads((shards / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 48}
    with pytest.raises(CheckpointError, match="no tensor 't9'"):
        weights.tensor("t9")


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing.* 1 of 3"):
        open_weights(shards)


def test_a_tensor_that_its_shard_lacks_is_named(shards: Path) -> None:
    edit_index(shards, lambda index: index["weight_map"].update(t9="model-00001-of-00003.safetensors"))
    with pytest.raises(CheckpointError, match="t9"):
        open_weights(shards)


def test_a_tensor_in_two_shards_is_refused(shards: Path) -> None:
    write_safetensors(shards / "model-00002-of-00003.safetensors", {"t1": torch.ones(1), "t0": torch.ones(1)})
    with pytest.raises(CheckpointError, match="'t0' is in two shards"):
        open_weights(shards)


@pytest.mark.parametrize(
    "name",
    [
        *("../w.safetensors", "/etc/w.safetensors", "a/w.safetensors", "a\\w.safetensors", "..", ".", ""),
        *("w\n.safetensors", "w.bin", "w\0.safetensors", "\ud800.safetensors"),
    ],
)
def test_an_index_may_name_only_plain_files(shards: Path, name: str) -> None:
    write_safetensors(shards.parent / "w.safetensors", {"t0": torch.ones(1)})
    edit_index(shards, lambda index: index["weight_map"].update(t0=name))
    with pytest.raises(FileFormatError, match="not a plain file name"):
        open_weights(shards)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"a":1,"a":2}'])
def test_a_bad_index_is_refused(shards: Path, index: str) -> None:
    (shards / "model.safetensors.index.json").write_text(index)
    with pytest.raises(FileFormatError):
        open_weights(shards)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(1)})
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).symlink_to("../secret.safetensors")
    with pytest.raises(FileFormatError, match="leads out of its folder"):
        open_weights(folder)


def test_links_inside_the_folder_and_a_linked_folder_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(folder / "data.safetensors", {"a": torch.ones(1)})
    (folder / "model.safetensors").symlink_to("data.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert open_weights(tmp_path / "link").tensors.keys() == {"a"}


def test_a_hub_cache_snapshot_links_to_its_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_safetensors(repo / "blobs" / "abc", {"a": torch.ones(1)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert open_weights(snapshot).tensor("a").item() == 1
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../../elsewhere")
    with pytest.raises(FileFormatError, match="leads out"):
        open_weights(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_a_folder_of_pickles_is_refused_with_the_way_out(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match="only pickled weights") as caught:
        open_weights(tmp_path)
    assert "safetensors" in str(caught.value.remedy)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        open_weights(tmp_path)
    write_safetensors(tmp_path / "adapter.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path)
    assert "adapter.safetensors" in str(caught.value.remedy)


# --- writing ------------------------------------------------------------------------------------------------------


def test_any_strides_are_written_in_order(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"turned": base.T, "step": base[:, ::2], "wide": torch.ones(1, 3).expand(2, 3), "row": base[1]}
    (path,) = write_safetensors(tmp_path / "w.safetensors", tensors)
    weights = open_weights(path)
    assert all(torch.equal(weights.tensor(name), tensor) for name, tensor in tensors.items())


def test_parts_of_one_storage_are_tensors_in_their_own_right(tmp_path: Path) -> None:
    q, k, v = torch.arange(12.0).reshape(6, 2).chunk(3)
    (path,) = write_safetensors(tmp_path / "w.safetensors", {"q": q, "k": k, "v": v})
    assert torch.equal(open_weights(path).tensor("v"), v)


def test_tied_tensors_are_refused_by_both_names(tmp_path: Path) -> None:
    w = torch.ones(4, 2)
    for twin in (w, w.T, w.view(8)):
        with pytest.raises(CheckpointError, match=r"'embed' and 'head' are one tensor"):
            write_safetensors(tmp_path / "w.safetensors", {"embed": w, "head": twin})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.ones(2, dtype=torch.complex128)},
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2, 2).to_sparse()},
        {"__metadata__": torch.ones(2)},
        {"a\n": torch.ones(2)},
        {"\ud800": torch.ones(2)},
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError):
        write_safetensors(tmp_path / "w.safetensors", tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_single_file_is_replaced_and_shards_never_are(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(4), "b": torch.ones(4)}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"old": torch.ones(1)})
    write_safetensors(path, tensors)
    assert open_weights(path).tensors.keys() == {"a", "b"}
    with pytest.raises(StoreError, match="already there"):
        write_safetensors(path, tensors, max_shard_bytes=16)
    path.unlink()
    write_safetensors(path, tensors, max_shard_bytes=16)
    with pytest.raises(StoreError, match="already there"):
        write_safetensors(path, tensors, max_shard_bytes=16)
    assert open_weights(tmp_path).tensors.keys() == {"a", "b"}


@pytest.mark.parametrize("step", range(6))
def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    path = tmp_path / "old.safetensors"
    write_safetensors(path, {"old": torch.ones(1)})
    calls = iter(range(100))

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if next(calls) == step:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    # Two shards and an index: three fsyncs, then three renames; a single file: one of each.
    with pytest.raises(StoreError, match="No space left") as caught:
        write_safetensors(tmp_path / "m.safetensors", {"a": torch.ones(4), "b": torch.ones(4)}, None, 16)
    assert caught.value.remedy
    assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]
    if step < 2:
        calls = iter(range(100))
        with pytest.raises(StoreError, match="No space left"):
            write_safetensors(path, {"new": torch.ones(1)})
        assert open_weights(path).tensors.keys() == {"old"}
        assert [file.name for file in tmp_path.iterdir()] == ["old.safetensors"]


def test_an_unwritable_place_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("no/such/folder", "file"):
        with pytest.raises(StoreError, match="cannot write the weights"):
            write_safetensors(tmp_path / place / "w.safetensors", {"a": torch.ones(1)})


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []
