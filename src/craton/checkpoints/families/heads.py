"""The published heads on top of a family: `LlamaForSequenceClassification`, `BertForMaskedLM` and their like.

Each is a family of its own that is made of its base: the same config with a few keys more, the same tensors (under the
base's name, where the files have it) and the head's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from craton.checkpoints.families import (
    bert,
    deepseek,
    dinov2,
    gemma,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen,
    qwen_moe,
    roberta,
    smollm3,
    vit,
)
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import (
    CausalLMConfig,
    ClassifierConfig,
    EncoderConfig,
    ImageClassifierConfig,
    MaskedLMConfig,
    ModelConfig,
    VisionConfig,
)
from craton.models.vision import ImagePooling
from craton.trunk import FeedForwardConfig

# Names there -> here of the head's modules.
CAUSAL_HEAD = {"score": "head"}
BERT_HEAD = {"classifier": "head"}
ROBERTA_HEAD = {"classifier.dense": "backbone.pooler", "classifier.out_proj": "head"}
BERT_TRANSFORM = {"cls.predictions.transform.dense": "dense", "cls.predictions.transform.LayerNorm": "norm"}
ROBERTA_TRANSFORM = {"lm_head.dense": "dense", "lm_head.layer_norm": "norm"}


def _renames(base: Family, prefix: str, head: str) -> tuple[tuple[str, str], ...]:
    # The base's, and then the prefix before all names but the head's, whether the file has it or not.
    return base.renames + (((rf"^(?!{head}\.)", prefix),) if prefix else ())


def _ignored(base: Family, prefix: str, *more: str) -> tuple[str, ...]:
    return tuple(re.escape(prefix) + pattern for pattern in (*base.ignored, *more))


def _moved(entries: list[Entry], theirs: str, ours: str) -> list[Entry]:
    # The base's entries under these prefixes.
    return [
        replace(e, theirs=tuple(theirs + name for name in e.theirs), ours=tuple(ours + name for name in e.ours))
        for e in entries
    ]


def _classifier(base: Family, architecture: str, parts: Mapping[str, str] = CAUSAL_HEAD, prefix: str = "") -> Family:
    kinds = ("weight",) if parts is CAUSAL_HEAD else ("weight", "bias")

    def read_config(keys: Keys) -> ModelConfig:
        keys.refuse("problem_type", "single_label_classification")
        backbone = base.read_config(keys)
        assert isinstance(backbone, CausalLMConfig | EncoderConfig)
        return ClassifierConfig(
            labels=_read_labels(keys),
            pooling="last" if isinstance(backbone, CausalLMConfig) else "cls",
            backbone=backbone,
            dropout=keys.get("classifier_dropout", float, 0.0),
        )

    def write_config(config: ModelConfig) -> dict[str, Any]:
        assert isinstance(config, ClassifierConfig)
        if config.pooling == "mean":
            raise CheckpointError(
                f"{architecture} reads the first token and has no place for a mean",
                remedy="train the classifier with the pooling 'cls'",
            )
        return base.write_config(config.backbone) | {
            "architectures": [architecture],
            "id2label": {str(number): label for number, label in enumerate(config.labels)},
            "label2id": {label: number for number, label in enumerate(config.labels)},
            "problem_type": "single_label_classification",
            "classifier_dropout": config.dropout,
        }

    def entries(config: ModelConfig) -> list[Entry]:
        assert isinstance(config, ClassifierConfig)
        head = [same(f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in parts.items() for kind in kinds]
        claimed = {name for entry in head for name in entry.ours}
        below = _moved(base.entries(config.backbone), prefix, "backbone.")
        return [entry for entry in below if not claimed.intersection(entry.ours)] + head

    # RoBERTa's first files carry a pooler that its head does not read.
    unused = (r"pooler\..*",) if parts is ROBERTA_HEAD else ()
    return Family(
        name=f"{base.name}-classifier",
        architectures=(architecture,),
        read_config=read_config,
        write_config=write_config,
        entries=entries,
        ignored=_ignored(base, prefix, *unused),
        renames=_renames(base, prefix, next(iter(parts)).partition(".")[0]),
    )


def _image_classifier(base: Family, architecture: str, prefix: str, pooling: ImagePooling) -> Family:
    """pooling: what the published head reads."""

    def read_config(keys: Keys) -> ModelConfig:
        keys.refuse("problem_type", "single_label_classification")
        backbone = base.read_config(keys)
        assert isinstance(backbone, VisionConfig)
        backbone = backbone.model_copy(update={"pooling": pooling})
        return ImageClassifierConfig(labels=_read_labels(keys), backbone=backbone)

    def write_config(config: ModelConfig) -> dict[str, Any]:
        assert isinstance(config, ImageClassifierConfig)
        if config.backbone.pooling != pooling:
            raise CheckpointError(
                f"{architecture} reads {pooling!r} and has no place for {config.backbone.pooling!r}",
                remedy=f"train the classifier with the pooling {pooling!r}",
            )
        return base.write_config(config.backbone) | {
            "architectures": [architecture],
            "id2label": {str(number): label for number, label in enumerate(config.labels)},
            "label2id": {label: number for number, label in enumerate(config.labels)},
            "problem_type": "single_label_classification",
        }

    def entries(config: ModelConfig) -> list[Entry]:
        assert isinstance(config, ImageClassifierConfig)
        head = [same(f"classifier.{kind}", f"head.{kind}") for kind in ("weight", "bias")]
        return _moved(base.entries(config.backbone), prefix, "backbone.") + head

    return Family(
        name=f"{base.name}-classifier",
        architectures=(architecture,),
        read_config=read_config,
        write_config=write_config,
        entries=entries,
        ignored=_ignored(base, prefix, r"pooler\..*"),
        renames=_renames(base, prefix, "classifier"),
        modules=base.modules,
    )


def _read_labels(keys: Keys) -> tuple[str, ...]:
    named = keys.get("id2label", dict, {})
    if not named:
        return tuple(f"LABEL_{number}" for number in range(keys.get("num_labels", int, 2)))
    try:
        return tuple(str(named[str(number)]) for number in range(len(named)))
    except KeyError as missing:
        raise CheckpointError(
            f"'id2label' names {len(named)} labels, but none for class {missing}", where=f"{keys.where}: key 'id2label'"
        ) from None


def _masked_lm(base: Family, parts: Mapping[str, str], prefix: str, *, gelu: bool) -> Family:
    """gelu: the head's activation is GELU whatever the encoder's is."""
    architectures = tuple(name for name in base.architectures if not name.endswith("Model"))
    dense = next(iter(parts))
    head, bias = dense.partition(".")[0], re.sub(r"(transform\.)?dense$", "bias", dense)

    def read_config(keys: Keys) -> ModelConfig:
        keys.refuse("tie_word_embeddings", True)
        encoder = base.read_config(keys)
        assert isinstance(encoder, EncoderConfig)
        norm, feedforward = encoder.trunk.input_norm, encoder.trunk.layers[0].feedforward
        assert norm is not None
        assert isinstance(feedforward, FeedForwardConfig)
        activation = "gelu" if gelu else feedforward.activation
        encoder = encoder.model_copy(update={"pooler": False})
        return MaskedLMConfig(encoder=encoder, activation=activation, norm=norm)

    def write_config(config: ModelConfig) -> dict[str, Any]:
        assert isinstance(config, MaskedLMConfig)
        return base.write_config(config.encoder) | {"architectures": [architectures[0]]}

    def entries(config: ModelConfig) -> list[Entry]:
        assert isinstance(config, MaskedLMConfig)
        kinds = ("weight", "bias")
        transform = [same(f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in parts.items() for kind in kinds]
        return [*_moved(base.entries(config.encoder), prefix, "encoder."), *transform, same(bias, "bias")]

    return Family(
        name=f"{base.name}-masked-lm",
        architectures=architectures,
        read_config=read_config,
        write_config=write_config,
        entries=entries,
        # The pooler and `seq_relationship` belong to the second task of BERT's pretraining; the decoder is the
        # embedding again.
        ignored=(*_ignored(base, prefix, r"pooler\..*"), rf"{head}\.(predictions\.)?decoder\..*", r"cls\.seq_.*"),
        renames=_renames(base, prefix, head),
    )


DECODERS = (
    deepseek.DEEPSEEK_V2,
    deepseek.DEEPSEEK_V3,
    gemma.GEMMA1,
    gemma.GEMMA2,
    gpt_neox.GPT_NEOX,
    llama.LLAMA,
    mistral.MISTRAL,
    mixtral.MIXTRAL,
    olmo2.OLMO2,
    phi3.PHI3,
    qwen.QWEN2,
    qwen.QWEN3,
    qwen_moe.QWEN2_MOE,
    qwen_moe.QWEN3_MOE,
    smollm3.SMOLLM3,
)

CLASSIFIERS: Mapping[str, Family] = {
    base.name: _classifier(base, base.architectures[0].replace("ForCausalLM", "ForSequenceClassification"))
    for base in DECODERS
} | {
    "gemma3": _classifier(gemma.GEMMA3, "Gemma3TextForSequenceClassification"),
    "gpt2": _classifier(gpt2.GPT2, "GPT2ForSequenceClassification", prefix="transformer."),
    "bert": _classifier(bert.BERT, "BertForSequenceClassification", BERT_HEAD, "bert."),
    "roberta": _classifier(roberta.ROBERTA, "RobertaForSequenceClassification", ROBERTA_HEAD, "roberta."),
    "xlm_roberta": _classifier(roberta.XLM_ROBERTA, "XLMRobertaForSequenceClassification", ROBERTA_HEAD, "roberta."),
}

IMAGE_CLASSIFIERS: Mapping[str, Family] = {
    "vit": _image_classifier(vit.VIT, "ViTForImageClassification", "vit.", "cls"),
    "dinov2": _image_classifier(dinov2.DINOV2, "Dinov2ForImageClassification", "dinov2.", "cls_mean"),
    "dinov2_with_registers": _image_classifier(
        dinov2.WITH_REGISTERS, "Dinov2WithRegistersForImageClassification", "dinov2_with_registers.", "cls_mean"
    ),
}

MASKED_LMS: Mapping[str, Family] = {
    "bert": _masked_lm(bert.BERT, BERT_TRANSFORM, "bert.", gelu=False),
    "roberta": _masked_lm(roberta.ROBERTA, ROBERTA_TRANSFORM, "roberta.", gelu=True),
    "xlm_roberta": _masked_lm(roberta.XLM_ROBERTA, ROBERTA_TRANSFORM, "roberta.", gelu=True),
}


def classifier_family(base: Family) -> Family:
    """The family under which a classifier over a model of `base`, of texts or pictures, is saved. Raises
    CheckpointError where none is."""
    return _of(base, {**CLASSIFIERS, **IMAGE_CLASSIFIERS}, "classification")


def published_pooling(base: Family) -> ImagePooling:
    """What the published classifier over an encoder of `base` reads of it."""
    return "cls_mean" if base.name.startswith("dinov2") else "cls"


def head_names(family: Family, config: ClassifierConfig | ImageClassifierConfig) -> dict[str, str]:
    """Ours, by their names in `family`'s files, of the tensors that are the head's (see `ClassifierConfig`)."""
    names = [(entry.theirs[0], entry.ours[0]) for entry in family.entries(config) if len(entry.ours) == 1]
    return {theirs: ours for theirs, ours in names if ours.rpartition(".")[0] in config.head_modules}


def masked_lm_family(base: Family) -> Family:
    """The family under which a `MaskedLM` over an encoder of `base` is saved. Raises CheckpointError where none is."""
    return _of(base, MASKED_LMS, "masked-language-model")


def _of(base: Family, families: Mapping[str, Family], head: str) -> Family:
    if base.name not in families:
        raise CheckpointError(
            f"no {head} head is known for the family {base.name}", remedy=f"it is for: {', '.join(sorted(families))}"
        )
    return families[base.name]
