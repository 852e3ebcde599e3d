"""GGUF files of weights that are integers already: they go to the file as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.gguf import GGUFFile
from craton.checkpoints.gguf_export import save_gguf
from craton.checkpoints.int_weight import IntWeight
from craton.errors import CheckpointError
from craton.models import AnyModel

SMALL = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, rows interleaved": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "phi3, fused": ("Phi3Config", GROUPED | {"pad_token_id": 0, "sliding_window": None}),
    "gpt2, turned": ("GPT2Config", {"vocab_size": 288, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt-neox, fused by head": ("GPTNeoXConfig", SMALL),
    "mixtral, stacked": (
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
}
Q = "trunk.layers.0.attention.q"


def matrices(model: AnyModel) -> dict[str, Tensor]:
    return {
        name: module.weight
        for name, module in model.named_modules()
        if name.startswith("trunk.") and isinstance(module, nn.Linear) and not name.endswith("router")
    }


@pytest.fixture
def opened(random_model, tmp_path):
    """opened(name): a small model of that family, with its family."""

    def make(name: str) -> tuple[AnyModel, Any]:
        transformers = pytest.importorskip("transformers")
        kind, values = CASES[name]
        random_model(getattr(transformers, kind)(**values)).save_pretrained(tmp_path / "theirs")
        checkpoint = Checkpoint.open(tmp_path / "theirs")
        return checkpoint.load(torch.float32), checkpoint.family

    return make


def save(model: AnyModel, family: Any, tokenizer: Any, path: Any, quantized: dict[str, IntWeight]) -> dict[str, str]:
    """Write the file; give the type of each of its tensors."""
    save_gguf(model, family, tokenizer, path, "F16", quantized=quantized)
    return {name: info.type.name for name, info in GGUFFile.open(path).tensors.items()}


def check(path: Any, quantized: dict[str, IntWeight], *, minima: bool = False) -> None:
    """The file holds the integers' numbers, but for minima in fp16."""
    model = Checkpoint.open(path).load(torch.float32)
    for name, weight in quantized.items():
        off = (model.get_submodule(name).weight - weight.dequantize()).abs().max()
        assert off <= (2.0**-11 * 16 * weight.scales_OG.float().max() if minima else 0)


@pytest.mark.peer
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "type"),
    [
        (4, 32, True, "Q4_0"),
        (3, 32, True, "Q4_0"),
        (4, 32, False, "Q4_1"),
        (8, 32, True, "Q8_0"),
        (2, 64, False, "Q4_1"),
    ],
)
def test_every_family(opened, round_weight, byte_tokenizer, tmp_path, name, bits, group, symmetric, type):
    model, family = opened(name)
    quantized = {
        name: round_weight(w, bits, min(group, w.shape[1]), symmetric)
        for name, w in matrices(model).items()
        if w.shape[1] % group == 0
    }
    for name in quantized:
        model.get_submodule(name).weight = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
    types = save(model, family, byte_tokenizer, tmp_path / "model.gguf", quantized)
    assert type in types.values()
    assert set(types.values()) <= {"F16", "F32", type}
    check(tmp_path / "model.gguf", quantized, minima=not symmetric)


@pytest.mark.peer
def test_a_mixture_of_types(opened, round_weight, byte_tokenizer, assert_close, tmp_path):
    model, family = opened("mixtral, stacked")
    bits = {name: 8 if "experts.1." in name else 4 - i % 2 for i, name in enumerate(matrices(model))}
    quantized = {name: round_weight(w, bits[name]) for name, w in matrices(model).items()}
    types = save(model, family, byte_tokenizer, tmp_path / "model.gguf", quantized)
    assert {"Q4_0", "Q8_0"} <= set(types.values())
    # Experts lie in one tensor, which has the type of its widest part.
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    check(tmp_path / "model.gguf", quantized)
    checkpoint, ids = Checkpoint.open(tmp_path / "model.gguf"), torch.arange(20)
    packed = checkpoint.load(torch.float32, packed=True)
    assert_close(packed(ids, ids), checkpoint.load(torch.float32)(ids, ids), 1e-5)


@pytest.mark.peer
def test_a_tied_embedding_and_8_bits_with_zeros(opened, round_weight, byte_tokenizer, tmp_path):
    model, family = opened("llama, rows interleaved")
    quantized = {"embedding": round_weight(model.embedding.weight), Q: round_weight(matrices(model)[Q], 8, 32, False)}
    types = save(model, family, byte_tokenizer, tmp_path / "model.gguf", quantized)
    assert (types["token_embd.weight"], types["blk.0.attn_q.weight"]) == ("Q4_0", "Q8_0")
    again = Checkpoint.open(tmp_path / "model.gguf").load(torch.float32)
    assert torch.equal(again.head.weight, quantized["embedding"].dequantize())
    off = (again.get_submodule(Q).weight - quantized[Q].dequantize()).abs().max()
    assert 0 < off <= quantized[Q].dequantize().abs().max() / 254 * 1.01  # half a step of Q8_0


@pytest.mark.peer
def test_the_file_says_what_most_of_it_is(opened, round_weight, byte_tokenizer, tmp_path):
    model, family = opened("llama, rows interleaved")
    quantized = {"embedding": round_weight(model.embedding.weight), Q: round_weight(matrices(model)[Q])}
    quantized |= {name: round_weight(w) for name, w in matrices(model).items()}
    save(model, family, byte_tokenizer, tmp_path / "model.gguf", quantized)
    assert GGUFFile.open(tmp_path / "model.gguf").metadata["general.file_type"] == 2


@pytest.mark.peer
def test_what_blocks_cannot_say(opened, round_weight, byte_tokenizer, tmp_path):
    model, family = opened("phi3, fused")
    path, weight = tmp_path / "model.gguf", matrices(model)[Q]
    quantized = {name: round_weight(w) for name, w in matrices(model).items()}
    for changes, words in (
        ({Q: round_weight(weight, 4, 16)}, "a scale for every 16 inputs"),
        ({"nowhere": round_weight(weight)}, "'nowhere.weight' has no place of its own"),
    ):
        with pytest.raises(CheckpointError, match=words):
            save_gguf(model, family, byte_tokenizer, path, quantized=quantized | changes)
    del quantized[Q]
    with pytest.raises(CheckpointError, match=r"is quantised and .*q.weight' is not, but both are in"):
        save_gguf(model, family, byte_tokenizer, path, quantized=quantized)
    assert not path.exists()
