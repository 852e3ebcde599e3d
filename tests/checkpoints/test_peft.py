"""PEFT's files without PEFT: how ours and theirs are joined and split, and every way in which files can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.peft import PeftAdapter, write_peft
from craton.checkpoints.peft_modules import LowRankUpdate, adaptable_modules, join, split
from craton.checkpoints.peft_reader import read_adapter_config, read_peft, read_summary
from craton.checkpoints.safetensors import SafetensorsFile, write_safetensors
from craton.errors import CheckpointError, CratonError, FileFormatError, UsageError
from craton.models import ModelConfig, build

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2, "tie_word_embeddings": True},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "num_key_value_heads": 2},
    "gpt_neox": {"architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.5},
}
COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
Shapes = dict[str, tuple[int, int]]


def made(name: str) -> tuple[Family, ModelConfig, Shapes]:
    values = {**COMMON, **CONFIGS[name]}
    family = family_of(values, "config.json")
    config = family.config(Keys(values, "config.json"))
    with torch.device("meta"):
        modules = dict(build(config).named_modules())
    shapes = {n: (m.out_features, m.in_features) for n, m in modules.items() if hasattr(m, "in_features")}
    return family, config, shapes


def random_update(shape: tuple[int, int], rank: int, alpha: float, *, dora: bool = False) -> LowRankUpdate:
    outputs, inputs = shape
    magnitude = torch.rand(outputs) + 0.5 if dora else None
    return LowRankUpdate(torch.randn(rank, inputs), torch.randn(outputs, rank), alpha, magnitude)


def delta(update: LowRankUpdate, *, rslora: bool) -> Tensor:
    return update.b @ update.a * update.alpha / (update.rank**0.5 if rslora else update.rank)


@settings(deadline=None, max_examples=60)
@given(
    family=st.sampled_from(["phi3", "gpt_neox", "llama"]),
    parts=st.sets(st.sampled_from(["q", "k", "v"]), min_size=1),
    ranks=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    alphas=st.lists(st.sampled_from([0.5, 2.0, 8.0]), min_size=3, max_size=3),
    rslora=st.booleans(),
)
def test_layers_joined_and_split_again_are_the_same_functions(family, parts, ranks, alphas, rslora):
    kind, config, shapes = made(family)
    module = next(m for m in adaptable_modules(kind, config, shapes).values() if m.ours[0].endswith("0.attention.q"))
    given_parts = {
        name: random_update(shapes[name], rank, alpha)
        for name, rank, alpha in zip(module.ours, ranks, alphas, strict=False)
        if name[-1] in parts
    }
    if not given_parts:
        return
    joined = join(module, given_parts, rslora=rslora)
    theirs = module.to_ours(delta(joined, rslora=rslora))
    for name, whole in zip(module.ours, theirs, strict=True):
        expected = delta(given_parts[name], rslora=rslora) if name in given_parts else torch.zeros_like(whole)
        assert torch.allclose(whole, expected, atol=1e-4)
    again = split(module, joined, rslora=rslora)
    assert {n: u.rank for n, u in again.items()} == {n: u.rank for n, u in given_parts.items()}
    for name, update in again.items():
        assert torch.allclose(delta(update, rslora=rslora), delta(given_parts[name], rslora=rslora), atol=1e-4)


def test_an_untrained_adapter_of_a_joined_module_keeps_its_rank():
    family, config, shapes = made("phi3")
    module = next(m for m in adaptable_modules(family, config, shapes).values() if len(m.ours) == 3)
    parts = {n: LowRankUpdate(torch.randn(2, 16), torch.zeros(shapes[n][0], 2), 4.0) for n in module.ours}
    again = split(module, join(module, parts, rslora=False), rslora=False)
    assert set(again) == set(module.ours)
    assert all(update.rank == 6 and not update.b.any() for update in again.values())


def test_dora_on_a_part_of_a_joined_module_is_refused():
    family, config, shapes = made("phi3")
    module = next(m for m in adaptable_modules(family, config, shapes).values() if len(m.ours) == 3)
    part = {module.ours[0]: random_update(shapes[module.ours[0]], 2, 4.0, dora=True)}
    with pytest.raises(CheckpointError, match="DoRA on a part"):
        join(module, part, rslora=False)


def test_gpt_neox_rows_go_head_by_head():
    family, config, shapes = made("gpt_neox")
    module = adaptable_modules(family, config, shapes)["layers.0.attention.query_key_value"]
    # The first head's queries, keys, values, then the second's: rows 0-3 of q, k and v, each of 16 rows.
    assert module.order[:12].tolist() == [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35]


@pytest.fixture
def written(tmp_path) -> Callable[..., Path]:
    """written(config={...}, tensors={...}, drop=name): a good adapter's folder with something changed."""

    def make(config: dict[str, Any] | None = None, tensors: dict[str, Tensor] | None = None, drop: str = "") -> Path:
        family, model, shapes = made("llama")
        names = [f"trunk.layers.{n}.attention.{part}" for n in range(2) for part in "qv"]
        adapter = PeftAdapter({name: random_update(shapes[name], 2, 4.0) for name in names}, task="CAUSAL_LM")
        folder = write_peft(adapter, family, model, shapes, tmp_path / "adapter")
        values = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
        (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
        file = SafetensorsFile.open(folder / "adapter_model.safetensors")
        kept = {name: file.tensor(name).clone() for name in file.tensors if not drop or drop not in name}
        write_safetensors(file.path, kept | (tensors or {}))
        return folder

    return make


def read(folder: Path) -> PeftAdapter:
    return read_peft(folder, *made("llama"))


PATH = "base_model.model.model.layers.0.self_attn.q_proj"


def test_the_config_is_peft_s(written):
    values = json.loads((written() / "adapter_config.json").read_text())
    assert values["peft_type"] == "LORA"
    assert values["target_modules"] == ["q_proj", "v_proj"]
    assert (values["r"], values["lora_alpha"], values["rank_pattern"]) == (2, 4, {})
    assert values["modules_to_save"] is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"config": {"peft_type": "IA3"}}, "peft_type"),
        ({"config": {"peft_type": None}}, "peft_type"),
        ({"config": {"bias": "all"}}, "bias"),
        ({"config": {"use_qalora": True}}, "use_qalora"),
        ({"config": {"target_parameters": ["mlp.experts.gate_up_proj"]}}, "target_parameters"),
        ({"config": {"trainable_token_indices": [1, 2]}}, "trainable_token_indices"),
        ({"config": {"alora_invocation_tokens": [5]}}, "alora_invocation_tokens"),
        ({"config": {"init_lora_weights": "pissa_niter_4"}}, "changes the base's weights"),
        ({"config": {"lora_alpha": "much"}}, "lora_alpha"),
        ({"config": {"lora_dropout": 1.5}}, "lora_dropout|no share"),
        ({"config": {"alpha_pattern": {"(a+)+": 1}}}, "pattern"),
        ({"config": {"alpha_pattern": {"[": 1}}}, "malformed"),
        ({"config": {"use_dora": True}}, r"missing.*magnitude"),
        ({"config": {"target_modules": ["q_proj", "v_proj", "o_proj"]}}, r"2 tensors are missing.*o_proj"),
        ({"drop": "layers.1.self_attn.q_proj.lora_A"}, r"missing.*layers.1.self_attn.q_proj.lora_A"),
        ({"drop": "layers.1.self_attn"}, "missing"),
        ({"drop": "lora_"}, "incomplete"),
        ({"tensors": {f"{PATH}.lora_A.weight": torch.randn(2, 20)}}, r"shape \[2, 20\], this model asks for \[2, 16\]"),
        ({"tensors": {f"{PATH}.lora_B.weight": torch.randn(16, 3)}}, r"shape \[16, 3\]"),
        ({"tensors": {f"{PATH}.lora_A.weight": torch.randn(())}}, "no rank"),
        ({"tensors": {f"{PATH}.lora_A.weight": torch.full((2, 16), torch.nan)}}, "NaN"),
        ({"tensors": {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(1)}}, "no place"),
        ({"tensors": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 40)}}, "no place"),
        ({"tensors": {"base_model.model.lm_head.weight": torch.ones(40, 16)}}, "no place"),
        (
            {
                "tensors": {"base_model.model.embed_tokens.weight": torch.ones(40, 16)},
                "config": {"modules_to_save": ["embed_tokens"]},
            },
            "no place",
        ),
    ],
)
def test_what_is_not_an_adapter_of_this_model(written, change, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        read(written(**change))
    assert "adapter" in (caught.value.where or "")


def test_a_pickle_is_refused_and_nothing_is_named(written, tmp_path):
    folder = written()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileFormatError, match="pickle"):
        read(folder)
    with pytest.raises(UsageError, match="no adapter"):
        read_adapter_config(tmp_path)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match="has no adapter_model"):
        read(folder)


@settings(deadline=None, max_examples=60)
@given(data=st.binary(max_size=200), cut=st.integers(0, 400))
def test_damaged_files_are_errors_of_ours(tmp_path_factory, data, cut):
    family, config, shapes = made("llama")
    adapter = PeftAdapter({"trunk.layers.0.attention.q": random_update((16, 16), 1, 1.0)})
    folder = write_peft(adapter, family, config, shapes, tmp_path_factory.mktemp("damaged"))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(CratonError):
        read(folder)
    (folder / "adapter_config.json").write_bytes(data)
    with pytest.raises(CratonError):
        read(folder)


def test_what_was_written_last_is_read(tmp_path):
    family, config, shapes = made("llama")
    for alpha in (1.0, 2.5):
        update = random_update((16, 16), 1, alpha)
        adapter = PeftAdapter(
            {"trunk.layers.0.attention.q": update},
            rslora=True,
            dropout=0.1,
            base="hf:org/name@v2",
            base_weights="nf4",
        )
        write_peft(adapter, family, config, shapes, tmp_path)
    again = read(tmp_path)
    assert (again.rslora, again.dropout, again.base, again.base_weights) == (True, 0.1, "org/name@v2", "nf4")
    assert again.updates["trunk.layers.0.attention.q"].alpha == 2.5
    assert read_summary(tmp_path).labels == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
