"""GGUF files as checkpoints: the files are written by the `gguf` package, under the names of its own table, and what
conversion changes is done here by hand as llama.cpp's conversion does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.weights import QuantizedLinear
from craton.models import PoolingConfig

TOLERANCE = 2e-4
SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

Tensors = dict[str, np.ndarray]


def write(path: Path, architecture: str, settings: Mapping[str, Any], tensors: Tensors, kind: str = "F32") -> Path:
    """Write with the peer's writer; matrices quantised by the peer's quantisers where `kind` says so."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, architecture)
    adders = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in settings.items():
        adders.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    for name, tensor in tensors.items():
        if kind != "F32" and tensor.ndim >= 2:
            type_ = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor, type_), raw_dtype=type_)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def named(model: Any, architecture: str) -> Tensors:
    """A model's tensors under the names that the peer's table gives them; the tied head is left out."""
    gguf = pytest.importorskip("gguf")
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    tied = getattr(model.config, "tie_word_embeddings", False)
    found = {
        table.get_name(name, (".weight", ".bias")): tensor.numpy()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight") and not name.startswith("pooler.")
    }
    assert None not in found
    return found


def common(config: Any, **more: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    } | more


def interleave(tensors: Tensors, config: Any) -> Tensors:
    """The rows of q and k, from rotary halves to rotary pairs."""

    def pairs(tensor: np.ndarray, heads: int) -> np.ndarray:
        rest = tensor.shape[1:]
        return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    part = {name: name.split(".")[-2] for name in tensors}
    return {name: pairs(t, heads[part[name]]) if part[name] in heads else t for name, t in tensors.items()}


def plus_one(tensors: Tensors) -> Tensors:
    return {name: tensor + 1 if "norm" in name else tensor for name, tensor in tensors.items()}


def stacked(model: Any, architecture: str) -> Tensors:
    """`named` for a mixture of experts; transformers keeps each layer's experts in two stacks."""
    gguf = pytest.importorskip("gguf")
    state = model.state_dict()
    tensors: Tensors = {}
    for number in range(model.config.num_hidden_layers):
        at, blk = f"model.layers.{number}.mlp", f"blk.{number}"
        gate, up = state.pop(f"{at}.experts.gate_up_proj").chunk(2, 1)
        tensors[f"{blk}.ffn_gate_exps.weight"], tensors[f"{blk}.ffn_up_exps.weight"] = gate.numpy(), up.numpy()
        tensors[f"{blk}.ffn_down_exps.weight"] = state.pop(f"{at}.experts.down_proj").numpy()
        tensors[f"{blk}.ffn_gate_inp.weight"] = state.pop(f"{at}.gate.weight").numpy()
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    table = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    return tensors | {table.get_name(name, (".weight",)): tensor.numpy() for name, tensor in state.items()}


@pytest.fixture
def check(random_model: Callable, assert_close: Callable, tmp_path: Path) -> Callable[..., Checkpoint]:
    """check(config, write_file, length): logits of the file that write_file(model, path) writes, against the model."""

    def compare(config: Any, write_file: Callable[[Any, Path], Path], length: int = 40) -> Checkpoint:
        theirs = random_model(config)
        checkpoint = Checkpoint.open(write_file(theirs, tmp_path / "model.gguf"))
        ours = checkpoint.load(torch.float32)
        ids = torch.randint(0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            outputs = theirs(ids[None])
            expected = outputs.logits if "logits" in outputs else outputs.last_hidden_state
            assert_close(ours(ids, torch.arange(length)), expected[0], TOLERANCE)
        return checkpoint

    return compare


def llama(**changes: Any) -> Any:
    return pytest.importorskip("transformers").LlamaConfig(**{**SMALL, **changes})


def write_llama(model: Any, path: Path, **more: Any) -> Path:
    settings = common(model.config, **more)
    return write(path, "llama", settings, interleave(named(model, "llama"), model.config))


@pytest.mark.peer
def test_llama(check):
    checkpoint = check(llama(), write_llama)
    assert checkpoint.hf["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.hf["rms_norm_eps"] == 1e-6  # and not the fp32 number's 9.99999997e-07


@pytest.mark.peer
def test_llama_tied_with_biases_and_a_head_size_of_its_own(check):
    config = llama(head_dim=32, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    sizes = {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}
    checkpoint = check(config, lambda model, path: write_llama(model, path, **sizes))
    assert checkpoint.config.tied


@pytest.mark.peer
def test_llama_with_the_same_number_of_heads_given_for_every_layer(check):
    more = {"attention.head_count": [4, 4, 4], "attention.head_count_kv": [2, 2, 2]}
    check(llama(), lambda model, path: write_llama(model, path, **more))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.peer
@pytest.mark.parametrize("said", [True, False], ids=["original context said", "original context left unsaid"])
def test_llama3_scaling_is_recognised_in_its_factors(check, said):
    original = 64 if said else 8192
    config = llama(rope_parameters={**LLAMA3, "original_max_position_embeddings": original})

    def write_file(model: Any, path: Path) -> Path:
        dims = SMALL["hidden_size"] // SMALL["num_attention_heads"]
        wavelengths = 2 * math.pi * 500000.0 ** (np.arange(0, dims, 2) / dims)
        smooth = np.clip((original / wavelengths - 1) / 3, 0, 1)
        tensors = interleave(named(model, "llama"), model.config)
        tensors["rope_freqs.weight"] = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
        more = {"rope.scaling.original_context_length": original} if said else {}
        return write(path, "llama", common(model.config, **more), tensors)

    checkpoint = check(config, write_file, 100)
    scaling = checkpoint.config.trunk.layers[0].attention.rotary.scaling
    assert (scaling.kind, scaling.factor, scaling.original_context) == ("llama3", 8.0, original)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("rope", "settings"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
        ({"rope_type": "linear", "factor": 4.0}, {"scale_linear": 4.0}),
        ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "attention_factor": 1.5 * (1 + 0.1 * math.log(4.0)),
                "beta_fast": 16.0,
                "beta_slow": 2.0,
            },
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 32,
                "scaling.attn_factor": 1.5,
                "scaling.yarn_beta_fast": 16.0,
                "scaling.yarn_beta_slow": 2.0,
            },
        ),
    ],
    ids=["linear", "linear, as files before said it", "none", "yarn", "yarn with everything"],
)
def test_rope_scaling(check, rope, settings):
    config = llama(rope_parameters={"rope_theta": 10000.0, **rope})
    more = {f"rope.{key}": value for key, value in settings.items()}
    check(config, lambda model, path: write_llama(model, path, **more), 100)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_block_quantised_matrices_stay_packed(random_model, assert_close, tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    model = random_model(llama())
    tensors = interleave(named(model, "llama"), model.config)
    path = write(tmp_path / "model.gguf", "llama", common(model.config), tensors, kind)
    type_ = gguf.GGMLQuantizationType[kind]
    for parameter in model.parameters():
        if parameter.dim() == 2:
            blocks = gguf.quants.quantize(parameter.numpy(), type_)
            parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, type_))
    checkpoint = Checkpoint.open(path)
    ids = torch.arange(40)
    expected = model(ids[None]).logits[0]
    packed = checkpoint.load(torch.float32, packed=True)
    assert isinstance(packed.trunk.layers[0].attention.q, QuantizedLinear)
    assert_close(packed(ids, ids), expected, TOLERANCE)
    assert_close(checkpoint.load(torch.float32)(ids, ids), expected, TOLERANCE)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_mixtral_is_a_llama_with_experts(random_model, assert_close, tmp_path, kind):
    transformers, gguf = pytest.importorskip("transformers"), pytest.importorskip("gguf")
    model = random_model(transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    settings = common(model.config, expert_count=4, expert_used_count=2)
    tensors = interleave(stacked(model, "llama"), model.config)
    checkpoint = Checkpoint.open(write(tmp_path / "model.gguf", "llama", settings, tensors, kind))
    assert checkpoint.hf["architectures"] == ["MixtralForCausalLM"]
    if kind != "F32":
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                blocks = gguf.quants.quantize(parameter.numpy(), gguf.GGMLQuantizationType[kind])
                parameter.data = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind]))
    ids = torch.arange(40)
    ours = checkpoint.load(torch.float32, packed=True)
    assert_close(ours(ids, ids), model(ids[None]).logits[0], TOLERANCE)


@pytest.mark.peer
def test_qwen2(check):
    config = pytest.importorskip("transformers").Qwen2Config(**SMALL)
    check(config, lambda model, path: write(path, "qwen2", common(model.config), named(model, "qwen2")))


@pytest.mark.peer
def test_qwen3(check):
    config = pytest.importorskip("transformers").Qwen3Config(**SMALL, head_dim=32)
    settings = common(config, **{"attention.key_length": 32, "attention.value_length": 32})
    check(config, lambda model, path: write(path, "qwen3", settings, named(model, "qwen3")))


@pytest.mark.peer
def test_qwen3_moe(check):
    config = pytest.importorskip("transformers").Qwen3MoeConfig(
        **SMALL, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True
    )
    more = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    settings = common(config, **{"attention.key_length": 32, "attention.value_length": 32}, **more)
    check(config, lambda model, path: write(path, "qwen3moe", settings, stacked(model, "qwen3moe")))


@pytest.mark.peer
def test_gemma(check):
    config = pytest.importorskip("transformers").GemmaConfig(**SMALL, head_dim=32)
    settings = common(config, **{"attention.key_length": 32, "attention.value_length": 32})
    check(config, lambda model, path: write(path, "gemma", settings, plus_one(named(model, "gemma"))))


@pytest.mark.peer
def test_gemma2(check):
    config = pytest.importorskip("transformers").Gemma2Config(
        **SMALL, head_dim=32, query_pre_attn_scalar=32, sliding_window=16
    )
    settings = common(config, **{"attention.key_length": 32, "attention.value_length": 32})
    settings |= {"attention.sliding_window": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    checkpoint = check(config, lambda model, path: write(path, "gemma2", settings, plus_one(named(model, "gemma2"))))
    assert [layer.attention.window for layer in checkpoint.config.trunk.layers] == [16, None, 16]


@pytest.mark.peer
@pytest.mark.parametrize("stretched", [False, True])
def test_gemma3(check, stretched):
    local, everywhere = {"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "default", "rope_theta": 1e6}
    settings: dict[str, Any] = {"attention.sliding_window": 16}
    if stretched:
        everywhere |= {"rope_type": "linear", "factor": 8.0}
        settings |= {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    config = pytest.importorskip("transformers").Gemma3TextConfig(
        **{**SMALL, "num_hidden_layers": 7},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        rope_parameters={"sliding_attention": local, "full_attention": everywhere},
    )
    settings |= common(config, **{"attention.key_length": 32, "attention.value_length": 32})
    checkpoint = check(config, lambda model, path: write(path, "gemma3", settings, plus_one(named(model, "gemma3"))))
    assert [layer.attention.window for layer in checkpoint.config.trunk.layers] == [16, 16, 16, 16, 16, None, 16]


@pytest.mark.peer
def test_phi3(check):
    config = pytest.importorskip("transformers").Phi3Config(**SMALL, pad_token_id=0, sliding_window=24)
    settings = common(config, **{"attention.sliding_window": 24, "rope.dimension_count": 16})
    check(config, lambda model, path: write(path, "phi3", settings, named(model, "phi3")))


@pytest.mark.peer
@pytest.mark.parametrize("length", [40, 100], ids=["short", "long"])
def test_phi3_with_longrope_on_a_part_of_each_head(check, length):
    short, long = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    config = pytest.importorskip("transformers").Phi3Config(
        **SMALL,
        pad_token_id=0,
        original_max_position_embeddings=64,
        rope_parameters={**rope, "short_factor": short, "long_factor": long},
    )

    def write_file(model: Any, path: Path) -> Path:
        more = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 64, "attention.sliding_window": 0}
        more["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(128 / 64) / math.log(64))
        tensors = named(model, "phi3")
        tensors["rope_factors_short.weight"] = np.array(short, np.float32)
        tensors["rope_factors_long.weight"] = np.array(long, np.float32)
        return write(path, "phi3", common(config, **more), tensors)

    check(config, write_file, length)


@pytest.mark.peer
def test_olmo2(check):
    config = pytest.importorskip("transformers").Olmo2Config(**SMALL)
    check(config, lambda model, path: write(path, "olmo2", common(config), named(model, "olmo2")))


@pytest.mark.peer
def test_smollm3_has_no_positions_in_every_fourth_layer(check):
    config = pytest.importorskip("transformers").SmolLM3Config(**{**SMALL, "num_hidden_layers": 5}, pad_token_id=0)

    def write_file(model: Any, path: Path) -> Path:
        return write(path, "smollm3", common(config), interleave(named(model, "smollm3"), config))

    checkpoint = check(config, write_file)
    rotated = [layer.attention.rotary is not None for layer in checkpoint.config.trunk.layers]
    assert rotated == [True, True, True, False, True]


@pytest.mark.peer
@pytest.mark.parametrize("doubled", [False, True], ids=["", "with the embedding as the head as well"])
def test_gpt2(check, doubled):
    config = pytest.importorskip("transformers").GPT2Config(
        vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    )

    def write_file(model: Any, path: Path) -> Path:
        tensors = {
            name: tensor.T
            if name.endswith(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"))
            else tensor
            for name, tensor in named(model, "gpt2").items()
        }
        if doubled:
            tensors["output.weight"] = tensors["token_embd.weight"].copy()
        settings = {
            "context_length": 64,
            "embedding_length": 64,
            "block_count": 3,
            "feed_forward_length": 256,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": 1e-5,
        }
        return write(path, "gpt2", settings, {name: np.ascontiguousarray(t) for name, t in tensors.items()})

    check(config, write_file)


@pytest.mark.peer
@pytest.mark.parametrize("parallel", [True, False])
def test_gpt_neox(check, parallel):
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = pytest.importorskip("transformers").GPTNeoXConfig(
        **sizes, rotary_pct=0.5 if parallel else 1.0, use_parallel_residual=parallel
    )

    def write_file(model: Any, path: Path) -> Path:
        def parts_first(tensor: np.ndarray) -> np.ndarray:
            return tensor.reshape(4, 3, 16, *tensor.shape[1:]).swapaxes(0, 1).reshape(tensor.shape)

        tensors = {n: parts_first(t) if "attn_qkv" in n else t for n, t in named(model, "gptneox").items()}
        settings = {
            "context_length": 128,
            "embedding_length": 64,
            "block_count": 3,
            "feed_forward_length": 96,
            "attention.head_count": 4,
            "attention.layer_norm_epsilon": config.layer_norm_eps,
            "rope.dimension_count": 8 if parallel else 16,
            "use_parallel_residual": parallel,
        }
        return write(path, "gptneox", settings, tensors)

    check(config, write_file)


@pytest.mark.peer
def test_bert_and_its_pooling(check):
    sizes = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    config = pytest.importorskip("transformers").BertConfig(**sizes)
    settings = {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-12,
        "attention.causal": False,
        "pooling_type": 2,
    }
    checkpoint = check(config, lambda model, path: write(path, "bert", settings, named(model, "bert")))
    assert checkpoint.pooling == PoolingConfig(mode="cls")


# --- the real model -----------------------------------------------------------------------------------------------

SENTENCE = "The craton is the old and stable part of a continent, and everything else is built on it."


def test_smollm2_opens(smollm2_gguf):
    checkpoint = Checkpoint.open(smollm2_gguf)
    assert checkpoint.hf["architectures"] == ["LlamaForCausalLM"]
    assert checkpoint.quantized_kinds() == {"Q4_1", "Q8_0"}
    config = checkpoint.config
    assert (config.vocab, config.context, config.tied, len(config.trunk.layers)) == (49152, 8192, True, 30)


@pytest.mark.peer
@pytest.mark.slow
def test_smollm2_against_transformers(smollm2_gguf, assert_close):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    checkpoint = Checkpoint.open(smollm2_gguf)
    ids = torch.tensor(checkpoint.tokenizer().encode(SENTENCE))
    with torch.inference_mode():
        expected = theirs(ids[None]).logits[0]
        ours = checkpoint.load(torch.float32)(ids, torch.arange(len(ids)))
        packed = checkpoint.load(torch.float32, packed=True)(ids, torch.arange(len(ids)))
    assert_close(ours, expected, TOLERANCE)
    assert_close(packed, expected, TOLERANCE)
