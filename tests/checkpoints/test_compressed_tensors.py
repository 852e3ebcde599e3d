"""Quantised checkpoints in the compressed-tensors layout: written, read back, and read by the library itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.compressed_tensors import save_quantized
from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.int_weight import IntWeight
from craton.checkpoints.weights import QuantizedLinear
from craton.errors import CheckpointError, CratonError, FileFormatError
from craton.models import AnyModel, build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size

Q, UP = "trunk.layers.0.attention.q", "trunk.layers.1.feedforward.up"
THEIR_Q = "model.layers.0.self_attn.q_proj"
ROUNDED_MINIMUM = {"Q4_1": 2.0**-11 * 16}  # of a scale: what fp16 does to a minimum of 15 of them

SMALL = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3, fused": ("Phi3Config", {"num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": None}),
    "gpt-neox, fused by head": ("GPTNeoXConfig", {}),
    "bert": ("BertConfig", {}),
    "mixtral": (
        "MixtralConfig",
        {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}

Rounder = Callable[..., IntWeight]


def new_model() -> AnyModel:
    shape = SizeOverrides(width=64, layers=2, heads=2, kv_heads=1, hidden=128)
    model = build(causal_config(size("0.1m", vocab=288, context=64, overrides=shape), 288, 64))
    initialise(model, 0)
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def model() -> AnyModel:
    return new_model()


def matrices(model: AnyModel) -> dict[str, Tensor]:
    """The weights of the linear layers in the trunk."""
    return {
        name: module.weight
        for name, module in model.named_modules()
        if name.startswith("trunk.") and isinstance(module, nn.Linear) and not name.endswith("router")
    }


def with_weights(model: AnyModel, quantized: dict[str, IntWeight]) -> AnyModel:
    """The model with the numbers that its integers stand for."""
    changed = build(model.config)
    changed.load_state_dict(model.state_dict())
    for name, weight in quantized.items():
        changed.get_submodule(name).weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return changed.requires_grad_(False).eval()


def outputs(model: AnyModel) -> Tensor:
    ids = torch.arange(30)
    return model(ids, ids)


# --- written and read back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64, 1 << 20], ids=["32", "64", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_come_back(model, round_weight, tmp_path, bits, group, symmetric):
    quantized = {name: round_weight(w, bits, group, symmetric) for name, w in matrices(model).items()}
    checkpoint = Checkpoint.open(save_quantized(model, LLAMA, tmp_path, quantized))
    kind = ("Q4_0" if symmetric else "Q4_1") if bits <= 4 else ("Q8_0" if symmetric else None)
    assert checkpoint.quantized_kinds() == ({kind} if kind else set())
    assert checkpoint.config == model.config
    assert checkpoint.plain_ends()
    assert not checkpoint.int8_activations
    packed, plain = checkpoint.load(torch.float32, packed=True), checkpoint.load(torch.float32)
    for name, weight in quantized.items():
        module, read = packed.get_submodule(name), plain.get_submodule(name).weight
        assert isinstance(module, QuantizedLinear) == (kind is not None)
        if kind is not None:
            assert module.quantized.kind.name == kind
            assert torch.equal(module.quantized.dequantize(), read)
        off, step = (read - weight.dequantize()).abs().max(), weight.scales_OG.float().max()
        assert off <= ROUNDED_MINIMUM.get(str(kind), 0) * step
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] not in quantized:
            assert torch.equal(plain.state_dict()[name], tensor)


@pytest.mark.peer
@pytest.mark.parametrize("name", FAMILIES)
def test_families(random_model, round_weight, assert_close, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    kind, more = FAMILIES[name]
    random_model(getattr(transformers, kind)(**SMALL, **more)).save_pretrained(tmp_path / "plain")
    plain = Checkpoint.open(tmp_path / "plain")
    model = plain.load(torch.float32)
    quantized = {name: round_weight(w) for name, w in matrices(model).items()}
    checkpoint = Checkpoint.open(save_quantized(model, plain.family, tmp_path / "packed", quantized))
    packed = checkpoint.load(torch.float32, packed=True)
    assert sum(isinstance(module, QuantizedLinear) for module in packed.modules()) == len(quantized)
    assert_close(outputs(packed), outputs(with_weights(model, quantized)), 1e-5)
    assert_close(outputs(checkpoint.load(torch.float32)), outputs(packed), 1e-5)


def test_weights_that_are_integers_are_not_read_from_the_model(model, round_weight, tmp_path):
    weight = round_weight(model.get_submodule(Q).weight)
    emptied = new_model()
    emptied.get_submodule(Q).weight = nn.Parameter(torch.empty(64, 64, device="meta"), requires_grad=False)
    save_quantized(emptied, LLAMA, tmp_path, {Q: weight})
    read = Checkpoint.open(tmp_path).load(torch.float32).get_submodule(Q).weight
    assert torch.equal(read, weight.dequantize())


def test_a_mixture_of_bits_is_one_file(model, round_weight, assert_close, tmp_path):
    bits = {name: (2, 3, 4, 8)[i % 4] for i, name in enumerate(matrices(model))}
    quantized = {name: round_weight(w, bits[name]) for name, w in matrices(model).items()}
    del quantized[UP]
    save_quantized(model, LLAMA, tmp_path, quantized)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [2, 3, 4, 8]
    assert THEIR_Q in config["config_groups"]["group_0"]["targets"]
    assert config["ignore"][:2] == ["lm_head", "model.layers.1.mlp.up_proj"]
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.quantized_kinds() == {"Q4_0", "Q8_0"}
    assert_close(outputs(checkpoint.load(torch.float32)), outputs(with_weights(model, quantized)), 1e-6)


def test_inputs_of_8_bits_are_said_in_the_file(model, round_weight, tmp_path):
    quantized = {Q: round_weight(model.get_submodule(Q).weight, 8), UP: round_weight(model.get_submodule(UP).weight, 4)}
    save_quantized(model, LLAMA, tmp_path, quantized, activations="int8")
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    assert [group["format"] for group in config["config_groups"].values()] == ["int-quantized", "pack-quantized"]
    inputs = config["config_groups"]["group_0"]["input_activations"]
    assert (inputs["num_bits"], inputs["dynamic"], inputs["strategy"]) == (8, True, "token")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert tensors[f"{THEIR_Q}.weight"].dtype == torch.int8
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.int8_activations
    assert checkpoint.quantized_kinds() == {"Q8_0", "Q4_0"}


def test_what_the_layout_has_no_place_for(model, round_weight, tmp_path):
    weight = round_weight(model.get_submodule(Q).weight)
    with pytest.raises(CheckpointError, match=r"'head.weight' has no place of its own in LlamaForCausalLM"):
        save_quantized(model, LLAMA, tmp_path, {"head": round_weight(model.head.weight)})
    with pytest.raises(CheckpointError, match="'embedding' is an embedding"):
        save_quantized(model, LLAMA, tmp_path, {"embedding": round_weight(model.embedding.weight)})
    uneven = IntWeight(4, 48, weight.codes_OI, torch.ones(64, 2).half())
    with pytest.raises(CheckpointError, match="rows of 64 weights are not whole groups of 48"):
        save_quantized(model, LLAMA, tmp_path, {Q: uneven})
    assert not (tmp_path / "config.json").exists()


@pytest.mark.peer
def test_parts_of_one_matrix_must_be_alike(random_model, round_weight, tmp_path):
    transformers = pytest.importorskip("transformers")
    kind, more = FAMILIES["phi3, fused"]
    random_model(getattr(transformers, kind)(**SMALL, **more)).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.load(torch.float32)
    quantized = {name: round_weight(w) for name, w in matrices(model).items()}
    eight = {Q: round_weight(model.get_submodule(Q).weight, 8)}
    with pytest.raises(CheckpointError, match=r"q.weight has 8 bits in symmetric groups of 32; .*k.weight has 4 bits"):
        save_quantized(model, checkpoint.family, tmp_path / "out", quantized | eight)
    del quantized[Q]
    with pytest.raises(CheckpointError, match=r"attention.q.weight is not quantised"):
        save_quantized(model, checkpoint.family, tmp_path / "out", quantized)


@pytest.mark.peer
def test_gpt2_s_turned_matrices_are_refused(random_model, round_weight, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=288, n_embd=64, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    random_model(config).save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    model = checkpoint.load(torch.float32)
    for part in ("attention.q", "feedforward.up"):
        name = f"trunk.layers.0.{part}"
        quantized = {name: round_weight(model.get_submodule(name).weight)}
        with pytest.raises(CheckpointError, match="inputs and outputs exchanged"):
            save_quantized(model, checkpoint.family, tmp_path / "out", quantized)


# --- the library itself -------------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 1 << 20], ids=["32", "channel"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_library_reads_the_same_weights(model, round_weight, tmp_path, bits, group, symmetric):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    quantized = {name: round_weight(w, bits, group, symmetric) for name, w in matrices(model).items()}
    activations = "int8" if bits == 8 else None
    save_quantized(model, LLAMA, tmp_path, quantized, activations=activations)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    parts = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{THEIR_Q}.")}
    assert set(parts) == set(compressor.compression_param_names(scheme))
    theirs = compressor.decompress(parts, scheme)["weight"]
    # The library computes in the scales' fp16.
    torch.testing.assert_close(theirs.float(), quantized[Q].dequantize(), rtol=2e-3, atol=1e-6)


@pytest.mark.peer
@pytest.mark.parametrize("bits", [(4,), (2, 3, 4, 8)], ids=["4", "mixed"])
def test_transformers_opens_the_folder(model, round_weight, assert_close, tmp_path, bits):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    quantized = {name: round_weight(w, bits[i % len(bits)]) for i, (name, w) in enumerate(matrices(model).items())}
    save_quantized(model, LLAMA, tmp_path, quantized)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = theirs(torch.arange(30)[None]).logits[0]
    assert_close(outputs(Checkpoint.open(tmp_path).load(torch.float32)), logits, 1e-4)


# --- what other programs write ------------------------------------------------------------------------------------

Edit = Callable[[dict[str, Tensor], dict[str, Any]], Any]


@pytest.fixture
def edited(model, round_weight, tmp_path) -> Callable[..., tuple[Path, IntWeight]]:
    """edited(edit, bits, group, symmetric): a folder with one quantised layer, changed by `edit(tensors, group)`."""

    def make(edit: Edit, bits: int = 4, group: int = 32, symmetric: bool = True) -> tuple[Path, IntWeight]:
        weight = round_weight(model.get_submodule(Q).weight, bits, group, symmetric)
        save_quantized(model, LLAMA, tmp_path, {Q: weight})
        tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
        config = json.loads((tmp_path / "config.json").read_text())
        edit(tensors, config["quantization_config"]["config_groups"]["group_0"])
        (tmp_path / "config.json").write_text(json.dumps(config))
        safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path, weight

    return make


def read_q(path: Path) -> Tensor:
    return Checkpoint.open(path).load(torch.float32).get_submodule(Q).weight


@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_for_the_whole_tensor(edited, bits):
    def edit(tensors, group):
        group["weights"] |= {"strategy": "tensor", "group_size": None}
        tensors[f"{THEIR_Q}.weight_scale"] = torch.tensor([0.25])

    path, weight = edited(edit, bits, 1 << 20)
    assert torch.equal(read_q(path), weight.codes_OI.float() * 0.25)
    assert Checkpoint.open(path).quantized_kinds() == {"Q4_0" if bits == 4 else "Q8_0"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scales_of_other_types_are_rounded_to_fp16(edited, dtype):
    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_scale"] = (tensors[f"{THEIR_Q}.weight_scale"].float() * 1.2345).to(dtype)

    path, weight = edited(edit)
    scales = safetensors.torch.load_file(path / "model.safetensors")[f"{THEIR_Q}.weight_scale"].float()
    exact = weight.codes_OI.float() * scales.repeat_interleave(32, 1)
    read = read_q(path)
    assert ((read - exact).abs() <= 2.0**-11 * exact.abs()).all()
    assert torch.equal(read, exact) == (dtype == torch.bfloat16)  # whose 8 digits fp16 holds


def test_scales_beyond_fp16_give_plain_numbers_without_rounding(edited):
    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_scale"] = torch.full((64, 2), 1.2345e-6)

    path, weight = edited(edit)
    assert torch.equal(read_q(path), weight.codes_OI.float() * torch.tensor(1.2345e-6))
    assert isinstance(Checkpoint.open(path).load(torch.float32, packed=True).get_submodule(Q), nn.Linear)


@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_in_the_order_of_their_importance(edited, symmetric):
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 32

    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_g_idx"] = order.int()

    path, weight = edited(edit, symmetric=symmetric)
    codes = weight.codes_OI.float() - (0 if symmetric else weight.zeros_OG.float()[:, order])
    assert torch.equal(read_q(path), codes * weight.scales_OG.float()[:, order])


def test_an_order_that_changes_nothing_keeps_the_weights_packed(edited):
    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_g_idx"] = torch.arange(64).int() // 32

    path, _ = edited(edit)
    assert isinstance(Checkpoint.open(path).load(torch.float32, packed=True).get_submodule(Q), QuantizedLinear)


def test_zeros_may_lie_unpacked(edited, model, round_weight):
    zeros = round_weight(model.get_submodule(Q).weight, symmetric=False).zeros_OG

    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_zero_point"] = zeros

    path, weight = edited(edit, symmetric=False)
    torch.testing.assert_close(read_q(path), weight.dequantize(), rtol=0, atol=0.02 * float(weight.scales_OG.max()))


def test_old_files_hold_ten_codes_of_3_bits_in_a_word(edited, model, round_weight):
    weight = round_weight(model.get_submodule(Q).weight, 3, symmetric=False)

    def loosely(codes: Tensor) -> Tensor:
        numbers = np.pad(codes.numpy().astype(np.int64) + 4, ((0, 0), (0, -codes.shape[1] % 10)))
        words = (numbers.reshape(len(codes), -1, 10) << np.arange(0, 30, 3)).sum(2)
        return torch.from_numpy(words.astype(np.int32))

    def edit(tensors, group):
        tensors[f"{THEIR_Q}.weight_packed"] = loosely(weight.codes_OI)
        tensors[f"{THEIR_Q}.weight_zero_point"] = loosely(weight.zeros_OG.T).T.contiguous()

    path, _ = edited(edit, 3, symmetric=False)
    torch.testing.assert_close(read_q(path), weight.dequantize(), rtol=0, atol=0.02 * float(weight.scales_OG.max()))


def test_a_name_decides_before_a_pattern_and_that_before_the_kind(edited):
    def edit(tensors, group):
        wrong = group["weights"] | {"num_bits": 8}
        targets = {"Linear": wrong, "re:.*q_proj": wrong, THEIR_Q: group["weights"]}
        config.update({name: {"targets": [name], "weights": weights} for name, weights in targets.items()})

    config: dict[str, Any] = {}
    path, weight = edited(edit)
    values = json.loads((path / "config.json").read_text())
    values["quantization_config"]["config_groups"] = config
    (path / "config.json").write_text(json.dumps(values))
    assert torch.equal(read_q(path), weight.dequantize())


# --- what is refused ----------------------------------------------------------------------------------------------


def part(name: str, change: Callable[[Tensor], Tensor | None]) -> Edit:
    """An edit of one tensor of the layer; None takes it out."""

    def edit(tensors, group):
        changed = change(tensors.pop(f"{THEIR_Q}.{name}", torch.zeros(64)))
        if changed is not None:
            tensors[f"{THEIR_Q}.{name}"] = changed.contiguous()

    return edit


def said(key: str, value: Any) -> Edit:
    return lambda tensors, group: group["weights"].update({key: value})


BAD: dict[str, tuple[Edit, str]] = {
    "no scale": (part("weight_scale", lambda t: None), "q_proj.weight_scale' is missing"),
    "no shape": (part("weight_shape", lambda t: None), "q_proj.weight_shape' is missing"),
    "no zeros": (said("symmetric", False), "q_proj.weight_zero_point' is missing"),
    "too few words": (
        part("weight_packed", lambda t: t[:, :-1]),
        r"shape \[64, 7\], which does not hold the \[64, 64\]",
    ),
    "other words": (part("weight_packed", lambda t: t.float()), "q_proj.weight_packed' is F32, not I32"),
    "a lying shape": (part("weight_shape", lambda t: t + 1), r"does not hold the \[65, 65\] 4-bit weights"),
    "a huge shape": (part("weight_shape", lambda t: t + 2**60), "does not hold"),
    "a negative shape": (part("weight_shape", lambda t: -t), "does not hold"),
    "a shape of three": (part("weight_shape", lambda t: torch.ones(3).long()), r"has shape \[3\]"),
    "fewer weights than the config has": (
        lambda tensors, group: tensors.update({f"{THEIR_Q}.weight_shape": torch.tensor([64, 60])}),
        "does not hold|has shape|asks for",
    ),
    "scales of another shape": (
        part("weight_scale", lambda t: t[:, :1]),
        r"shape \[64, 1\]; its layer asks for \[64, 2\]",
    ),
    "integer scales": (part("weight_scale", lambda t: t.int()), "weight_scale' is I32, not F16 or BF16 or F32"),
    "NaN among the scales": (
        part("weight_scale", lambda t: t * torch.nan),
        "weight_scale' holds NaN or infinite values",
    ),
    "an order beyond the groups": (
        part("weight_g_idx", lambda t: t.int() + 2),
        "g_idx' names groups outside of 0 to 1",
    ),
    "an order of another length": (part("weight_g_idx", lambda t: t[:9].int()), r"g_idx' has shape \[9\]"),
    "5 bits": (said("num_bits", 5), "num_bits = 5 is not supported"),
    "8 bits of which 4 are there": (said("num_bits", 8), "does not hold"),
    "floats": (said("type", "float"), "type = 'float' is not supported"),
    "a strategy of blocks": (said("strategy", "block"), "strategy = 'block' is not supported"),
    "a strategy of no name": (said("strategy", "wild"), "strategy = 'wild' is not supported"),
    "groups of nothing": (said("group_size", 0), "groups of 0 inputs"),
    "dynamic weights": (said("dynamic", True), "dynamic = True is not supported"),
    "another format": (lambda t, group: group.update(format="marlin-24"), "format = 'marlin-24' is not supported"),
    "another target": (lambda t, group: group.update(targets=["re:.*k_proj"]), "no group .* for .*q_proj'"),
    "no pattern": (lambda t, group: group.update(targets=["re:("]), "is not a pattern"),
    "outputs rounded": (lambda t, group: group.update(output_activations={"num_bits": 8}), "output_activations"),
    "inputs of floats": (lambda t, g: g.update(input_activations={"type": "float", "num_bits": 8}), "type = 'float'"),
    "inputs by fixed scales": (lambda t, g: g.update(input_activations={"dynamic": False}), "dynamic = False"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_contradict_themselves_are_refused(edited, case):
    edit, words = BAD[case]
    path, _ = edited(edit)
    with pytest.raises(CratonError, match=words) as refused:
        read_q(path)
    assert isinstance(refused.value, CheckpointError | FileFormatError)
    assert str(path) in str(refused.value.where)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "fp8"}, "packed in a format that is not read here: 'fp8'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "'bitsandbytes'"),
        ([], "not read here"),
        ({"quant_method": "compressed-tensors"}, "lacks 'config_groups'"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "must be an object"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}, "transform_config": {"config_groups": {}}},
            "transform_config",
        ),
    ],
)
def test_other_packings_are_named(tiny_model, tmp_path, config, words):
    values = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"quantization_config": config}))
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "weights.safetensors")
    (tmp_path / "weights.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(tmp_path)


def test_the_older_key_of_the_config_is_read(edited):
    path, weight = edited(lambda tensors, group: None)
    values = json.loads((path / "config.json").read_text())
    values["compression_config"] = values.pop("quantization_config")
    (path / "config.json").write_text(json.dumps(values))
    assert torch.equal(read_q(path), weight.dequantize())
