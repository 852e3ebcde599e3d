import gc
import os
from pathlib import Path

import numpy as np
import pytest

from craton.checkpoints.gguf import GGMLType, GGUFFile, TensorSource, quantize, write_gguf
from craton.errors import FileFormatError, UnknownName

VALUES = np.arange(64, dtype=np.float32).reshape(2, 32)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.gguf"
    sources = [
        TensorSource("w", VALUES.shape, GGMLType.F32, lambda: quantize(VALUES, GGMLType.F32)),
        TensorSource("activations", (32,), GGMLType.Q8_1, lambda: np.zeros((1, 36), np.uint8)),
    ]
    write_gguf(path, {"general.architecture": "llama"}, sources)
    return path


def test_blocks_are_a_read_only_view_that_outlives_the_file(small: Path) -> None:
    with GGUFFile.open(small) as file:
        blocks = file.blocks("w")
    assert blocks.shape == (2, 128)
    assert not blocks.flags.writeable
    np.testing.assert_array_equal(blocks.view("<f4"), VALUES)
    gc.collect()
    assert blocks[0, 3] == 0


def test_arrays_are_the_callers_own(small: Path) -> None:
    with GGUFFile.open(small) as file:
        array = file.array("w")
        array += 1
        np.testing.assert_array_equal(file.array("w"), VALUES)


def test_closing_frees_the_mapping(small: Path) -> None:
    def mapped() -> bool:
        return str(small) in Path("/proc/self/maps").read_text()

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc to see the mappings")
    with GGUFFile.open(small) as file:
        file.array("w")
        assert mapped()
    assert not mapped()


def test_an_unknown_tensor_suggests_the_near_ones(small: Path) -> None:
    with GGUFFile.open(small) as file, pytest.raises(UnknownName, match="unknown tensor 'activation'") as caught:
        file.array("activation")
    assert caught.value.remedy == "did you mean 'activations'?"


def test_a_type_for_activations_has_blocks_but_no_array(small: Path) -> None:
    with GGUFFile.open(small) as file:
        assert file.blocks("activations").shape == (1, 36)
        with pytest.raises(FileFormatError, match="Q8_1 blocks cannot be dequantised"):
            file.array("activations")


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="No such file"):
        GGUFFile.open(tmp_path / "missing.gguf")
    with pytest.raises(FileFormatError, match="not a file"):
        GGUFFile.open(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="not a file"):
        GGUFFile.open(tmp_path / "pipe")
    (tmp_path / "empty").touch()
    with pytest.raises(FileFormatError, match="the file is empty"):
        GGUFFile.open(tmp_path / "empty")
    with pytest.raises(FileFormatError, match="cannot open the file"):
        GGUFFile.open("a\0b")


@pytest.mark.peer
def test_a_file_of_the_peers_writer_is_read(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "peer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_tensor("a", VALUES)
    writer.add_tensor(
        "b", gguf.quants.quantize(VALUES, gguf.GGMLQuantizationType.Q5_1), raw_dtype=gguf.GGMLQuantizationType.Q5_1
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile.open(path) as file:
        assert file.alignment == 64
        assert file.metadata["llama.block_count"] == 2
        assert file.metadata["tokenizer.ggml.scores"] == [0.5, -1.0]
        np.testing.assert_array_equal(file.array("a"), VALUES)
        assert file.tensors["b"].type is GGMLType.Q5_1
        np.testing.assert_allclose(file.array("b"), VALUES, atol=0.6)


@pytest.mark.peer
def test_a_real_file_reads_as_the_peer_reads_it(smollm2_gguf: Path) -> None:
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(smollm2_gguf)
    with GGUFFile.open(smollm2_gguf) as file:
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 49_152
        for key, typed in file.typed_metadata.items():
            assert fields[key].contents() == typed.value, key
            assert int(fields[key].types[-1]) == typed.type.id, key
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        compared = {"token_embd.weight", "output_norm.weight", "blk.0.attn_q.weight", "blk.29.ffn_down.weight"}
        for tensor in reader.tensors:
            assert file.tensors[tensor.name].shape == tuple(int(size) for size in tensor.shape[::-1])
            if tensor.name in compared:
                theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                np.testing.assert_array_equal(file.array(tensor.name), theirs)
        assert {file.tensors[name].type for name in compared} == {GGMLType.Q8_0, GGMLType.F32, GGMLType.Q4_1}
