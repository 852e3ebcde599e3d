"""CTranslate2's model.bin: written here by the format's description, read back, and lied to."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.ctranslate2 import VariableFile
from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.whisper import read_config
from craton.errors import CheckpointError, FileFormatError
from craton.models import Seq2Seq, build

CONFIG = {
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": 60,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_source_positions": 10,
    "max_target_positions": 12,
}


@pytest.fixture(scope="module")
def model() -> Seq2Seq:
    torch.manual_seed(0)
    made = build(read_config(Keys(CONFIG, "test")))
    assert isinstance(made, Seq2Seq)
    for parameter in made.parameters():
        parameter.data = parameter.data.half().float()
    return made.requires_grad_(False)


def variables(model: Seq2Seq) -> dict[str, np.ndarray]:
    """The model's tensors as CTranslate2 names and joins them."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    found = {
        "encoder/conv1/weight": state["front.conv1.weight"],
        "encoder/conv1/bias": state["front.conv1.bias"],
        "encoder/conv2/weight": state["front.conv2.weight"],
        "encoder/conv2/bias": state["front.conv2.bias"],
        "decoder/embeddings/weight": state["embedding.weight"],
        "decoder/activation": np.int8(3),
        "decoder/pre_norm": np.int8(1),
        "decoder/scale_embeddings": np.int8(0),
    }

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    def linear(theirs: str, *ours: str) -> None:
        found[f"{theirs}/weight"] = np.concatenate([state[f"{o}.weight"] for o in ours])
        rows = [len(state[f"{o}.weight"]) for o in ours]
        biases = [state.get(f"{o}.bias", np.zeros(n, np.float32)) for o, n in zip(ours, rows, strict=True)]
        found[f"{theirs}/bias"] = np.concatenate(biases)

    for side, layers in (("encoder", 1), ("decoder", 2)):
        found[f"{side}/num_heads"] = np.int16(4)
        found[f"{side}/position_encodings/encodings"] = state[f"{side}.positions.weight"]
        norm(f"{side}/layer_norm", f"{side}.final_norm")
        for i in range(layers):
            theirs, ours = f"{side}/layer_{i}", f"{side}.layers.{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.attention_norm.input")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.feedforward_norm.input")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.attention.{p}" for p in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.attention.o")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.feedforward.up")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.feedforward.down")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.cross_attention_norm.input")
                linear(f"{theirs}/attention/linear_0", f"{ours}.cross_attention.q")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.cross_attention.{p}" for p in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.cross_attention.o")
    return found


def name(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def as_file(found: dict[str, np.ndarray], kind: str, spec: str = "WhisperSpec", version: int = 6) -> bytes:
    """model.bin, floats in `kind`: F32, F16, BF16, or I8 for the matrices."""
    stored: dict[str, tuple[np.ndarray, int]] = {}
    for key, value in found.items():
        if value.dtype == np.int8:
            stored[key] = (value, 1)
        elif value.dtype == np.int16:
            stored[key] = (value, 2)
        elif kind == "I8" and value.ndim == 2 and "encodings" not in key:
            scale = 127 / np.abs(value).max(1)
            stored[key] = (np.round(value * scale[:, None]).astype(np.int8), 1)
            stored[f"{key}_scale"] = (scale.astype(np.float32), 0)
        elif kind == "F16":
            stored[key] = (value.astype(np.float16), 4)
        elif kind == "BF16":
            stored[key] = (torch.from_numpy(value).bfloat16().view(torch.int16).numpy(), 5)
        else:
            stored[key] = (value.astype(np.float32), 0)
    out = struct.pack("<I", version) + name(spec) + struct.pack("<II", 3, len(stored))
    for key, (value, number) in stored.items():
        raw = value.tobytes()
        out += name(key) + struct.pack("<B", value.ndim) + struct.pack(f"<{value.ndim}I", *value.shape)
        out += struct.pack("<BI", number, len(raw)) + raw
    return out + struct.pack("<I", 1) + name("decoder/projection/weight") + name("decoder/embeddings/weight")


@pytest.mark.parametrize(("kind", "tolerance"), [("F32", 0), ("F16", 0), ("BF16", 0.004), ("I8", 0.01)])
def test_every_type(model, tmp_path, kind, tolerance):
    (tmp_path / "model.bin").write_bytes(as_file(variables(model), kind))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config == model.config
    loaded = checkpoint.load(torch.float32)
    for key, tensor in model.state_dict().items():
        found = loaded.state_dict()[key]
        assert (found - tensor).abs().max() <= tolerance * tensor.abs().max(), key
    assert checkpoint.stored_kind() == kind


def test_a_file_that_is_cut_anywhere(model, tmp_path):
    whole = as_file(variables(model), "F16")
    path = tmp_path / "model.bin"
    for size in [0, 1, 3, 4, 10, 22, 30, *range(40, len(whole), len(whole) // 150), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError):
            VariableFile(path)


@pytest.mark.parametrize(
    ("at", "value", "word"),
    [
        (0, struct.pack("<I", 3), "binary version 3"),
        (0, b"\x80\x02..", "pickle"),
        (0, b"PK\x03\x04", "pickle"),
        (22, struct.pack("<I", 1 << 31), "are allowed"),
    ],
)
def test_a_file_that_is_something_else(model, tmp_path, at, value, word):
    whole = bytearray(as_file(variables(model), "F16"))
    whole[at : at + len(value)] = value
    (tmp_path / "model.bin").write_bytes(whole)
    with pytest.raises(FileFormatError, match=word):
        VariableFile(tmp_path / "model.bin")


def test_sizes_that_lie(model, tmp_path):
    found = variables(model)
    whole = as_file(found, "F32")
    shape = struct.pack("<B2I", 2, 60, 16)
    assert whole.count(shape) == 1
    for lie in (
        struct.pack("<B2I", 2, 60, 17),
        struct.pack("<B2I", 2, 1 << 31, 1 << 31),
        struct.pack("<B2I", 9, 60, 16),
    ):
        (tmp_path / "model.bin").write_bytes(whole.replace(shape, lie))
        with pytest.raises(FileFormatError, match=r"embeddings/weight"):
            VariableFile(tmp_path / "model.bin")


def test_another_kind_of_model(model, tmp_path):
    (tmp_path / "model.bin").write_bytes(as_file(variables(model), "F16", spec="TransformerDecoderSpec"))
    with pytest.raises(CheckpointError, match="TransformerDecoderSpec"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("gone", ["decoder/embeddings/weight", "decoder/layer_1/ffn/linear_0/weight"])
def test_a_missing_tensor_is_named(model, tmp_path, gone):
    found = variables(model)
    del found[gone]
    whole = as_file(found, "F16")
    if gone == "decoder/embeddings/weight":
        with pytest.raises(FileFormatError, match="not there"):
            _load(tmp_path, whole)
    else:
        with pytest.raises(CheckpointError, match="missing"):
            _load(tmp_path, whole)


def test_infinite_numbers_are_refused(model, tmp_path):
    found = variables(model)
    found["decoder/embeddings/weight"] = np.full((60, 16), np.inf, np.float32)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        _load(tmp_path, as_file(found, "F16"))


def test_the_store_knows_such_a_folder(model, tmp_path):
    from craton.checkpoints.sources import model_files

    (tmp_path / "model.bin").write_bytes(as_file(variables(model), "F16"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert model_files(tmp_path) == ["config.json", "model.bin"]


def _load(folder: Path, content: bytes) -> None:
    (folder / "model.bin").write_bytes(content)
    Checkpoint.open(folder).load(torch.float32)
