"""What Llama and the many families that follow its config keys and tensor names share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from craton.checkpoints.families.family import Keys, read_rotary, read_rotated, write_rotary, write_rotated
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig
from craton.trunk import AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, NormConfig, TrunkConfig
from craton.trunk.config import Activation, Projection

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
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
    return {"gelu_tanh": "gelu_pytorch_tanh", "gelu_quick": "quick_gelu"}.get(activation, activation)


def read_norm(keys: Keys, *, offset: float = 0.0) -> NormConfig:
    """RMSNorm with the config's epsilon."""
    return NormConfig(kind="rms", eps=keys.get("rms_norm_eps", float, 1e-6), offset=offset)


def read_head_size(keys: Keys) -> int:
    """`head_dim`, or the width divided by the number of heads."""
    return keys.need("head_dim", int) if keys.has("head_dim") else split_width(keys)


def split_width(keys: Keys, width_key: str = "hidden_size", heads_key: str = "num_attention_heads") -> int:
    """The size of a head in models whose heads share the width out among them."""
    width, heads = keys.need(width_key, int), keys.need(heads_key, int)
    if heads <= 0 or width % heads:
        raise CheckpointError(f"{width_key} {width} is not a multiple of {heads_key} {heads}", where=keys.where)
    return width // heads


def read_bias(keys: Keys, default: bool = False) -> tuple[Projection, ...]:
    """The projections of attention that have a bias, by `attention_bias`: all or none."""
    return ("q", "k", "v", "o") if keys.get("attention_bias", bool, default) else ()


def read_attention(keys: Keys, **switches: Any) -> AttentionConfig:
    """Heads, sizes and rotary positions by Llama's keys; `switches` are the fields in which a family differs."""
    heads, size = keys.need("num_attention_heads", int), read_head_size(keys)
    kv_heads = keys.get("num_key_value_heads", int, heads)
    if kv_heads <= 0 or heads % kv_heads:
        raise CheckpointError(f"{heads} heads cannot share {kv_heads} key-value heads", where=keys.where)
    return AttentionConfig(
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        **{"rotary": read_rotary(keys, read_rotated(keys, size)), **switches},
    )


def read_feedforward(keys: Keys, **switches: Any) -> FeedForwardConfig:
    """The gated feed-forward by Llama's keys."""
    values = {"hidden": keys.need("intermediate_size", int), "activation": read_activation(keys), "gated": True}
    return FeedForwardConfig(**{**values, **switches})


def read_experts(keys: Keys, count_key: str, expert: FeedForwardConfig, **switches: Any) -> ExpertsConfig:
    """A mixture of `count_key` experts; `switches` are the fields in which a family differs."""
    count, per_token = keys.need(count_key, int), keys.need("num_experts_per_tok", int)
    if not 0 < per_token <= count:
        raise CheckpointError(
            f"a token cannot go to {per_token} of {count} experts", where=f"{keys.where}: key 'num_experts_per_tok'"
        )
    return ExpertsConfig(**{"count": count, "per_token": per_token, "expert": expert, **switches})


def layer_count(keys: Keys, key: str = "num_hidden_layers") -> int:
    """The number of layers, within reason."""
    count = keys.need(key, int)
    if not 0 < count <= 10_000:
        raise CheckpointError(f"{key} = {count} is not a number of layers", where=f"{keys.where}: key {key!r}")
    return count


def read_local_layers(keys: Keys, window: int | None, default: Callable[[int], bool]) -> list[bool]:
    """Whether each layer sees only a window: by `layer_types`, or by `default` of its number where that is absent."""
    count, known = layer_count(keys), ("full_attention", "sliding_attention")
    types = keys.get("layer_types", list, None)
    if types is None:
        return [window is not None and default(number) for number in range(count)]
    where = f"{keys.where}: key 'layer_types'"
    if len(types) != count or any(kind not in known for kind in types):
        raise CheckpointError(f"'layer_types' must name one of {known} for each of the {count} layers", where=where)
    if window is None and "sliding_attention" in types:
        raise CheckpointError("'layer_types' asks for sliding windows, but no window is set", where=where)
    return [kind == "sliding_attention" for kind in types]


def write_local_layers(config: CausalLMConfig) -> dict[str, Any]:
    """The inverse of `read_local_layers`."""
    windows = [layer.attention.window for layer in config.trunk.layers]
    return {
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def read_decoder(keys: Keys, layers: Sequence[LayerConfig], **switches: Any) -> CausalLMConfig:
    """The model around `layers` by Llama's keys; `switches` are the fields in which a family differs."""
    return CausalLMConfig(
        vocab=keys.need("vocab_size", int),
        context=keys.need("max_position_embeddings", int),
        tied=keys.get("tie_word_embeddings", bool, False),
        trunk=TrunkConfig(width=keys.need("hidden_size", int), layers=tuple(layers), final_norm=layers[0].norm),
        **switches,
    )


def feedforward_kinds(config: CausalLMConfig) -> tuple[FeedForwardConfig | None, ExpertsConfig | None]:
    """The feed-forward of the dense layers and the one of the sparse layers, where there are any."""
    feedforwards = [layer.feedforward for layer in config.trunk.layers]
    dense = next((f for f in feedforwards if isinstance(f, FeedForwardConfig)), None)
    return dense, next((f for f in feedforwards if isinstance(f, ExpertsConfig)), None)


def write_decoder(config: CausalLMConfig, architecture: str, model_type: str, **extra: Any) -> dict[str, Any]:
    """The keys that all Llama-like configs share; `extra` adds a family's own."""
    layer = config.trunk.layers[0]
    attention = layer.attention
    dense, experts = feedforward_kinds(config)
    feedforward = dense or experts.expert  # type: ignore[union-attr]  # a layer has one or the other
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
        "pad_token_id": None,  # the tokeniser knows it; the default of some classes lies outside of a small vocabulary
        "intermediate_size": feedforward.hidden,
        "hidden_act": write_activation(feedforward.activation),
    }
    rotary = next((layer.attention.rotary for layer in config.trunk.layers if layer.attention.rotary is not None), None)
    if rotary is not None:
        values["rope_parameters"] = write_rotary(rotary)
        if rotary.dims != attention.head_size:
            values["partial_rotary_factor"] = write_rotated(rotary.dims, attention.head_size)
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
