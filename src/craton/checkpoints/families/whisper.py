"""Whisper (Radford 2022, arXiv 2212.04356), in Hugging Face's layout and, by renaming, under OpenAI's own names.

Particular: an encoder over a spectrogram and a decoder with cross-attention; keys have no bias; the encoder's
sinusoidal positions stand in the files as a table, like the decoder's learned ones; the head is the embedding.
"""

from __future__ import annotations

from typing import Any

from craton.checkpoints.families.decoder import layer_count, read_activation, split_width, write_activation
from craton.checkpoints.families.family import Family, Keys
from craton.checkpoints.names import Entry, same
from craton.models import ModelConfig, Seq2SeqConfig
from craton.trunk import (
    AttentionConfig,
    CrossAttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    TrunkConfig,
)

NORM = NormConfig(kind="layer", eps=1e-5, bias=True)
BIAS = ("q", "v", "o")

# Ours -> theirs, within one layer.
LAYER_NAMES = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.out_proj",
    "attention_norm.input": "self_attn_layer_norm",
    "feedforward.up": "fc1",
    "feedforward.down": "fc2",
    "feedforward_norm.input": "final_layer_norm",
}
CROSS_NAMES = {
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.k": "encoder_attn.k_proj",
    "cross_attention.v": "encoder_attn.v_proj",
    "cross_attention.o": "encoder_attn.out_proj",
    "cross_attention_norm.input": "encoder_attn_layer_norm",
}


def _trunk(keys: Keys, side: str, positions: int) -> TrunkConfig:
    width, heads_key = keys.need("d_model", int), f"{side}_attention_heads"
    heads, size = keys.need(heads_key, int), split_width(keys, "d_model", heads_key)
    mask: Any = "full" if side == "encoder" else "causal"
    cross = None
    if side == "decoder":
        cross = CrossAttentionConfig(heads=heads, kv_heads=heads, head_size=size, context_width=width, bias=BIAS)
    layer = LayerConfig(
        attention=AttentionConfig(heads=heads, kv_heads=heads, head_size=size, mask=mask, bias=BIAS),
        feedforward=FeedForwardConfig(
            hidden=keys.need(f"{side}_ffn_dim", int),
            activation=read_activation(keys, "activation_function", "gelu"),
            bias=True,
        ),
        norm=NORM,
        cross_attention=cross,
    )
    return TrunkConfig(
        width=width,
        layers=(layer,) * layer_count(keys, f"{side}_layers"),
        positions=LearnedPositions(count=positions),
        final_norm=NORM,
    )


def read_config(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("scale_embedding", False)
    frames, context = keys.count("max_source_positions"), keys.count("max_target_positions")
    return Seq2SeqConfig(
        vocab=keys.need("vocab_size", int),
        context=context,
        mels=keys.get("num_mel_bins", int, 80),
        frames=frames,
        encoder=_trunk(keys, "encoder", frames),
        decoder=_trunk(keys, "decoder", context),
        tied=keys.get("tie_word_embeddings", bool, True),
    )


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, Seq2SeqConfig)
    values: dict[str, Any] = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": config.vocab,
        "d_model": config.decoder.width,
        "num_mel_bins": config.mels,
        "max_source_positions": config.frames,
        "max_target_positions": config.context,
        "scale_embedding": False,
        "tie_word_embeddings": config.tied,
        # Hugging Face's own defaults are ids of the largest vocabulary; a tokeniser saved beside it tells better.
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    for side, trunk in (("encoder", config.encoder), ("decoder", config.decoder)):
        layer = trunk.layers[0]
        assert isinstance(layer.feedforward, FeedForwardConfig)
        values |= {
            f"{side}_layers": len(trunk.layers),
            f"{side}_attention_heads": layer.attention.heads,
            f"{side}_ffn_dim": layer.feedforward.hidden,
            "activation_function": write_activation(layer.feedforward.activation),
        }
    return values


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, Seq2SeqConfig)
    pairs = {
        "model.encoder.conv1": "front.conv1",
        "model.encoder.conv2": "front.conv2",
        "model.encoder.layer_norm": "encoder.final_norm",
        "model.decoder.layer_norm": "decoder.final_norm",
    }
    found = [
        same("model.encoder.embed_positions.weight", "encoder.positions.weight"),
        same("model.decoder.embed_positions.weight", "decoder.positions.weight"),
        same("model.decoder.embed_tokens.weight", "embedding.weight"),
    ]
    if not config.tied:
        found.append(same("proj_out.weight", "head.weight"))
    for side, trunk, names in (
        ("encoder", config.encoder, LAYER_NAMES),
        ("decoder", config.decoder, LAYER_NAMES | CROSS_NAMES),
    ):
        for number in range(len(trunk.layers)):
            pairs |= {f"model.{side}.layers.{number}.{t}": f"{side}.layers.{number}.{o}" for o, t in names.items()}
    for theirs, ours in pairs.items():
        kinds = ("weight",) if theirs.endswith(".k_proj") else ("weight", "bias")
        found += [same(f"{theirs}.{kind}", f"{ours}.{kind}") for kind in kinds]
    return found


# OpenAI's own names, in this order: what one rule makes, the next ones go on from.
OPENAI_NAMES = (
    (r"\.blocks\.", ".layers."),
    (r"\.mlp\.0\.", ".fc1."),
    (r"\.mlp\.2\.", ".fc2."),
    (r"\.mlp_ln\.", ".final_layer_norm."),
    (r"\.cross_attn_ln\.", ".encoder_attn_layer_norm."),
    (r"\.attn_ln\.", ".self_attn_layer_norm."),
    (r"\.cross_attn\.", ".encoder_attn."),
    (r"\.attn\.", ".self_attn."),
    (r"\.query\.", ".q_proj."),
    (r"\.key\.", ".k_proj."),
    (r"\.value\.", ".v_proj."),
    (r"_attn\.out\.", "_attn.out_proj."),
    (r"^(encoder|decoder)\.positional_embedding$", r"\1.embed_positions.weight"),
    (r"^decoder\.token_embedding\.", "decoder.embed_tokens."),
    (r"^encoder\.ln_post\.", "encoder.layer_norm."),
    (r"^decoder\.ln\.", "decoder.layer_norm."),
    (r"^(encoder|decoder)\.", r"model.\1."),
)

WHISPER = Family(
    name="whisper",
    architectures=("WhisperForConditionalGeneration",),
    read_config=read_config,
    write_config=write_config,
    entries=entries,
    ignored=(r"proj_out\.weight",),  # the tied head, which some files repeat
    renames=OPENAI_NAMES,
)
