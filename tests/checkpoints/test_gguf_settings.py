"""What the settings and tensors of a GGUF file mean, and which make no model: tried on files of one layer of ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf import GGMLType, TensorSource, TypedValue, boolean, f32, quantize, string, u32, write_gguf
from craton.checkpoints.gguf_model import open_gguf_model
from craton.errors import CheckpointError, CratonError
from craton.trunk.positions import inverse_frequencies

SETTINGS: dict[str, TypedValue] = {
    "context_length": u32(128),
    "embedding_length": u32(64),
    "block_count": u32(1),
    "feed_forward_length": u32(96),
    "attention.head_count": u32(4),
    "attention.head_count_kv": u32(2),
    "attention.layer_norm_rms_epsilon": f32(1e-5),
}
SHAPES = {
    "token_embd.weight": (32, 64),
    "output_norm.weight": (64,),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (96, 64),
    "blk.0.ffn_up.weight": (96, 64),
    "blk.0.ffn_down.weight": (64, 96),
}


def small_file(
    folder: Path,
    *,
    architecture: str | None = "llama",
    settings: Mapping[str, TypedValue | None] | None = None,
    general: Mapping[str, TypedValue] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    kind: GGMLType = GGMLType.F32,
) -> Path:
    """A sound one-layer model of ones, but for what is given; None takes a key or a tensor away."""
    values = {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()} | dict(tensors or {})
    metadata = {f"{architecture}.{key}": value for key, value in {**SETTINGS, **(settings or {})}.items() if value}
    if architecture is not None:
        metadata["general.architecture"] = string(architecture)

    def source(name: str, array: np.ndarray) -> TensorSource:
        if array.ndim == 1:  # as they are, NaN as well
            return TensorSource(name, array.shape, GGMLType.F32, lambda: array.view(np.uint8))
        return TensorSource(name, array.shape, kind, lambda: quantize(array.reshape(-1, array.shape[-1]), kind))

    path = folder / "model.gguf"
    write_gguf(path, metadata | dict(general or {}), [source(n, a) for n, a in values.items() if a is not None])
    return path


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def refusal(path: Path) -> CratonError:
    with pytest.raises(CratonError) as caught:
        Checkpoint.open(path).load(torch.float32)
    assert isinstance(caught.value, CheckpointError)
    assert caught.value.exit_status == 2
    return caught.value


def test_the_small_file_is_sound(tmp_path):
    Checkpoint.open(small_file(tmp_path)).load(torch.float32)


def test_other_rotary_factors_are_kept_as_they_are(tmp_path):
    factors = [1.0, 1.5, 1.25, 2.0, 3.0, 2.5, 9.0, 7.5]
    path = small_file(tmp_path, tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    rotary = Checkpoint.open(path).config.trunk.layers[0].attention.rotary
    plain = rotary.model_copy(update={"scaling": None})
    for long in (False, True):
        divisors = inverse_frequencies(plain) / inverse_frequencies(rotary, long)
        torch.testing.assert_close(divisors, torch.tensor(factors))
    assert rotary.scaling.attention_factor == 1.0


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_gemmas_largest_models_scale_scores_by_width_over_heads(tmp_path, architecture, layers):
    settings = {"block_count": u32(layers), "attention.key_length": u32(32), "attention.value_length": u32(32)}
    path = small_file(tmp_path, architecture=architecture, settings=settings)
    hf, _, _ = open_gguf_model(path)
    assert hf["query_pre_attn_scalar"] == 64 / 4


def test_an_unknown_architecture_is_named_with_its_neighbours(tmp_path):
    error = refusal(small_file(tmp_path, architecture="qwen33"))
    assert "unknown architecture 'qwen33', did you mean 'qwen3'" in error.what
    assert "gptneox, llama, olmo2" in error.remedy


def test_an_architecture_left_out_is_named(tmp_path):
    assert "'general.architecture'" in refusal(small_file(tmp_path, architecture=None)).what


@pytest.mark.parametrize("key", sorted(set(SETTINGS) - {"attention.head_count_kv"}))
def test_a_missing_setting_is_named(tmp_path, key):
    assert f"'llama.{key}'" in refusal(small_file(tmp_path, settings={key: None})).what


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"block_count": string("three")}, "'llama.block_count' must be of type int, not 'three'"),
        ({"embedding_length": f32(64.0)}, "'llama.embedding_length' must be of type int"),
        ({"attention.layer_norm_rms_epsilon": boolean(True)}, "must be of type float"),
        ({"attention.head_count": u32([4, 4, 2])}, "'llama.attention.head_count' differs from layer to layer"),
        ({"attention.head_count": u32([])}, "'llama.attention.head_count' differs from layer to layer"),
        ({"block_count": u32(0)}, "llama.block_count = 0 is not a number of layers"),
        ({"block_count": u32(4_000_000_000)}, "llama.block_count = 4000000000 is not a number of layers"),
        ({"attention.head_count": u32(0)}, "heads: Input should be greater than 0"),
        ({"attention.head_count_kv": u32(3)}, "cannot share 3 key-value heads"),
        ({"embedding_length": u32(0)}, "a head of 0"),
        ({"embedding_length": u32(65)}, "has shape [32, 64], the config asks for [32, 65]"),
        ({"embedding_length": u32(4_000_000_000)}, "the config makes no model"),
        ({"context_length": u32(0)}, "context"),
        ({"attention.key_length": u32(16), "attention.value_length": u32(8)}, "attention.value_length = 8"),
        ({"attention.clamp_kqv": f32(8.0)}, "llama.attention.clamp_kqv = 8.0 is not supported"),
        ({"attention.causal": boolean(False)}, "llama.attention.causal = False is not supported"),
        ({"attention.sliding_window": u32(64)}, "llama.attention.sliding_window = 64 is not supported"),
        ({"rope.scaling.type": string("dynamic")}, "unknown rope scaling 'dynamic'"),
        ({"rope.scaling.type": string("longrope")}, "'longrope' without its tensors"),
        ({"rope.dimension_count": u32(7)}, "not a number of pairs to rotate"),
        ({"rope.dimension_count": u32(64)}, "not a number of pairs to rotate"),
        ({"rope.freq_base": f32(-1.0)}, "theta"),
        ({"expert_count": u32(4)}, "'llama.expert_used_count'"),
    ],
)
def test_a_setting_that_makes_no_model_is_named(tmp_path, settings, words):
    assert words in str(refusal(small_file(tmp_path, settings=settings)))


def test_pooling_that_is_no_number_is_named(tmp_path):
    assert "'llama.pooling_type'" in refusal(small_file(tmp_path, settings={"pooling_type": string("mean")})).what


def test_rotary_factors_and_another_scaling_at_once_are_refused(tmp_path):
    scaling = {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(2.0)}
    path = small_file(tmp_path, settings=scaling, tensors={"rope_freqs.weight": ones(8)})
    assert "rope_freqs.weight and linear rope scaling at once" in refusal(path).what


def test_heads_and_their_size_follow_from_the_width_where_they_are_left_unsaid(tmp_path):
    rows = {f"blk.0.attn_{part}.weight": ones(64, 64) for part in ("k", "v")}
    path = small_file(
        tmp_path,
        architecture="qwen3",
        settings={"attention.head_count_kv": None},
        tensors=rows | {f"blk.0.attn_{part}_norm.weight": ones(16) for part in ("q", "k")},
    )
    attention = Checkpoint.open(path).config.trunk.layers[0].attention
    assert (attention.kv_heads, attention.head_size) == (4, 16)
    Checkpoint.open(path).load(torch.float32)


def test_experts_where_the_architecture_has_none_are_refused(tmp_path):
    error = refusal(small_file(tmp_path, architecture="qwen2", settings={"expert_count": u32(4)}))
    assert "'qwen2' with 4 experts" in error.what


def test_a_part_of_a_split_model_is_refused(tmp_path):
    error = refusal(small_file(tmp_path, general={"split.count": u32(3), "split.no": u32(0)}))
    assert "one of 3" in error.what
    assert "--merge" in error.remedy


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"token_embd.weight": None}, "no matrix 'token_embd.weight'"),
        ({"token_embd.weight": ones(64)}, "no matrix 'token_embd.weight'"),
        ({"blk.0.ffn_up.weight": None}, "missing: model.layers.0.mlp.up_proj.weight"),
        ({"blk.0.attn_sinks.weight": ones(4)}, "no place in LlamaForCausalLM: blk.0.attn_sinks.weight"),
        ({"blk.0.attn_k.scale": ones(1)}, "no place in LlamaForCausalLM: model.layers.0.self_attn.k_proj.scale"),
        ({"blk.1.attn_q.weight": ones(64, 64)}, "no place in LlamaForCausalLM: model.layers.1.self_attn.q_proj.weight"),
        ({"blk.00.attn_q.weight": ones(64, 64)}, "no place in LlamaForCausalLM"),
        ({"blk.0.attn_q.weight": ones(66, 64)}, "self_attn.q_proj.weight' has shape [66, 64]"),
        ({"blk.0.attn_q.weight": ones(64, 2, 32)}, "self_attn.q_proj.weight' has shape [64, 2, 32]"),
        ({"rope_freqs.weight": ones(4)}, "'rope_freqs.weight' must hold 8 positive rotary factors"),
        ({"rope_freqs.weight": ones(8) * np.nan}, "'rope_freqs.weight' must hold 8 positive rotary factors"),
        ({"rope_freqs.weight": -ones(8)}, "'rope_freqs.weight' must hold 8 positive rotary factors"),
        ({"rope_factors_long.weight": ones(8)}, "rotary factors in rope_factors_long.weight alone"),
    ],
)
def test_a_tensor_that_makes_no_model_is_named(tmp_path, tensors, words):
    assert words in str(refusal(small_file(tmp_path, tensors=tensors)))


def test_rotary_factors_where_the_architecture_has_none_are_refused(tmp_path):
    biases = {f"blk.0.attn_{part}.bias": ones(size) for part, size in (("q", 64), ("k", 32), ("v", 32))}
    path = small_file(tmp_path, architecture="qwen2", tensors={**biases, "rope_freqs.weight": ones(8)})
    assert "no place in Qwen2ForCausalLM: rope_freqs.weight" in refusal(path).what


@pytest.mark.parametrize("shape", [(3, 96, 64), (96, 64), (4, 64, 96)])
def test_a_stack_of_experts_of_another_shape_is_refused(tmp_path, shape):
    experts = {f"blk.0.ffn_{part}_exps.weight": ones(4, 96, 64) for part in ("gate", "up")}
    experts |= {"blk.0.ffn_down_exps.weight": ones(4, 64, 96), "blk.0.ffn_gate_inp.weight": ones(4, 64)}
    dense = {f"blk.0.ffn_{part}.weight": None for part in ("gate", "up", "down")}
    counts = {"expert_count": u32(4), "expert_used_count": u32(2)}
    Checkpoint.open(small_file(tmp_path, settings=counts, tensors=dense | experts)).load(torch.float32)
    path = small_file(tmp_path, settings=counts, tensors=dense | experts | {"blk.0.ffn_up_exps.weight": ones(*shape)})
    error = refusal(path)
    assert "ffn_up_exps" in error.what or "experts.0.w3" in error.what
    assert str(list(shape)) in error.what or str(list(shape[1:])) in error.what


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q8_0])
@pytest.mark.parametrize("packed", [True, False])
def test_a_block_with_a_scale_that_is_no_number_is_refused(tmp_path, kind, packed):
    path = small_file(tmp_path, kind=kind)
    checkpoint = Checkpoint.open(path)
    checkpoint.load(torch.float32, packed=packed)
    damaged = bytearray(path.read_bytes())
    place = checkpoint.source._file.tensors["blk.0.ffn_up.weight"].offset + 7 * kind.block_bytes
    damaged[place : place + 2] = b"\x00\x7e"  # NaN in fp16
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight' holds NaN"):
        Checkpoint.open(path).load(torch.float32, packed=packed)
