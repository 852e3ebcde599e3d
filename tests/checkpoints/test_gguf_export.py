"""GGUF files of ours, opened by others: llama.cpp, transformers and the `gguf` package give back the same model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import FAMILIES, Family
from craton.checkpoints.gguf import GGUFFile
from craton.checkpoints.gguf_export import GGUFKind, save_gguf
from craton.cli.export import export
from craton.errors import CheckpointError, UnknownName
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.models import PoolingConfig

TOLERANCE = 2e-4
# llama.cpp multiplies F16 matrices with activations rounded to fp16, and block formats with activations in 8 bits.
CPP_TOLERANCE = {"F16": 6e-3, "BF16": 3e-2} | dict.fromkeys(("Q8_0", "Q6_K", "Q4_K", "Q4_1", "Q4_0"), 6e-2)

SMALL = {
    "vocab_size": 288,  # 28 more than the tokeniser has
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
NO_GROUPS = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
SMALL_GPT2 = {"vocab_size": 288, "n_embd": 64, "n_layer": 3, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.5, 2.0, 2.5, 3.0, 3.5, 4.0],
}


def rope(original: int | None = None, **values: Any) -> dict[str, Any]:
    extra = {} if original is None else {"original_max_position_embeddings": original}
    return {"rope_theta": 10000.0, **extra, **values}


# Name -> (transformers' config class, its keys).
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama, tied, with biases": ("LlamaConfig", SMALL | {"tie_word_embeddings": True, "attention_bias": True}),
    "llama, biases in the feed-forward": ("LlamaConfig", SMALL | {"mlp_bias": True}),
    "llama, larger heads": ("LlamaConfig", SMALL | {"head_dim": 32}),
    "llama 3": ("LlamaConfig", SMALL | {"rope_parameters": rope(16, **LLAMA3)}),
    "llama, linear": ("LlamaConfig", SMALL | {"rope_parameters": rope(rope_type="linear", factor=4.0)}),
    "llama, yarn": ("LlamaConfig", SMALL | {"rope_parameters": rope(32, rope_type="yarn", factor=4.0)}),
    "llama, yarn of its own magnitude": (
        "LlamaConfig",
        SMALL | {"rope_parameters": rope(32, rope_type="yarn", factor=4.0, attention_factor=1.3, beta_fast=16.0)},
    ),
    "mistral": ("MistralConfig", SMALL | {"head_dim": 16, "sliding_window": None}),
    "mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL | {"head_dim": 128, "tie_word_embeddings": True}),
    "qwen3 moe": (
        "Qwen3MoeConfig",
        SMALL
        | {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"norm_topk_prob": True},
    ),
    "gemma": ("GemmaConfig", SMALL | {"head_dim": 32}),
    "gemma2": ("Gemma2Config", SMALL | {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}),
    "gemma3": (
        "Gemma3TextConfig",
        SMALL
        | {"num_hidden_layers": 7, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 16}
        | {
            "rope_parameters": {
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
            }
        },
    ),
    "phi3": ("Phi3Config", SMALL | {"pad_token_id": 0, "sliding_window": None}),
    "phi3, longrope": (
        "Phi3Config",
        SMALL
        | {"pad_token_id": 0, "sliding_window": None, "original_max_position_embeddings": 64}
        | {"rope_parameters": rope(**LONGROPE)},
    ),
    "olmo2": ("Olmo2Config", SMALL),
    "smollm3": ("SmolLM3Config", SMALL | {"num_hidden_layers": 5, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", SMALL_GPT2 | {"n_positions": 1024}),
    "gpt-neox": ("GPTNeoXConfig", NO_GROUPS | {"rotary_pct": 0.5}),
    "gpt-neox, one branch after the other": (
        "GPTNeoXConfig",
        NO_GROUPS | {"rotary_pct": 1.0, "use_parallel_residual": False},
    ),
}
# What transformers' own GGUF reader understands: it leaves out rope scaling, biases and some sizes.
READ_BY_TRANSFORMERS = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2")


def make_config(name: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    kind, values = CASES[name]
    return getattr(transformers, kind)(**{**values, **changes})


def load(theirs: Any, folder: Path) -> tuple[Any, Family]:
    theirs.save_pretrained(folder)
    checkpoint = Checkpoint.open(folder)
    return checkpoint.load(torch.float32), checkpoint.family


@pytest.fixture(scope="module")
def exported(
    random_model: Callable, byte_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Any, Path]]:
    """exported(name, kind, **changes): the model of transformers, and the file that we write of it."""

    @cache
    def export(name: str, kind: str = "F16", **changes: Any) -> tuple[Any, Path]:
        folder = tmp_path_factory.mktemp("exported")
        theirs = random_model(make_config(name, **changes))
        model, family = load(theirs, folder / "theirs")
        return theirs, save_gguf(model, family, byte_tokenizer, folder / "model.gguf", kind)

    return export


def some_ids(length: int = 100) -> Tensor:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(1))


def logits_of_file(path: Path, ids: Tensor, *, packed: bool = False) -> Tensor:
    with torch.inference_mode():
        return Checkpoint.open(path).load(torch.float32, packed=packed)(ids, torch.arange(len(ids)))


def llama_cpp_logits(path: Path, ids: Tensor) -> Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    defaults = llama_cpp.llama_cpp.llama_model_default_params

    def as_they_are() -> Any:
        # Repacked weights would go through AMX, which some virtual machines name and then refuse.
        params = defaults()
        params.use_extra_bufts = False
        return params

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", as_they_are)
        model = llama_cpp.Llama(
            str(path), n_ctx=128, n_batch=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
        )
    try:
        model.eval(ids.tolist())
        return torch.from_numpy(np.array(model.scores[: len(ids)]))
    finally:
        model.close()


@pytest.mark.peer
@pytest.mark.parametrize("name", CASES)
def test_we_read_our_file_back(exported, assert_close, name):
    theirs, path = exported(name)
    ids = some_ids()
    expected = theirs(ids[None]).logits[0]
    assert_close(logits_of_file(path, ids), expected, TOLERANCE)
    assert_close(logits_of_file(path, ids, packed=True), expected, TOLERANCE)


@pytest.mark.parametrize("name", ["llama 3", "qwen3", "mixtral", "gemma3", "phi3", "gpt2"])
def test_the_config_comes_back(exported, name):
    _, path = exported(name)
    assert Checkpoint.open(path).config == Checkpoint.open(path.parent / "theirs").config


@pytest.mark.peer
@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_reads_our_file(exported, assert_close, name):
    theirs, path = exported(name)
    ids = some_ids()
    assert_close(llama_cpp_logits(path, ids), theirs(ids[None]).logits[0], CPP_TOLERANCE["F16"])


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_llama_cpp_and_we_agree_on_what_a_file_of_few_bits_says(exported, assert_close, name, kind):
    # All experts take part, or the smallest difference would choose others.
    _, path = exported(name, kind, **({"num_experts_per_tok": 4} if name == "mixtral" else {}))
    ids = some_ids()
    assert_close(logits_of_file(path, ids, packed=True), logits_of_file(path, ids), 1e-5)
    assert_close(llama_cpp_logits(path, ids), logits_of_file(path, ids), CPP_TOLERANCE[kind])


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize(("width", "inner"), [(256, None), (64, {"Q4_K": "Q5_0", "Q6_K": "Q8_0"})])
def test_llama_cpp_opens_our_k_quants(exported, assert_close, kind, width, inner):
    _, path = exported("llama", kind, hidden_size=width, intermediate_size=256)
    types = {name: info.type.name for name, info in GGUFFile.open(path).tensors.items()}
    assert types["blk.0.attn_q.weight"] == (inner[kind] if inner else kind)
    assert types["blk.0.ffn_down.weight"] == kind
    assert types["output.weight"] == ("Q8_0" if inner else "Q6_K")
    ids = some_ids()
    assert_close(logits_of_file(path, ids, packed=True), logits_of_file(path, ids), 5e-2)
    assert_close(llama_cpp_logits(path, ids), logits_of_file(path, ids), CPP_TOLERANCE[kind])


@pytest.mark.peer
@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_our_file(exported, assert_close, name):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    theirs, path = exported(name)
    reread = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = some_ids()
    with torch.inference_mode():
        assert_close(reread(ids[None]).logits[0], theirs(ids[None]).logits[0], TOLERANCE)


@pytest.mark.peer
@pytest.mark.parametrize("name", ["llama 3", "qwen3 moe", "gemma2", "gpt2"])
def test_the_gguf_package_knows_every_tensor_and_type(exported, name):
    gguf = pytest.importorskip("gguf")
    _, path = exported(name)
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    known = {gguf.TENSOR_NAMES[tensor].format(bid=number) for tensor in gguf.MODEL_TENSORS[arch] for number in range(3)}
    assert {tensor.name.rpartition(".")[0] for tensor in reader.tensors} <= known
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "F16"}
    assert all(tensor.tensor_type.name == "F32" for tensor in reader.tensors if len(tensor.shape) == 1)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_F16


@pytest.mark.parametrize(
    ("kind", "inner", "ends"),
    [
        ("F16", "F16", "F16"),
        ("BF16", "BF16", "BF16"),
        ("Q8_0", "Q8_0", "Q8_0"),
        ("Q4_0", "Q4_0", "Q8_0"),
        ("Q4_1", "Q4_1", "Q8_0"),
    ],
)
def test_each_kind_holds_its_matrices(exported, kind, inner, ends):
    _, path = exported("llama", kind)
    types = {name: info.type.name for name, info in GGUFFile.open(path).tensors.items()}
    assert types.pop("token_embd.weight") == types.pop("output.weight") == ends
    assert {name: type_ for name, type_ in types.items() if type_ != inner} == {
        name: "F32" for name in types if "norm" in name
    }


def test_rows_that_are_not_whole_blocks_become_f16(exported, assert_close):
    _, path = exported("llama", "Q8_0", intermediate_size=100)
    types = {info.type.name for name, info in GGUFFile.open(path).tensors.items() if "ffn_down" in name}
    assert types == {"F16"}
    ids = some_ids()
    assert_close(llama_cpp_logits(path, ids), logits_of_file(path, ids), CPP_TOLERANCE["Q8_0"])


def test_the_tokeniser_travels_and_spare_rows_are_named(exported, byte_tokenizer):
    _, path = exported("llama")
    metadata = GGUFFile.open(path).metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == len(metadata["tokenizer.ggml.token_type"]) == 288
    assert tokens[260:] == [f"[PAD{n}]" for n in range(260, 288)]
    reread = tokenizer_from_gguf(metadata)
    for text in ("ab cab", "ساختمان [PAD260]", "<s>x</s>"):
        assert reread.encode(text) == byte_tokenizer.encode(text)


@pytest.fixture
def word_tokenizer() -> Tokenizer:
    words = ["old", "stable", "##s", "stone", "the"]
    return tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.tokens": [
                *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
                *(word[2:] if word.startswith("##") else "▁" + word for word in words),
            ],
            "tokenizer.ggml.token_type": [3] * 5 + [1] * len(words),
            "tokenizer.ggml.padding_token_id": 0,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.mask_token_id": 4,
        }
    )


@pytest.fixture
def bert_file(random_model, word_tokenizer, tmp_path) -> tuple[Any, Path]:
    transformers = pytest.importorskip("transformers")
    theirs = random_model(transformers.BertConfig(**NO_GROUPS | {"vocab_size": 32}, hidden_act="gelu"))
    theirs.save_pretrained(tmp_path / "theirs")
    checkpoint = Checkpoint.open(tmp_path / "theirs")
    assert checkpoint.config.pooler
    path, pooling = tmp_path / "model.gguf", PoolingConfig(mode="mean")
    model = checkpoint.load(torch.float32)
    return theirs, save_gguf(model, checkpoint.family, word_tokenizer, path, "F16", pooling=pooling)


def test_an_encoder_comes_back_with_its_pooling_and_without_the_pooler(bert_file, assert_close):
    theirs, path = bert_file
    checkpoint = Checkpoint.open(path)
    assert checkpoint.pooling == PoolingConfig(mode="mean")
    assert not checkpoint.config.pooler
    ids = torch.arange(32)
    ours = checkpoint.load(torch.float32)(ids, ids)
    assert_close(ours, theirs(ids[None]).last_hidden_state[0], TOLERANCE)


@pytest.mark.peer
def test_llama_cpp_embeds_with_our_file(bert_file):
    llama_cpp = pytest.importorskip("llama_cpp")
    theirs, path = bert_file
    model = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, n_threads_batch=1, embedding=True, verbose=False)
    text = "the old stable stones"
    embedding = torch.tensor(model.embed(text, normalize=True))
    model.close()
    ids = torch.tensor(Checkpoint.open(path).tokenizer().encode(text))
    assert len(ids) == 7
    expected = torch.nn.functional.normalize(theirs(ids[None]).last_hidden_state[0].mean(0), dim=0)
    assert embedding @ expected > 0.9999


# --- what cannot be written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gemma2", {"query_pre_attn_scalar": 100}, "trunk.layers.0.attention.scale"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "trunk.layers.0.attention.window"),
        ("mistral", {"sliding_window": 64}, "trunk.layers.0.attention.window"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1, 1]}, "trunk.layers.2.attention.rotary"),
        ("qwen3 moe", {"norm_topk_prob": False}, "normalise"),
        ("gpt-neox", {"hidden_act": "relu"}, "activation"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
        ("qwen2", {"rope_parameters": rope(16, **LLAMA3)}, "rope scaling"),
        ("llama 3", {"rope_parameters": rope(16, **LLAMA3 | {"low_freq_factor": 2.0})}, "rotary.scaling"),
        ("llama, yarn", {"rope_parameters": rope(32, rope_type="yarn", factor=4.0, truncate=False)}, "truncate"),
    ],
)
def test_a_config_that_the_format_cannot_say_is_refused(random_model, byte_tokenizer, tmp_path, name, changes, words):
    model, family = load(random_model(make_config(name, **changes)), tmp_path / "theirs")
    with pytest.raises(CheckpointError) as caught:
        save_gguf(model, family, byte_tokenizer, tmp_path / "model.gguf")
    assert words in caught.value.what
    assert not (tmp_path / "model.gguf").exists()


def test_an_architecture_that_is_not_written_is_named(random_model, byte_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(**NO_GROUPS, pad_token_id=1)
    theirs = transformers.RobertaModel(config)
    model, family = load(theirs, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="RobertaModel cannot be written as GGUF") as caught:
        save_gguf(model, family, byte_tokenizer, tmp_path / "model.gguf")
    assert "BertModel, GPT2LMHeadModel" in caught.value.remedy


def test_every_family_of_the_table_is_known():
    from craton.checkpoints.gguf_architectures import ARCHITECTURES

    known = {name for family in FAMILIES for name in family.architectures}
    assert {name for architecture in ARCHITECTURES for name in architecture.hf_architectures} <= known


def test_the_command_offers_every_kind():
    (hint,) = (value for name, value in get_type_hints(export).items() if name == "kind")
    assert get_args(hint) == get_args(GGUFKind)


def test_an_unknown_kind_is_named(exported, byte_tokenizer, tmp_path):
    checkpoint = Checkpoint.open(exported("llama")[1])
    with pytest.raises(UnknownName, match="'Q3_K'"):
        save_gguf(checkpoint.load(torch.float32), checkpoint.family, byte_tokenizer, tmp_path / "model.gguf", "Q3_K")


def test_a_packed_model_is_refused(exported, byte_tokenizer, tmp_path):
    _, path = exported("llama", "Q8_0")
    checkpoint = Checkpoint.open(path)
    model = checkpoint.load(torch.float32, packed=True)
    with pytest.raises(CheckpointError, match="no plain weight") as caught:
        save_gguf(model, checkpoint.family, byte_tokenizer, tmp_path / "again.gguf")
    assert "float32" in caught.value.remedy


@pytest.mark.parametrize(("value", "kind"), [(float("nan"), "F16"), (float("inf"), "Q8_0"), (1e5, "F16")])
def test_a_weight_that_the_kind_cannot_hold_is_named(random_model, byte_tokenizer, tmp_path, value, kind):
    model, family = load(random_model(make_config("llama")), tmp_path / "theirs")
    model.trunk.layers[1].feedforward.up.weight.data[3, 5] = value
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what was there")
    with pytest.raises(CheckpointError, match="cannot be written as") as caught:
        save_gguf(model, family, byte_tokenizer, path, kind)
    assert "'blk.1.ffn_up.weight', row 3, column 5" in caught.value.where
    assert path.read_bytes() == b"what was there"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.gguf", "theirs"]


def test_a_tokeniser_larger_than_the_model_is_refused(random_model, byte_tokenizer, tmp_path):
    model, family = load(random_model(make_config("llama", vocab_size=200)), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="260 tokens, the model 200"):
        save_gguf(model, family, byte_tokenizer, tmp_path / "model.gguf")


# --- the real model -----------------------------------------------------------------------------------------------

SENTENCE = "The craton is the old and stable part of a continent, and everything else is built on it."


@pytest.mark.peer
def test_llama_cpp_and_we_agree_on_smollm2(smollm2_gguf, assert_close):
    ids = torch.tensor(Checkpoint.open(smollm2_gguf).tokenizer().encode(SENTENCE))
    ours = logits_of_file(smollm2_gguf, ids, packed=True)
    assert_close(llama_cpp_logits(smollm2_gguf, ids), ours, CPP_TOLERANCE["Q4_0"])


@pytest.mark.slow
def test_smollm2_to_f16_and_back(smollm2_gguf, assert_close, tmp_path):
    checkpoint = Checkpoint.open(smollm2_gguf)
    tokenizer, model = checkpoint.tokenizer(), checkpoint.load(torch.float32)
    path = save_gguf(model, checkpoint.family, tokenizer, tmp_path / "model.gguf", "F16")
    again = Checkpoint.open(path)
    assert again.config == checkpoint.config
    assert again.tokenizer().encode(SENTENCE) == tokenizer.encode(SENTENCE)
    ids = torch.tensor(tokenizer.encode(SENTENCE))
    with torch.inference_mode():
        expected = model(ids, torch.arange(len(ids)))
    assert_close(logits_of_file(path, ids), expected, 2e-3)  # 1.0e-3, which is what fp16 takes off the weights
    assert_close(llama_cpp_logits(path, ids), expected, CPP_TOLERANCE["F16"])
