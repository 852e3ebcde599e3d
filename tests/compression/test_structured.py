"""Structured pruning: what is cut is what the model misses least, what stays computes the same, and transformers opens
it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from craton import store
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import family_of
from craton.checkpoints.families.family import Keys
from craton.checkpoints.save import save_checkpoint
from craton.compression.importance import layer_losses, text_nats, unit_importance
from craton.compression.structured import (
    cut,
    keep_channels,
    keep_groups,
    least_layers,
    prune_structured,
    without_layers,
)
from craton.compression.structured_settings import StructuredSettings
from craton.compression.vocabulary import cut_vocabulary
from craton.errors import UsageError
from craton.modalities.text import Tokenizer, tokenizer_json
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, build
from craton.models.initialisation import initialise
from craton.store.runs import Run

WORDS = "the cat sat on the mat and the dog sat on the log while the sun rose over the quiet hill and all was well "
OTHER = "سلام دنیا: naïve façade 🎉\n\tdef f(x): return x ** 2 # 日本語"
CONFIGS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "Qwen3ForCausalLM": {"head_dim": 16},
    "Qwen2ForCausalLM": {},
    "Phi3ForCausalLM": {},
    "Olmo2ForCausalLM": {},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32},
}


@pytest.fixture(autouse=True)
def craton_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([WORDS * 30 + "flour sugar butter kitchen recipe " * 9], TokenizerSettings(vocab=400))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(WORDS * 120, encoding="utf-8")
    return path


def make(tokenizer: Tokenizer, architecture: str = "LlamaForCausalLM", **changes: Any) -> tuple[CausalLM, Any]:
    hf = {
        "architectures": [architecture],
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        **CONFIGS.get(architecture, {}),
        **changes,
    }
    family = family_of(hf, "test")
    model = build(family.config(Keys(hf, "test")))
    assert isinstance(model, CausalLM)
    initialise(model, 0)
    torch.manual_seed(0)
    for parameter in model.parameters():  # norms and biases that do nothing would hide a wrong cut
        if parameter.dim() == 1:
            parameter.data = 1 + 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False).eval(), family


@pytest.fixture
def saved(tokenizer: Tokenizer, tmp_path: Path):
    def save(architecture: str = "LlamaForCausalLM", **changes: Any) -> Path:
        model, family = make(tokenizer, architecture, **changes)
        return save_checkpoint(model, family, tmp_path / "base", tokenizer=tokenizer)

    return save


IDS = torch.arange(3 * 24).view(3, 24) * 7 % 300


def logits(model: CausalLM) -> torch.Tensor:
    return model(IDS[0], torch.arange(24))


# --- the cuts ------------------------------------------------------------------------------------------------------


def test_without_a_layer_is_the_model_that_skips_it(tokenizer):
    model, _ = make(tokenizer)
    cut_model = without_layers(model, (1,))
    assert len(cut_model.trunk.layers) == 3
    model.trunk.layers[1] = _Skip()
    torch.testing.assert_close(logits(cut_model), logits(model))


class _Skip(nn.Module):
    def forward(self, x, layout, layer):
        return x


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_without_a_group_is_the_model_whose_group_gives_nothing(tokenizer, architecture):
    if architecture == "Olmo2ForCausalLM":
        pytest.skip("its norm of queries and keys runs over all heads, so fewer of them are another norm")
    model, _ = make(tokenizer, architecture)
    smaller = keep_groups(model, [[1]] * 4)
    attention = smaller.trunk.layers[0].config.attention
    assert (attention.heads, attention.kv_heads) == (2, 1)
    assert smaller.trunk.layers[0].attention.k.weight.shape[0] == attention.head_size
    for layer in model.trunk.layers:
        layer.attention.o.weight[:, : 2 * layer.config.attention.head_size] = 0
    torch.testing.assert_close(logits(smaller), logits(model))


def test_without_channels_is_the_model_whose_channels_give_nothing(tokenizer):
    model, _ = make(tokenizer)
    kept = list(range(0, 96, 3))
    smaller = keep_channels(model, [kept] * 4)
    assert smaller.trunk.layers[0].feedforward.up.weight.shape == (32, 64)
    gone = [channel for channel in range(96) if channel not in kept]
    for layer in model.trunk.layers:
        layer.feedforward.down.weight[:, gone] = 0
    torch.testing.assert_close(logits(smaller), logits(model))


# --- what is cut ---------------------------------------------------------------------------------------------------


def test_the_loss_without_each_layer_is_measured(tokenizer):
    model, _ = make(tokenizer)
    found = layer_losses(model, IDS)
    expected = {i: text_nats(without_layers(model, (i,)), list(IDS)) / (3 * 23) for i in range(4)}
    assert found == pytest.approx(expected, rel=1e-5)
    assert layer_losses(model, IDS, only=[2]) == pytest.approx({2: expected[2]}, rel=1e-5)


def test_a_layer_that_does_nothing_goes_first_and_the_numbers_are_those_of_the_old_model(tokenizer):
    model, _ = make(tokenizer)
    # Layers that matter add something; what does nothing is missed least.
    for number, layer in enumerate(model.trunk.layers):
        if number in (1, 3):
            layer.attention.o.weight.zero_()
            layer.feedforward.down.weight.zero_()
    whole = text_nats(model, list(IDS)) / (3 * 23)
    assert layer_losses(model, IDS)[1] == pytest.approx(whole, rel=1e-5)
    ids_NT = torch.tensor(tokenizer.encode(WORDS * 5)[:96]).view(4, 24)
    trained = _fitted(model, ids_NT)
    assert least_layers(trained, 2, ids_NT) == (1, 3)


def _fitted(model: CausalLM, ids_NT: torch.Tensor) -> CausalLM:
    """A few steps on these windows; what is zero stays so."""
    parameters = [
        p for name, p in model.named_parameters() if p.dim() == 2 and not any(f"layers.{n}." in name for n in (1, 3))
    ]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(parameters, 3e-3)
    for _ in range(60):
        loss = sum(nn.functional.cross_entropy(model(ids_T, torch.arange(24))[:-1], ids_T[1:]) for ids_T in ids_NT)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.requires_grad_(False)


def test_units_that_reach_nothing_are_worth_nothing(tokenizer):
    model, _ = make(tokenizer)
    model.trunk.layers[2].attention.o.weight[:, :32] = 0  # the first group's two heads of 16
    model.trunk.layers[2].feedforward.down.weight[:, 5] = 0
    importance = unit_importance(model, IDS)
    assert importance.groups[2][0] == 0
    assert importance.groups[2][1] > 0
    assert importance.channels[2][5] == 0
    assert (importance.channels[2] > 0).sum() == 95


def test_importance_is_the_length_of_what_a_unit_writes(tokenizer):
    model, _ = make(tokenizer)
    seen: dict[str, torch.Tensor] = {}
    layer = model.trunk.layers[3]
    hooks = [
        layer.feedforward.down.register_forward_pre_hook(lambda _, inputs: seen.update(down=inputs[0])),
        layer.attention.o.register_forward_pre_hook(lambda _, inputs: seen.update(o=inputs[0])),
    ]
    model.hidden(IDS[0], torch.arange(24))
    for hook in hooks:
        hook.remove()
    found = unit_importance(model, IDS[:1])
    without = seen["down"].clone()
    without[:, 7] = 0
    down, o = layer.feedforward.down, layer.attention.o
    torch.testing.assert_close(found.channels[3][7], (down(seen["down"]) - down(without)).norm())
    without = seen["o"].clone()
    without[:, 32:] = 0
    torch.testing.assert_close(found.groups[3][1], (o(seen["o"]) - o(without)).norm())


# --- the vocabulary ------------------------------------------------------------------------------------------------


def test_a_smaller_vocabulary_encodes_its_texts_as_before_and_all_others_without_loss(tokenizer):
    smaller = cut_vocabulary(tokenizer, [WORDS])
    assert len(smaller.kept) < tokenizer.vocab_size
    ids = smaller.tokenizer.encode(WORDS)
    assert [smaller.kept[token] for token in ids] == tokenizer.encode(WORDS)
    for other in (OTHER, "flour sugar butter kitchen", ""):
        again = smaller.tokenizer.encode(other)
        assert smaller.tokenizer.decode(again) == other
    assert len(smaller.tokenizer.encode("kitchen recipe")) > len(tokenizer.encode("kitchen recipe"))
    special = set(tokenizer.backend.get_added_tokens_decoder())
    assert special <= set(smaller.kept)
    assert [smaller.kept[token] for token in smaller.tokenizer.eos_ids] == list(tokenizer.eos_ids)


def test_a_vocabulary_without_bytes_to_fall_back_on_is_refused():
    vocab = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "cat", "##s"])}
    backend = tokenizer_json.build(tokenizer_json.wordpiece(vocab, lowercase=True), where="test")
    with pytest.raises(UsageError, match="no single bytes"):
        cut_vocabulary(Tokenizer(backend), ["cat"])


def test_a_real_vocabulary(smollm2_gguf, shared_data):
    tokenizer = Checkpoint.open(smollm2_gguf).tokenizer()
    some = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:100_000]
    smaller = cut_vocabulary(tokenizer, [some])
    assert smaller.used < len(smaller.kept) < 9000
    assert [smaller.kept[token] for token in smaller.tokenizer.encode(some)] == tokenizer.encode(some)
    chat = "<|im_start|>user\n" + OTHER + "<|im_end|>"
    assert smaller.tokenizer.decode(smaller.tokenizer.encode(chat), skip_special_tokens=False) == chat


# --- the command's function ----------------------------------------------------------------------------------------


@pytest.mark.peer
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_transformers_opens_what_is_cut(saved, text, architecture):
    transformers = pytest.importorskip("transformers")
    base = saved(architecture)
    settings = StructuredSettings(layers=1, heads=0.5, channels=0.4, vocab=(str(text),))
    result = prune_structured(
        str(base), settings, name="small", sources=[str(text)], window=16, samples=4, measure_speed=False
    )
    config = json.loads((Path(result.path) / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (3, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (2, 1)
    assert config["vocab_size"] == result.sizes[1]["vocab_size"] < result.sizes[0]["vocab_size"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.path, dtype=torch.float32).eval()
    ours = Checkpoint.open(result.path).load(torch.float32)
    ids_T = torch.arange(20) * 5 % config["vocab_size"]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids_T, torch.arange(20)), theirs(ids_T[None]).logits[0], rtol=1e-3, atol=1e-3)
    words = "the cat sat on the mat"
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(result.path)
    our_tokenizer = Checkpoint.open(result.path).tokenizer()
    assert their_tokenizer(words, add_special_tokens=False)["input_ids"] == our_tokenizer.encode(
        words, add_special_tokens=False
    )


def test_the_result_is_measured_and_published_with_its_parent(saved, text):
    base = saved()
    store.pull(str(base), "whole")
    result = prune_structured(
        "whole", StructuredSettings(layers=1, channels=0.3), sources=[str(text)], window=16, samples=4
    )
    assert result.model == "whole-cut@v1"
    assert result.sizes[1]["num_hidden_layers"] == 3
    assert result.parameters[1] < result.parameters[0]
    assert result.bytes[1] == 4 * result.parameters[1]
    assert result.loss[0] > 0
    assert all(speed > 0 for speed in (*result.decode, *result.prefill))
    stored = store.find("whole-cut")
    assert [(parent.relation, parent.name) for parent in stored.parents] == [("pruned_from", "whole@v1")]
    assert Run.open(result.run).record.result["model"] == "whole-cut@v1"
    assert store.verify("whole-cut") == []


def test_the_number_format_of_the_base_stays(saved, text, tokenizer, tmp_path):
    model, family = make(tokenizer)
    base = save_checkpoint(model.bfloat16(), family, tmp_path / "bf16", tokenizer=tokenizer)
    result = prune_structured(
        str(base),
        StructuredSettings(layers=2),
        name="x",
        sources=[str(text)],
        window=16,
        samples=4,
        measure_speed=False,
    )
    assert Checkpoint.open(result.path).stored_kind() == "BF16"
    assert result.bytes[1] == 2 * result.parameters[1]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"layers": 4}, "nothing would be left"),
        ({"heads": 0.2}, "whole groups of 2"),
        ({"channels": 0.01}, "steps of 32"),
    ],
)
def test_cuts_that_cannot_be_are_refused(saved, text, settings, match, craton_home):
    with pytest.raises(UsageError, match=match):
        prune_structured(str(saved()), StructuredSettings(**settings), sources=[str(text)], window=16, samples=4)
    assert not (craton_home / "models").exists()
    assert not (craton_home / "runs").exists()


def test_experts_and_configs_that_cannot_say_a_cut_are_refused(saved, text):
    experts = saved("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(UsageError, match="mixture of experts"):
        prune_structured(str(experts), StructuredSettings(layers=1), sources=[str(text)], window=16, samples=4)


def test_gpt2_loses_layers_but_no_heads(tokenizer, text, tmp_path):
    hf = {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": tokenizer.vocab_size,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
    }
    family = family_of(hf, "test")
    model = build(family.config(Keys(hf, "test")))
    initialise(model, 0)
    save_checkpoint(model, family, tmp_path / "gpt2", tokenizer=tokenizer)
    asked: dict[str, Any] = {"sources": [str(text)], "window": 16, "samples": 4, "measure_speed": False}
    with pytest.raises(UsageError, match="gpt2"):
        prune_structured(str(tmp_path / "gpt2"), StructuredSettings(heads=0.5), **asked)
    assert prune_structured(str(tmp_path / "gpt2"), StructuredSettings(layers=1), **asked).sizes[1] == {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "vocab_size": tokenizer.vocab_size,
    }


def test_nothing_to_cut_is_said():
    with pytest.raises(ValueError, match="nothing to remove"):
        StructuredSettings()


def test_a_cut_tells_what_it_did(tokenizer):
    model, _ = make(tokenizer)
    done = cut(model, StructuredSettings(layers=1, heads=0.5, channels=0.5), IDS)
    assert len(done.removed_layers) == 1
    assert done.decisions[1:] == ("1 of 2 key-value heads stay in each layer", "64 of 96 channels stay in each layer")
