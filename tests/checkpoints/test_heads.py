"""Heads in published files: classifiers and masked language models, to and from transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import craton
from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families import FAMILIES, classifier_family, family_of, masked_lm_family
from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.heads import CLASSIFIERS, IMAGE_CLASSIFIERS
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, UsageError
from craton.models import CausalLM, Classifier, ClassifierConfig, Encoder, MaskedLM, MaskedLMConfig, build
from craton.trunk.trunk import sequence_layout

DECODER: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PEERS: dict[str, dict[str, Any]] = {
    "Llama": DECODER,
    "Qwen2": DECODER,
    "Qwen3": {**DECODER, "head_dim": 8},
    "Gemma3Text": {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8},
    "GPTNeoX": ENCODER,
    "GPT2": GPT2,
    "Bert": ENCODER,
    "Roberta": ENCODER,
    "XLMRoberta": ENCODER,
}
LABELS = ("کارت گم شد", "top up", "balance")
LENGTHS = [1, 9, 9, 14]
IDS = torch.randint(5, 99, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))


def config_of(architecture: str, **values: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **DECODER, **GPT2, "rotary_pct": 1.0, **values}


def fresh(architecture: str, labels: tuple[str, ...] = LABELS) -> tuple[Classifier, Any]:
    """A random classifier over a family's model, and the family to save it under."""
    values = config_of(architecture)
    family = family_of(values, "test")
    backbone = build(family.config(Keys(values, "test")))
    assert isinstance(backbone, CausalLM | Encoder)
    return Classifier.over(backbone, labels).eval(), classifier_family(family)


def logits(model: Classifier, lengths: list[int] = LENGTHS) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[: sum(lengths)], *sequence_layout(lengths), lengths)


def peer(kind: str, name: str) -> Any:
    """A random model of transformers, large enough in every weight that each shows in the logits."""
    transformers = pytest.importorskip("transformers")
    labels = {"id2label": dict(enumerate(LABELS))} if kind == "SequenceClassification" else {}
    config = getattr(transformers, f"{name}Config")(**PEERS[name], **labels)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}For{kind}")(config).float().eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in model.state_dict().values():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor + 0.3 * noise if tensor.dim() == 1 else noise * tensor.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert ((ours - theirs).abs().max() / theirs.abs().max()).item() < 2e-4


@pytest.mark.peer
@pytest.mark.parametrize("name", PEERS)
def test_transformers_classifier_gives_the_same_logits_here_and_back_there(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = peer("SequenceClassification", name)
    theirs.save_pretrained(tmp_path / "theirs")
    reference = torch.cat([theirs(part[None]).logits for part in IDS.split(LENGTHS)])

    checkpoint = Checkpoint.open(tmp_path / "theirs")
    ours = checkpoint.load(torch.float32)
    assert isinstance(ours, Classifier)
    assert ours.config.labels == LABELS
    assert_close(logits(ours), reference)

    save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
    auto = transformers.AutoModelForSequenceClassification
    again, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.id2label == dict(enumerate(LABELS))
    assert_close(torch.cat([again.eval()(part[None]).logits for part in IDS.split(LENGTHS)]), reference)
    assert Checkpoint.open(tmp_path / "ours").config == checkpoint.config


@pytest.mark.peer
@pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta"])
def test_transformers_masked_lm_gives_the_same_logits_here_and_back_there(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = peer("MaskedLM", name)
    theirs.save_pretrained(tmp_path / "theirs")
    reference = torch.cat([theirs(part[None]).logits[0] for part in IDS.split(LENGTHS)])

    checkpoint = Checkpoint.open(tmp_path / "theirs").as_masked_lm()
    ours = checkpoint.load(torch.float32)
    assert isinstance(ours, MaskedLM)
    with torch.no_grad():
        assert_close(ours(IDS, *sequence_layout(LENGTHS)), reference)

    save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
    auto = transformers.AutoModelForMaskedLM
    again, report = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(again) is type(theirs)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_close(torch.cat([again.eval()(part[None]).logits[0] for part in IDS.split(LENGTHS)]), reference)


@pytest.mark.peer
def test_every_classifier_carries_a_name_that_transformers_knows() -> None:
    transformers = pytest.importorskip("transformers")
    heads = CLASSIFIERS | IMAGE_CLASSIFIERS
    assert all(hasattr(transformers, name) for family in heads.values() for name in family.architectures)
    without = {family.name for family in FAMILIES} - heads.keys()
    # A speech model has no class of texts; DINOv3 is published without a head; CLIP, SigLIP and two encoders side by
    # side know classes by words, SAM knows masks alone.
    chatting = {"llava", "idefics3", "smolvlm"}
    assert without == {"modernbert", "whisper", "clip", "siglip", "vision_text", "dinov3", "sam"} | chatting


ARCHITECTURES = ["LlamaForCausalLM", "GPT2LMHeadModel", "BertModel", "RobertaModel"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_classifier_is_the_same_when_it_is_loaded(architecture: str, tmp_path: Path) -> None:
    model, family = fresh(architecture)
    save_checkpoint(model, family, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["label2id"] == {label: number for number, label in enumerate(LABELS)}
    loaded = Checkpoint.open(tmp_path).load(torch.float32)
    assert isinstance(loaded, Classifier)
    assert loaded.config == model.config
    assert torch.equal(logits(loaded), logits(model))


def test_the_files_hold_no_next_token_head(tmp_path: Path) -> None:
    model, family = fresh("LlamaForCausalLM")
    save_checkpoint(model, family, tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert "score.weight" in names
    assert not {"score.bias", "lm_head.weight"} & names


def test_a_masked_lm_opens_as_the_encoder_in_it_and_as_itself(tmp_path: Path) -> None:
    values = config_of("BertForMaskedLM")
    family = masked_lm_family(family_of(values, "test"))
    config = family.config(Keys(values, "test"))
    assert isinstance(config, MaskedLMConfig)
    model = MaskedLM(config).eval()
    save_checkpoint(model, family, tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    encoder, masked = checkpoint.load(torch.float32), checkpoint.as_masked_lm().load(torch.float32)
    assert isinstance(encoder, Encoder)
    assert isinstance(masked, MaskedLM)
    layout = sequence_layout(LENGTHS)
    with torch.no_grad():
        assert torch.equal(encoder(IDS, *layout), model.encoder(IDS, *layout))
        assert torch.equal(masked(IDS, *layout), model(IDS, *layout))


def test_names_without_the_base_and_with_leftovers_of_the_pretraining(tmp_path: Path) -> None:
    values = config_of("BertForMaskedLM")
    family = masked_lm_family(family_of(values, "test"))
    config = family.config(Keys(values, "test"))
    assert isinstance(config, MaskedLMConfig)
    model = MaskedLM(config).eval()
    save_checkpoint(model, family, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): t
        for name, t in load_file(path).items()
    }
    leftovers = ("cls.seq_relationship.weight", "cls.predictions.decoder.weight", "bert.pooler.dense.weight")
    save_file(tensors | {name: torch.zeros(2, 2) for name in leftovers}, path)
    masked = Checkpoint.open(tmp_path).as_masked_lm().load(torch.float32)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in masked.state_dict().items())


def test_what_has_no_such_head_is_refused(tmp_path: Path) -> None:
    values = config_of("BertModel")
    family = family_of(values, "test")
    save_checkpoint(build(family.config(Keys(values, "test"))), family, tmp_path)
    with pytest.raises(CheckpointError, match="BertModel has no masked-language-model head"):
        Checkpoint.open(tmp_path).as_masked_lm()
    modernbert = family_of({"architectures": ["ModernBertModel"]}, "test")
    with pytest.raises(CheckpointError, match="no classification head is known for the family modernbert"):
        classifier_family(modernbert)


def test_a_classifier_neither_writes_nor_embeds(tmp_path: Path) -> None:
    model, family = fresh("LlamaForCausalLM")
    save_checkpoint(model, family, tmp_path)
    with pytest.raises(UsageError, match="is a classifier"):
        craton.load(str(tmp_path))


def test_a_mean_over_bert_has_no_published_layout(tmp_path: Path) -> None:
    values = config_of("BertModel")
    family = family_of(values, "test")
    encoder = build(family.config(Keys(values, "test")))
    assert isinstance(encoder, Encoder)
    model = Classifier.over(encoder, LABELS, pooling="mean")
    with pytest.raises(CheckpointError, match="no place for a mean"):
        save_checkpoint(model, classifier_family(family), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "none for class '1'"),
        ({"id2label": {"0": "a", "1": "a"}}, "two labels have one name"),
        ({"num_labels": 0}, "at least 1 item"),
        ({"problem_type": "regression"}, "problem_type = 'regression' is not supported"),
        ({"classifier_dropout": 1.5}, "dropout"),
    ],
)
def test_a_config_that_makes_no_classifier(values: dict[str, Any], words: str) -> None:
    config = config_of("LlamaForSequenceClassification", **values)
    with pytest.raises(CheckpointError, match=words):
        family_of(config, "config.json").config(Keys(config, "config.json"))


def test_labels_that_are_not_named() -> None:
    config = config_of("LlamaForSequenceClassification", num_labels=3)
    read = family_of(config, "config.json").config(Keys(config, "config.json"))
    assert isinstance(read, ClassifierConfig)
    assert read.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_head_of_another_shape_is_named(tmp_path: Path) -> None:
    model, family = fresh("LlamaForCausalLM")
    save_checkpoint(model, family, tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"score.weight": torch.ones(2, 32)}, path)
    with pytest.raises(CheckpointError, match=r"'score\.weight' has shape \[2, 32\], the config asks for \[3, 32\]"):
        Checkpoint.open(tmp_path).load(torch.float32)
