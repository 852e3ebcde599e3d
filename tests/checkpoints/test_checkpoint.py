"""Folders and files that make no model: each is refused in words that name what is wrong, and nothing else escapes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.finite import is_finite
from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.save import save_checkpoint
from craton.checkpoints.weights import QuantizedTensor
from craton.errors import CheckpointError, CratonError, FileFormatError
from craton.models import build

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 64,
}
NEOX: dict[str, Any] = {**LLAMA, "architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 1.0}
BERT: dict[str, Any] = {**LLAMA, "architectures": ["BertModel"], "type_vocab_size": 2}


def write(folder: Path, config: Mapping[str, Any] = LLAMA) -> Path:
    """A sound folder: random weights for `config`."""
    family = family_of(config, "test")
    save_checkpoint(build(family.config(Keys(config, "test"))), family, folder)
    return folder


def change_config(folder: Path, **values: Any) -> Path:
    """Write keys of config.json; None takes one away."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def change_weights(folder: Path, **values: Tensor | None) -> Path:
    """Write tensors, with "__" for "."; None takes one away."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in values.items()}
    save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, path)
    return folder


def refusal(path: Path, kind: type[CratonError] = CheckpointError) -> CratonError:
    with pytest.raises(CratonError) as caught:
        Checkpoint.open(path).load(torch.float32)
    assert type(caught.value) is kind
    assert caught.value.exit_status == 2
    assert str(path) in (caught.value.where or "")
    return caught.value


@pytest.mark.parametrize("config", [LLAMA, GPT2, NEOX, BERT], ids=["llama", "gpt2", "neox", "bert"])
def test_a_sound_folder_opens(tmp_path, config):
    folder = write(tmp_path, config)
    assert not any(parameter.requires_grad for parameter in Checkpoint.open(folder).load(torch.float32).parameters())
    Checkpoint.open(folder / "model.safetensors").load(torch.bfloat16)


# --- config.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, [], {}, "LlamaForCausalLM", [7]])
def test_a_config_without_an_architecture(tmp_path, value):
    error = refusal(change_config(write(tmp_path), architectures=value))
    assert "does not say which architecture" in error.what
    assert "LlamaForCausalLM" in error.remedy


def test_an_unknown_architecture(tmp_path):
    error = refusal(change_config(write(tmp_path), architectures=["LamaForCausalLM"]))
    assert "unknown architecture 'LamaForCausalLM', did you mean 'LlamaForCausalLM'" in error.what
    assert "BertModel, " in error.remedy


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 200_000, '{"a": 1', "architectures: [LlamaForCausalLM]", "[]", "7", "null", '"config"'],
    ids=lambda text: text[:10],
)
def test_a_config_that_is_no_json_object(tmp_path, text):
    (write(tmp_path) / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path, FileFormatError).what


def test_a_config_that_is_not_text(tmp_path):
    (write(tmp_path) / "config.json").write_bytes(b"\xff\xfe\x00")
    assert "config.json is not valid JSON" in refusal(tmp_path, FileFormatError).what


def test_a_config_that_is_a_folder(tmp_path):
    (write(tmp_path) / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    assert "config.json cannot be read" in refusal(tmp_path, FileFormatError).what


def test_no_config(tmp_path):
    (write(tmp_path) / "config.json").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(CheckpointError, match=r"no config\.json"):
            Checkpoint.open(path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "16"}, "'hidden_size' must be of type int, not '16'"),
        ({"hidden_size": 16.0}, "'hidden_size' must be of type int"),
        ({"hidden_size": True}, "'hidden_size' must be of type int"),
        ({"tie_word_embeddings": 1}, "'tie_word_embeddings' must be of type bool"),
        ({"rms_norm_eps": -1e-5}, "greater than 0"),
        ({"rms_norm_eps": float("nan")}, "the config makes no model"),
        ({"hidden_size": 0}, "a head of 0"),
        ({"hidden_size": 18}, "not a multiple of num_attention_heads"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"intermediate_size": -1}, "greater than 0"),
        ({"vocab_size": 0}, "greater than 0"),
        ({"max_position_embeddings": 0}, "greater than 0"),
        ({"num_hidden_layers": 0}, "not a number of layers"),
        ({"num_hidden_layers": -2}, "not a number of layers"),
        ({"num_hidden_layers": 10**12}, "not a number of layers"),
        ({"hidden_act": "gelu_9"}, "unknown activation 'gelu_9'"),
        ({"rope_parameters": {"rope_type": "llama4", "rope_theta": 1e4}}, "unknown rope scaling 'llama4'"),
    ],
)
def test_a_value_that_makes_no_model(tmp_path, values, words):
    values = {"head_dim": None, "rope_parameters": None, **values}
    assert words in str(refusal(change_config(write(tmp_path), **values)))


@pytest.mark.parametrize("size", [10**6, 10**12, 10**18, 10**30])
@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "head_dim"])
def test_an_absurd_size_allocates_nothing(tmp_path, key, size):
    error = refusal(change_config(write(tmp_path), **{key: size}))
    assert "alloc" not in error.what
    assert "\n" not in error.what


def test_more_layers_than_the_file_has(tmp_path):
    error = refusal(change_config(write(tmp_path), num_hidden_layers=10_000))
    assert "89982 tensors are missing: model.layers.10.input_layernorm.weight" in error.what


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.integers(-3, 40),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor"]), st.integers(-2, 8), max_size=3),
)
FOLDERS: dict[str, dict[str, Any]] = {"llama": LLAMA, "gpt2": GPT2, "bert": BERT}


@pytest.mark.parametrize("name", FOLDERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_config_makes_anything_but_our_errors_escape(tmp_path, name, data):
    if not (tmp_path / "config.json").exists():
        write(tmp_path, FOLDERS[name])
    config = json.loads((tmp_path / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config.keys() - {"architectures"})))
    checkpoint_config = {**config, key: data.draw(VALUES)}
    other = tmp_path / "changed"
    other.mkdir(exist_ok=True)
    (other / "config.json").write_text(json.dumps(checkpoint_config))
    (other / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    with contextlib.suppress(CratonError):
        Checkpoint.open(other).load(torch.float32)


# --- weights ------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path):
    gone = {f"model__layers__{n}__mlp__{part}_proj__weight": None for n in range(2) for part in ("gate", "up", "down")}
    error = refusal(change_weights(write(tmp_path), **gone))
    assert error.what.startswith("6 tensors are missing: model.layers.0.mlp.down_proj.weight, ")
    assert error.what.endswith(" and 1 more")


def test_surplus_tensors_are_named(tmp_path):
    error = refusal(change_weights(write(tmp_path), model__layers__0__mlp__up_proj__bias=torch.zeros(24)))
    assert error.what == "1 tensors have no place in LlamaForCausalLM: model.layers.0.mlp.up_proj.bias"


@pytest.mark.parametrize(
    ("config", "name", "shape", "wanted"),
    [
        (LLAMA, "model.layers.1.self_attn.k_proj.weight", (8, 12), [8, 16]),
        (LLAMA, "model.layers.1.self_attn.k_proj.weight", (8, 16, 1), [8, 16]),
        (LLAMA, "model.norm.weight", (17,), [16]),
        (LLAMA, "model.norm.weight", (), [16]),
        (GPT2, "h.0.attn.c_attn.weight", (48, 16), [16, 48]),
        (GPT2, "h.0.attn.c_attn.bias", (47,), [48]),
        (GPT2, "h.0.mlp.c_fc.weight", (64, 16), [16, 64]),
        (NEOX, "gpt_neox.layers.0.attention.query_key_value.weight", (50, 16), [48, 16]),
        (NEOX, "gpt_neox.layers.0.attention.query_key_value.bias", (96,), [48]),
        (BERT, "embeddings.token_type_embeddings.weight", (3, 16), [2, 16]),
    ],
)
def test_a_tensor_of_another_shape_is_named(tmp_path, config, name, shape, wanted):
    folder = change_weights(write(tmp_path, config), **{name.replace(".", "__"): torch.ones(shape)})
    error = refusal(folder)
    assert error.what == f"tensor {name!r} has shape {list(shape)}, the config asks for {wanted}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path, value, dtype, name):
    weight = torch.ones((16,) if "norm" in name else (32, 16), dtype=dtype)
    weight.view(-1)[-1] = value
    error = refusal(change_weights(write(tmp_path), **{name.replace(".", "__"): weight}))
    assert error.what == f"tensor {name!r} holds NaN or infinite values"


BLOCKS = [GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q8_0]
SUPER_BLOCKS = [GGMLType.Q2_K, GGMLType.Q3_K, GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K]


@pytest.mark.parametrize("kind", BLOCKS + SUPER_BLOCKS)
@pytest.mark.parametrize("bits", [0x7E00, 0xFC00], ids=["NaN", "-infinity"])
def test_the_scales_of_blocks_tell_what_all_their_numbers_tell(kind, bits):
    blocks = np.random.default_rng(0).integers(0, 256, (3, 2 * kind.block_bytes), np.uint8)
    blocks.view("<u2")[:] &= 0xBBFF  # takes a bit off every exponent: read as fp16, none is NaN or infinite
    shape = (3, 2 * kind.block_size)
    assert is_finite(QuantizedTensor(kind, blocks, shape))
    refused = 0
    for place in range(kind.block_bytes):  # in halves, over the two blocks of a row
        damaged = blocks.copy()
        damaged.view("<u2")[1, place] = bits
        weight = QuantizedTensor(kind, damaged, shape)
        assert is_finite(weight) == bool(weight.dequantize().isfinite().all())
        refused += not is_finite(weight)
    assert refused in (2, 4)  # one scale, or a scale and a minimum, in each block


# --- what is no checkpoint ----------------------------------------------------------------------------------------


def test_a_folder_with_a_pickle_only(tmp_path):
    (write(tmp_path) / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin" in refusal(tmp_path).what


def test_a_folder_without_weights(tmp_path):
    (write(tmp_path) / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(tmp_path).what


@pytest.mark.parametrize("name", ["nothing", "nothing.safetensors", "nothing.gguf", "weights.gguf"])
def test_a_path_that_is_not_there_or_is_another_thing(tmp_path, name):
    (tmp_path / "weights.gguf").write_bytes(b"GGML and more bytes than the header of a file has")
    with pytest.raises(CratonError) as caught:
        Checkpoint.open(tmp_path / name)
    assert caught.value.exit_status == 2
    assert name in (caught.value.where or "")
