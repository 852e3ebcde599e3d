"""What Llama and the many families that follow its config keys and tensor names share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, get_args

from craton.checkpoints.families.family import Keys, read_rotary, rope_parameters, write_rotary
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig
from craton.trunk import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, NormConfig
from craton.trunk.config import Activation

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

# Our place of a norm -> its name in a Llama layer.
LLAMA_NORMS: Mapping[str, str] = {
    "attention_norm.input": "input_layernorm",
    "feedforward_norm.input": "post_attention_layernorm",
}

GATED_NAMES = ("gate_proj", "up_proj", "down_proj")

# (layer, its name there, its name here) -> the entries of one of its parts.
LayerEntries = Callable[[LayerConfig, str, str], list[Entry]]


def read_activation(keys: Keys, key: str = "hidden_act", default: str = "silu") -> Activation:
    """The activation function that `key` names."""
    name = keys.get(key, str, default)
    if name not in ACTIVATIONS:
        raise CheckpointError(
            f"unknown activation {name!r}",
            where=f"{keys.where}: key {key!r}",
            remedy=f"known: {', '.join(ACTIVATIONS)}",
        )
    return ACTIVATIONS[name]


def write_activation(activation: Activation) -> str:
    """The inverse of `read_activation`, in Hugging Face's spelling."""
    assert activation in get_args(Activation)
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation


def read_norm(keys: Keys, *, offset: float = 0.0) -> NormConfig:
    """RMSNorm with the config's epsilon."""
    return NormConfig(kind="rms", eps=keys.get("rms_norm_eps", float, 1e-6), offset=offset)


def read_head_size(keys: Keys) -> int:
    """`head_dim`, or the width divided by the number of heads."""
    width, heads = keys.need("hidden_size", int), keys.need("num_attention_heads", int)
    if keys.has("head_dim"):
        return keys.need("head_dim", int)
    if heads <= 0 or width % heads:
        raise CheckpointError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}", where=keys.where)
    return width // heads


def read_attention(
    keys: Keys, *, default_kv_heads: int | None = None, default_theta: float = 10000.0, **switches: Any
) -> AttentionConfig:
    """Heads, sizes and rotary positions by Llama's keys; `switches` are the fields in which a family differs."""
    heads, size = keys.need("num_attention_heads", int), read_head_size(keys)
    kv_heads = keys.get("num_key_value_heads", int, default_kv_heads or heads)
    if kv_heads <= 0 or heads % kv_heads:
        raise CheckpointError(f"{heads} heads cannot share {kv_heads} key-value heads", where=keys.where)
    partial = rope_parameters(keys).get("partial_rotary_factor", float, keys.get("partial_rotary_factor", float, 1.0))
    return AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        **{"rotary": read_rotary(keys, int(size * partial), default_theta=default_theta), **switches},
    )


def read_feedforward(keys: Keys, **switches: Any) -> FeedForwardConfig:
    """The gated feed-forward by Llama's keys."""
    values = {"hidden": keys.need("intermediate_size", int), "activation": read_activation(keys), "gated": True}
    return FeedForwardConfig(**{**values, **switches})


def layer_count(keys: Keys, key: str = "num_hidden_layers") -> int:
    """The number of layers, within reason."""
    count = keys.need(key, int)
    if not 0 < count <= 10_000:
        raise CheckpointError(f"{key} = {count} is not a number of layers", where=f"{keys.where}: key {key!r}")
    return count


def write_decoder(config: CausalLMConfig, architecture: str, model_type: str, **extra: Any) -> dict[str, Any]:
    """The keys that all Llama-like configs share; `extra` adds a family's own."""
    layer = config.trunk.layers[0]
    attention, feedforward = layer.attention, layer.feedforward
    values: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab,
        "hidden_size": config.trunk.width,
        "num_hidden_layers": len(config.trunk.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_size,
        "max_position_embeddings": config.context,
        "rms_norm_eps": layer.norm.eps,
        "tie_word_embeddings": config.tied,
    }
    if isinstance(feedforward, FeedForwardConfig):
        values |= {
            "intermediate_size": feedforward.hidden,
            "hidden_act": write_activation(feedforward.activation),
        }
    if attention.rotary is not None:
        values["rope_parameters"] = write_rotary(attention.rotary)
        if attention.rotary.dims != attention.head_size:
            values["partial_rotary_factor"] = attention.rotary.dims / attention.head_size
            values["rope_parameters"]["partial_rotary_factor"] = values["partial_rotary_factor"]
    return values | extra


def attention_entries(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """q, k, v, o with their biases, and the norms of queries and keys."""
    theirs, ours = f"{theirs}.self_attn", f"{ours}.attention"
    entries = []
    for part in ("q", "k", "v", "o"):
        entries.append(same(f"{theirs}.{part}_proj.weight", f"{ours}.{part}.weight"))
        if part in layer.attention.bias:
            entries.append(same(f"{theirs}.{part}_proj.bias", f"{ours}.{part}.bias"))
    if layer.attention.qk_norm is not None:
        entries += [same(f"{theirs}.{part}_norm.weight", f"{ours}.{part}_norm.weight") for part in ("q", "k")]
    return entries


def feedforward_entries(
    config: FeedForwardConfig, theirs: str, ours: str, names: tuple[str, str, str] = GATED_NAMES
) -> list[Entry]:
    """gate, up and down with their biases."""
    parts = [(t, o) for t, o in zip(names, ("gate", "up", "down"), strict=True) if config.gated or o != "gate"]
    kinds = ("weight", "bias") if config.bias else ("weight",)
    return [same(f"{theirs}.{t}.{kind}", f"{ours}.{o}.{kind}") for t, o in parts for kind in kinds]


def experts_entries(
    config: ExpertsConfig, theirs: str, ours: str, names: tuple[str, str, str] = GATED_NAMES
) -> list[Entry]:
    """The router and every routed expert."""
    entries = [same(f"{theirs}.gate.weight", f"{ours}.router.weight")]
    for number in range(config.count):
        entries += feedforward_entries(config.expert, f"{theirs}.experts.{number}", f"{ours}.experts.{number}", names)
    return entries


def mlp_entries(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """A layer's feed-forward under the name `mlp`, dense or of routed experts."""
    config, theirs, ours = layer.feedforward, f"{theirs}.mlp", f"{ours}.feedforward"
    if isinstance(config, ExpertsConfig):
        return experts_entries(config, theirs, ours)
    return feedforward_entries(config, theirs, ours)


def ends_entries(config: CausalLMConfig) -> list[Entry]:
    """The embedding, the final norm and, where it is not tied, the head."""
    entries = [
        same("model.embed_tokens.weight", "embedding.weight"),
        same("model.norm.weight", "trunk.final_norm.weight"),
    ]
    return entries if config.tied else [*entries, same("lm_head.weight", "head.weight")]


def decoder_entries(
    config: CausalLMConfig,
    norms: Mapping[str, str] = LLAMA_NORMS,
    *,
    attention: LayerEntries = attention_entries,
    feedforward: LayerEntries = mlp_entries,
) -> list[Entry]:
    """Every tensor of a Llama-like model; `norms` maps our norm places to the family's names."""
    entries = ends_entries(config)
    for number, layer in enumerate(config.trunk.layers):
        theirs, ours = f"model.layers.{number}", f"trunk.layers.{number}"
        entries += attention(layer, theirs, ours) + feedforward(layer, theirs, ours)
        entries += [same(f"{theirs}.{name}.weight", f"{ours}.{place}.weight") for place, name in norms.items()]
    return entries
