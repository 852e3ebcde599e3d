"""PEFT's files, both ways, against the real `peft` on the real model classes of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import classifier_family
from craton.checkpoints.peft_reader import read_summary
from craton.errors import CheckpointError, UnknownName, UsageError
from craton.finetuning.adapter_files import check_saveable, load_adapter, save_adapter
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.lora import adapter_parameters, apply_lora, disabled, use_adapter
from craton.models import AnyModel, Classifier
from craton.trunk.trunk import sequence_layout

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match"),
]

TOLERANCE = 2e-4  # of the largest logit
COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ROBERTA = {"max_position_embeddings": 66, "pad_token_id": 1}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, num_key_value_heads=2),
    "phi3": lambda: transformers.Phi3Config(**COMMON, num_key_value_heads=2, pad_token_id=0),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**COMMON),
    "bert": lambda: transformers.BertConfig(**COMMON, max_position_embeddings=64),
    "modernbert": lambda: transformers.ModernBertConfig(**COMMON, **SPECIAL, max_position_embeddings=64),
}
CAUSAL = ("llama", "qwen2", "phi3", "gpt2", "gpt_neox")
ALL_LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"],
    "bert": ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
}
VARIANTS: dict[str, dict[str, Any]] = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}}
IDS = torch.randint(3, 96, (24,), generator=torch.Generator().manual_seed(1))


def randomise(model: torch.nn.Module, scale: float = 1.0, names: str = "") -> None:
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if names in name and tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(tensor + 0.3 * noise if tensor.dim() == 1 else scale * noise * tensor.shape[-1] ** -0.5)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Callable[[str], tuple[Any, Checkpoint]]:
    """pair(family) -> a fresh copy of a random model of transformers, and its files as we open them."""
    made: dict[str, tuple[Any, Checkpoint]] = {}

    def make(family: str) -> tuple[Any, Checkpoint]:
        if family not in made:
            auto = transformers.AutoModelForCausalLM if family in CAUSAL else transformers.AutoModel
            theirs = auto.from_config(CONFIGS[family](), attn_implementation="eager").float().eval()
            randomise(theirs)
            folder = tmp_path_factory.mktemp(family)
            theirs.save_pretrained(folder)
            made[family] = theirs, Checkpoint.open(folder)
        theirs, checkpoint = made[family]
        return copy.deepcopy(theirs), checkpoint

    return make


@torch.inference_mode()
def ours_on(model: AnyModel, ids: Tensor = IDS) -> Tensor:
    return model(ids, torch.arange(len(ids)))


@torch.inference_mode()
def theirs_on(model: Any, ids: Tensor = IDS) -> Tensor:
    outputs = model(input_ids=ids[None])
    return (outputs.logits if "logits" in outputs else outputs.last_hidden_state)[0]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def train(model: torch.nn.Module) -> None:
    """As if it had been trained: an adapter that changes a lot."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(parameter * (1 + 0.3 * noise.abs()) if name.endswith("magnitude") else 0.2 * noise)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_ours_saved_then_loaded_by_peft(pair, tmp_path, family, variant):
    theirs, checkpoint = pair(family)
    model = checkpoint.load(torch.float32)
    before = ours_on(model)
    apply_lora(model, LoraSettings(rank=3, alpha=5, targets=("all",), **VARIANTS[variant]))
    train(model)
    after = ours_on(model)
    assert difference(after, before) > 0.05
    task = "CAUSAL_LM" if family in CAUSAL else "FEATURE_EXTRACTION"
    save_adapter(model, checkpoint.family, tmp_path / "ours", task=task, base=str(checkpoint.path))
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    assert difference(theirs_on(loaded), after) < TOLERANCE
    assert set(targets_in(tmp_path / "ours")) == set(ALL_LINEAR[family])

    again = checkpoint.load(torch.float32)
    adapter = load_adapter(again, checkpoint.family, tmp_path / "ours", "again")
    assert difference(ours_on(again), after) < 1e-5
    assert adapter.base == str(checkpoint.path)
    assert {name.replace(".again.", ".default."): p.shape for name, p in adapter_parameters(again).items()} == {
        name: p.shape for name, p in adapter_parameters(model).items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", CONFIGS)
def test_theirs_saved_then_loaded_by_us(pair, tmp_path, family, variant):
    theirs, checkpoint = pair(family)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=ALL_LINEAR[family],
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM" if family in CAUSAL else "FEATURE_EXTRACTION",
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    randomise(adapted, 0.5, "lora_")
    adapted.save_pretrained(tmp_path)
    model = checkpoint.load(torch.float32)
    plain = ours_on(model)
    load_adapter(model, checkpoint.family, tmp_path)
    assert difference(ours_on(model), theirs_on(adapted)) < TOLERANCE
    with disabled(model):
        assert torch.equal(ours_on(model), plain)


def targets_in(folder: Path) -> list[str]:
    return json.loads((folder / "adapter_config.json").read_text())["target_modules"]


@pytest.mark.parametrize(
    ("family", "ours", "theirs"),
    [
        ("llama", "q,v", {"q_proj", "v_proj"}),
        ("llama", "trunk.layers.1.*.q", {"model.layers.1.self_attn.q_proj"}),
        ("phi3", "q,v,up", {"qkv_proj", "gate_up_proj"}),
        ("gpt_neox", "attention", {"query_key_value", "attention.dense"}),
        ("gpt2", "feedforward.down", {"mlp.c_proj"}),
    ],
)
def test_a_part_of_the_layers(pair, tmp_path, family, ours, theirs):
    hf, checkpoint = pair(family)
    model = checkpoint.load(torch.float32)
    apply_lora(model, LoraSettings(rank=2, targets=(ours,), rslora=True))
    train(model)
    save_adapter(model, checkpoint.family, tmp_path)
    assert set(targets_in(tmp_path)) == theirs
    loaded = peft.PeftModel.from_pretrained(hf, tmp_path).eval()
    assert difference(theirs_on(loaded), ours_on(model)) < TOLERANCE


def test_ranks_and_alphas_that_differ_by_module(pair, tmp_path):
    theirs, checkpoint = pair("llama")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 2},
        alpha_pattern={r"^model.layers.1.*v_proj": 3},
        task_type="CAUSAL_LM",
    )
    adapted = peft.get_peft_model(theirs, config).eval()
    randomise(adapted, 0.5, "lora_")
    adapted.save_pretrained(tmp_path / "theirs")
    model = checkpoint.load(torch.float32)
    load_adapter(model, checkpoint.family, tmp_path / "theirs")
    expected = theirs_on(adapted)
    assert difference(ours_on(model), expected) < TOLERANCE
    save_adapter(model, checkpoint.family, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    assert written["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    assert written["alpha_pattern"] == {"model.layers.1.self_attn.v_proj": 3}
    loaded = peft.PeftModel.from_pretrained(pair("llama")[0], tmp_path / "ours").eval()
    assert difference(theirs_on(loaded), expected) < TOLERANCE


def test_a_head_tied_to_the_embedding(pair, tmp_path):
    theirs, checkpoint = pair("llama")
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, target_modules=["lm_head"], task_type="CAUSAL_LM")
    ).eval()
    randomise(adapted, 0.5, "lora_")
    adapted.save_pretrained(tmp_path / "theirs")  # with a copy of the base's weight
    model = checkpoint.load(torch.float32)
    load_adapter(model, checkpoint.family, tmp_path / "theirs")
    assert difference(ours_on(model), theirs_on(adapted)) < TOLERANCE
    save_adapter(model, checkpoint.family, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(pair("llama")[0], tmp_path / "ours").eval()
    assert difference(theirs_on(loaded), theirs_on(adapted)) < TOLERANCE


LABELS = ("کارت گم شد", "top up", "balance")
CLASSIFIERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "bert": ("BertForSequenceClassification", CONFIGS["bert"]),
    "roberta": ("RobertaForSequenceClassification", lambda: transformers.RobertaConfig(**COMMON, **ROBERTA)),
    "llama": ("LlamaForSequenceClassification", CONFIGS["llama"]),
    "gpt2": ("GPT2ForSequenceClassification", CONFIGS["gpt2"]),
}


@pytest.fixture
def classifiers(tmp_path) -> Callable[[str], tuple[Any, Checkpoint]]:
    """classifiers(family) -> a random classifier of transformers, and its files as we open them."""

    def make(family: str) -> tuple[Any, Checkpoint]:
        name, config = CLASSIFIERS[family]
        values = config()
        values.id2label = dict(enumerate(LABELS))
        values.pad_token_id = values.pad_token_id or 0
        values._attn_implementation = "eager"
        theirs = getattr(transformers, name)(values).float().eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "base")
        return theirs, Checkpoint.open(tmp_path / "base")

    return make


@torch.inference_mode()
def classes(model: Classifier) -> Tensor:
    return model(IDS, *sequence_layout([len(IDS)]), [len(IDS)])[0]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_and_its_head(classifiers, tmp_path, family):
    theirs, checkpoint = classifiers(family)
    model = checkpoint.load(torch.float32)
    assert isinstance(model, Classifier)
    apply_lora(model, LoraSettings(rank=2, targets=("q,v",)))
    train(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(trained) == {*adapter_parameters(model), *(name for name, _ in model.head_parameters())}
    with torch.no_grad():
        for _, parameter in model.head_parameters():
            parameter += torch.randn(parameter.shape) * 0.3
    check_saveable(model, checkpoint.family)
    save_adapter(model, checkpoint.family, tmp_path / "ours")
    assert read_summary(tmp_path / "ours").labels == LABELS
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path / "ours").eval()
    with torch.inference_mode():
        reference = loaded(input_ids=IDS[None]).logits[0]
    assert difference(classes(model), reference) < TOLERANCE

    loaded.save_pretrained(tmp_path / "theirs")
    assert read_summary(tmp_path / "theirs").labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    again = checkpoint.load(torch.float32)
    load_adapter(again, checkpoint.family, tmp_path / "theirs")
    assert difference(classes(again), reference) < TOLERANCE


def test_a_classifier_as_peft_makes_it_by_itself(classifiers, tmp_path):
    theirs, checkpoint = classifiers("bert")
    adapted = peft.get_peft_model(theirs, peft.LoraConfig(r=2, task_type="SEQ_CLS")).eval()
    randomise(adapted, 0.5, "lora_")
    randomise(adapted, 0.5, "modules_to_save")
    adapted.save_pretrained(tmp_path / "theirs")
    model = checkpoint.load(torch.float32)
    load_adapter(model, checkpoint.family, tmp_path / "theirs")
    with torch.inference_mode():
        assert difference(classes(model), adapted(input_ids=IDS[None]).logits[0]) < TOLERANCE
    with pytest.raises(UsageError, match="one head"):
        load_adapter(model, checkpoint.family, tmp_path / "theirs", "second")


def test_a_classifier_s_adapter_fits_no_other_model(classifiers, pair, tmp_path):
    _, checkpoint = classifiers("llama")
    model = checkpoint.load(torch.float32)
    apply_lora(model, LoraSettings(rank=2, targets=("q,v",)))
    save_adapter(model, checkpoint.family, tmp_path / "ours")
    _, other = pair("llama")
    with pytest.raises(CheckpointError, match=r"no place.*score"):
        load_adapter(other.load(torch.float32), other.family, tmp_path / "ours")
    two = Classifier.over(other.load(torch.float32), ["a", "b"])
    with pytest.raises(CheckpointError, match=r"shape \[3, 32\], the model's \[2, 32\]"):
        load_adapter(two, checkpoint.family, tmp_path / "ours")
    with pytest.raises(UnknownName, match="head"):
        apply_lora(two, LoraSettings(targets=("head",)))


def test_a_reading_that_has_no_published_layout_is_refused_before_training(pair):
    _, checkpoint = pair("bert")
    model = Classifier.over(checkpoint.load(torch.float32), ["a", "b"], pooling="mean")
    apply_lora(model, LoraSettings(rank=2))
    with pytest.raises(CheckpointError, match="no place for a mean"):
        check_saveable(model, classifier_family(checkpoint.family))


EXPERTS = {
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_key_value_heads=2, num_local_experts=3),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **COMMON,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    ),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON, num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
    ),
}


@pytest.fixture
def sparse(tmp_path) -> Callable[[str], tuple[Any, Checkpoint]]:
    """sparse(family) -> a random mixture of experts of transformers, and its files as we open them."""

    def make(family: str) -> tuple[Any, Checkpoint]:
        theirs = transformers.AutoModelForCausalLM.from_config(EXPERTS[family](), attn_implementation="eager").eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path / "base")
        return theirs, Checkpoint.open(tmp_path / "base")

    return make


@pytest.mark.parametrize("part", ["experts.*", "experts.*.down"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_experts(sparse, tmp_path, family, part):
    theirs, checkpoint = sparse(family)
    model = checkpoint.load(torch.float32)
    apply_lora(model, LoraSettings(rank=2, alpha=4, targets=(part, "o")))
    train(model)
    save_adapter(model, checkpoint.family, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours").eval()
    assert difference(theirs_on(loaded), ours_on(model)) < TOLERANCE
    again = checkpoint.load(torch.float32)
    load_adapter(again, checkpoint.family, tmp_path / "ours")
    assert difference(ours_on(again), ours_on(model)) < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": ("mlp",)},  # the shared expert's layers are called the same
        {"targets": ("experts.*.up",)},
        {"targets": ("experts.0.*",)},
        {"targets": ("experts.*",), "rslora": True},
        {"targets": ("experts.*",), "dora": True},
        {"targets": ("experts.*",), "dropout": 0.1},
    ],
)
def test_what_peft_cannot_say_of_experts_is_refused_before_training(sparse, settings):
    _, checkpoint = sparse("deepseek_v3")
    model = checkpoint.load(torch.float32)
    apply_lora(model, LoraSettings(rank=2, **settings))
    with pytest.raises(CheckpointError, match="routed experts"):
        check_saveable(model, checkpoint.family)


def test_a_family_whose_experts_peft_does_not_read(sparse):
    _, checkpoint = sparse("qwen2_moe")
    model = checkpoint.load(torch.float32)
    apply_lora(model, LoraSettings(rank=2, targets=("attention", "shared.*")))
    check_saveable(model, checkpoint.family)
    apply_lora(model, LoraSettings(rank=2, targets=("experts.*",)), "other")
    with pytest.raises(CheckpointError, match="routed experts"):
        check_saveable(model, checkpoint.family, "other")


def test_several_adapters_of_several_files_on_one_base(pair, tmp_path):
    theirs, checkpoint = pair("qwen2")
    expected = {}
    for name, targets in (("one", ["q_proj"]), ("two", ["v_proj", "o_proj"])):
        config = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(copy.deepcopy(theirs), config).eval()
        randomise(adapted, 0.5, "lora_")
        adapted.save_pretrained(tmp_path / name)
        expected[name] = theirs_on(adapted)
    model = checkpoint.load(torch.float32)
    for name in expected:
        load_adapter(model, checkpoint.family, tmp_path / name, name)
    for name in expected:
        use_adapter(model, name)
        assert difference(ours_on(model), expected[name]) < TOLERANCE
    use_adapter(model, None)
    assert difference(ours_on(model), theirs_on(theirs)) < TOLERANCE
