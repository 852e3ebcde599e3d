"""LLaVA 1.5 (Liu 2023, arXiv 2310.03744), in Hugging Face's layout: CLIP or SigLIP, two linear layers, and Llama or
Mistral.

Particular: the pictures' tokens are what a layer before the tower's last gives, so what comes after that layer is not
read, and is not saved again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from craton.checkpoints.families import clip, llama, mistral, siglip
from craton.checkpoints.families.clip import nested
from craton.checkpoints.families.decoder import decoder_entries, read_activation, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.families.vision import write_pictures, write_tower
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ImageChatConfig, ModelConfig, VisionConfig

# Hugging Face's, of the sides that a file does not describe.
VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
CLIP_TOWER, SIGLIP_TOWER = "clip_vision_model", "siglip_vision_model"
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
}
TEXTS: dict[str, tuple[Family, dict[str, Any]]] = {
    "llama": (llama.LLAMA, LLAMA_DEFAULTS),
    "mistral": (mistral.MISTRAL, LLAMA_DEFAULTS | {"intermediate_size": 14336}),
}


def read_text(keys: Keys, *, tied: bool) -> CausalLMConfig:
    """The language model: `text_config`, which files shorten to what differs from the defaults."""
    text = nested(keys, "text_config", {"model_type": "llama"})
    kind = text.need("model_type", str)
    if kind not in TEXTS:
        raise CheckpointError(
            f"a language model of type {kind!r} behind pictures is not supported",
            where=f"{text.where}: key 'model_type'",
            remedy=f"supported: {', '.join(TEXTS)}",
        )
    family, defaults = TEXTS[kind]
    config = family.read_config(text.defaulting(**defaults))
    assert isinstance(config, CausalLMConfig)
    return config.model_copy(update={"tied": tied})


def write_text(config: CausalLMConfig) -> dict[str, Any]:
    """The inverse of `read_text`."""
    windowed = any(layer.attention.window is not None for layer in config.trunk.layers)
    return (mistral if windowed else llama).write_config(config)


def with_pictures(text: CausalLMConfig, **fields: Any) -> ImageChatConfig:
    """This language model with a side that sees."""
    return ImageChatConfig(**{name: getattr(text, name) for name in CausalLMConfig.model_fields}, **fields)


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    vision = nested(keys, "vision_config", {})
    vision.refuse("model_type", CLIP_TOWER, SIGLIP_TOWER)
    clips = vision.get("model_type", str, CLIP_TOWER) == CLIP_TOWER
    strategy = keys.get("vision_feature_select_strategy", str, "default")
    if not clips:
        # SigLIP has no class token, and "default" would leave out its first patch.
        keys.refuse("vision_feature_select_strategy", "full")
        keys.need("vision_feature_select_strategy", str)
    elif strategy not in ("default", "full"):
        keys.refuse("vision_feature_select_strategy", "default", "full")
    tied = keys.get("tie_word_embeddings", bool, False)
    tied = tied or nested(keys, "text_config", {}).get("tie_word_embeddings", bool, False)
    return with_pictures(
        read_text(keys, tied=tied),
        vision=_read_vision(keys, vision, clips=clips),
        image_token=keys.get("image_token_index", int, keys.get("image_token_id", int, 32000)),
        keep_class=clips and strategy == "full",
        projector_activation=read_activation(keys, "projector_hidden_act", "gelu"),
        projector_bias=keys.get("multimodal_projector_bias", bool, True),
    )


def _read_vision(keys: Keys, vision: Keys, *, clips: bool) -> VisionConfig:
    # The tower up to the layer that is read.
    if clips:
        whole = clip.read_vision(vision.defaulting(**VISION_DEFAULTS), 0)
    else:
        headless = {key: value for key, value in vision.values.items() if key != "vision_use_head"}
        given = Keys(headless, vision.where, vision.tensors).defaulting(**siglip.SIDE_DEFAULTS)
        whole = siglip.read_vision(given).model_copy(update={"pooling": "mean"})
    count, layer = len(whole.trunk.layers), keys.get("vision_feature_layer", int, -2)
    used = layer + count + 1 if layer < 0 else layer
    if not 0 < used <= count:
        raise CheckpointError(
            f"the pictures' tokens come from layer {layer}, and there are {count}",
            where=f"{keys.where}: key 'vision_feature_layer'",
        )
    return whole.model_copy(
        update={"trunk": whole.trunk.model_copy(update={"layers": whole.trunk.layers[:used], "final_norm": None})}
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, ImageChatConfig)
    if config.vision.class_token:
        vision = write_tower(config.vision.trunk) | write_pictures(config.vision) | {"model_type": CLIP_TOWER}
    else:
        vision = siglip.write_vision(config.vision) | {"vision_use_head": False}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token,
        "image_seq_length": config.picture_tokens,
        "multimodal_projector_bias": config.projector_bias,
        "projector_hidden_act": write_activation(config.projector_activation),
        "tie_word_embeddings": config.tied,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default" if config.vision.extra > config.keep_class else "full",
        "vision_config": vision,
        "text_config": write_text(config),
    }


def moved(entries: Sequence[Entry], theirs: str, ours: str = "", *, without: str = "") -> list[Entry]:
    """Entries of a part of the model, under these prefixes; `without`: the prefix that their names lose first."""
    return [
        replace(
            entry,
            theirs=tuple(theirs + name.removeprefix(without) for name in entry.theirs),
            ours=tuple(ours + name for name in entry.ours),
        )
        for entry in entries
    ]


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, ImageChatConfig)
    projector = {"up": "multi_modal_projector.linear_1", "down": "multi_modal_projector.linear_2"}
    kinds = ("weight", "bias") if config.projector_bias else ("weight",)
    tower = clip if config.vision.class_token else siglip
    seen = [
        entry
        for entry in tower.vision_entries(config.vision, "vision.")
        if not entry.ours[0].startswith("vision.trunk.final_norm.")
    ]
    return [
        *moved(seen, "vision_tower."),
        *(same(f"{t}.{kind}", f"projector.{o}.{kind}") for o, t in projector.items() for kind in kinds),
        *moved(decoder_entries(config), "language_model."),
    ]


LLAVA = Family(
    name="llava",
    architectures=("LlavaForConditionalGeneration",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    # The tower's layers after the one that is read, its last norm, SigLIP's pooling, and buffers.
    ignored=(
        r"vision_tower\.vision_model\.(encoder\.layers\.\d+|post_layernorm|head)\..*",
        r"vision_tower\.vision_model\.embeddings\.position_ids",
        r"language_model\..*\.rotary_emb\.inv_freq",
    ),
    # The names of transformers since 4.52, and those since 5.
    renames=(
        (r"^model\.(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^model\.language_model\.", "language_model.model."),
        (r"^lm_head\.", "language_model.lm_head."),
        (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
    ),
    # In transformers' class since 5, as PEFT's files name them.
    modules=((r"^language_model\.model\.", "language_model."), (r"^language_model\.lm_head$", "lm_head")),
)
