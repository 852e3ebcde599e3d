"""DeepSeek-V2 and V2-Lite; DeepSeek-V3, V3.1 and R1, Kimi K2 and Moonlight.

Particular: latent attention, whose heads are [without position | rotated in interleaved pairs]; YaRN's temperature
stands at the softmax's scale (`mscale_all_dim`) and not at the rotation; the first layers are dense, then come routed
and shared experts, chosen within the best groups of experts: by softmax (V2), or by sigmoid and a balancing bias (V3).
"""

from __future__ import annotations

from math import log, sqrt
from typing import Any

from craton.checkpoints.families.decoder import (
    decoder_entries,
    feedforward_entries,
    feedforward_kinds,
    layer_count,
    mlp_entries,
    read_decoder,
    read_experts,
    read_feedforward,
    read_norm,
    write_decoder,
)
from craton.checkpoints.families.family import Family, Keys, read_rotary, rotary_keys, write_rotary, yarn_magnitude
from craton.checkpoints.names import Entry, same
from craton.errors import CheckpointError
from craton.models import CausalLMConfig, ModelConfig
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    LatentConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
)

# The latents' norms have an epsilon of their own, which no config names.
LATENT_NORM = NormConfig(kind="rms", eps=1e-6)


def read_v2(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("norm_topk_prob", False)  # transformers ignores it, DeepSeek's own code does not
    keys.refuse("topk_method", "greedy", "group_limited_greedy")
    keys.refuse("scoring_func", "softmax")
    keys.refuse("mlp_bias", False)
    grouped = keys.get("topk_method", str, "greedy") == "group_limited_greedy"
    groups = {"groups": keys.need("n_group", int), "groups_per_token": keys.need("topk_group", int)} if grouped else {}
    keys = keys.defaulting(
        max_position_embeddings=2048,
        q_lora_rank=1536,
        n_routed_experts=64,
        n_shared_experts=2,
        moe_intermediate_size=1407,
        first_k_dense_replace=0,
    )
    return _read(keys, normalise=False, scale=keys.get("routed_scaling_factor", float, 1.0), **groups)


def read_v3(keys: Keys) -> ModelConfig:
    """config.json -> ours."""
    keys.refuse("topk_method", "noaux_tc")
    keys.refuse("scoring_func", "sigmoid")
    keys = keys.defaulting(
        max_position_embeddings=4096,
        q_lora_rank=1536,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
    )
    return _read(
        keys,
        score="sigmoid",
        bias=True,
        normalise=keys.get("norm_topk_prob", bool, True),
        scale=keys.get("routed_scaling_factor", float, 2.5),
        groups=keys.get("n_group", int, 8),
        groups_per_token=keys.get("topk_group", int, 4),
    )


def _read(keys: Keys, **routing: Any) -> CausalLMConfig:
    keys.refuse("moe_layer_freq", 1)
    norm, attention = read_norm(keys), _read_attention(keys)
    hidden, shared = keys.need("moe_intermediate_size", int), keys.get("n_shared_experts", int, 0)
    experts = read_experts(
        keys,
        "n_routed_experts",
        read_feedforward(keys, hidden=hidden),
        shared=read_feedforward(keys, hidden=hidden * shared) if shared else None,
        **routing,
    )
    _check_groups(experts, keys)
    if experts.groups == 1:
        experts = experts.model_copy(update={"groups_per_token": 1})
    dense = LayerConfig(attention=attention, feedforward=read_feedforward(keys), norm=norm)
    sparse = LayerConfig(attention=attention, feedforward=experts, norm=norm)
    first, count = keys.need("first_k_dense_replace", int), layer_count(keys)
    if not 0 <= first < count:
        raise CheckpointError(
            f"{first} dense layers of {count} leave none with experts",
            where=f"{keys.where}: key 'first_k_dense_replace'",
        )
    return read_decoder(keys, [dense if number < first else sparse for number in range(count)])


def _check_groups(experts: ExpertsConfig, keys: Keys) -> None:
    size = experts.count // experts.groups
    fits = experts.per_token <= size * experts.groups_per_token and experts.groups_per_token <= experts.groups
    if size * experts.groups != experts.count or not fits or (experts.groups > 1 and experts.bias and size < 2):
        raise CheckpointError(
            f"{experts.per_token} experts cannot be chosen from {experts.groups_per_token} of {experts.groups} groups "
            f"of {experts.count} experts",
            where=f"{keys.where}: keys 'n_group', 'topk_group', 'num_experts_per_tok'",
        )


def _read_attention(keys: Keys) -> AttentionConfig:
    heads = keys.need("num_attention_heads", int)
    keys.refuse("num_key_value_heads", heads)
    keys = keys.defaulting(qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512)
    rotated = keys.count("qk_rope_head_dim")
    size = keys.count("qk_nope_head_dim") + rotated
    rotary = read_rotary(keys, rotated, interleaved=keys.get("rope_interleave", bool, True))
    scale, all_dim = None, rotary_keys(keys).get("mscale_all_dim", float, 0.0)
    if rotary.scaling is not None and all_dim and rotary.scaling.factor > 1:
        scale = size**-0.5 * yarn_magnitude(rotary.scaling.factor, all_dim) ** 2
    return AttentionConfig(
        heads=heads,
        kv_heads=heads,
        head_size=size,
        value_size=keys.need("v_head_dim", int),
        bias=("q", "k", "o") if keys.get("attention_bias", bool, False) else (),
        scale=scale,
        rotary=rotary,
        latent=LatentConfig(
            q_rank=keys.get("q_lora_rank", int, None),
            kv_rank=keys.need("kv_lora_rank", int),
            rotary_size=rotated,
            norm=LATENT_NORM,
        ),
    )


def write_v2(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    values = _write(config, "DeepseekV2ForCausalLM", "deepseek_v2")
    return values | {
        "topk_method": "greedy" if values["n_group"] == 1 else "group_limited_greedy",
        "scoring_func": "softmax",
    }


def write_v3(config: ModelConfig) -> dict[str, Any]:
    """Ours -> config.json."""
    assert isinstance(config, CausalLMConfig)
    values = _write(config, "DeepseekV3ForCausalLM", "deepseek_v3")
    rotary = config.trunk.layers[0].attention.rotary
    assert rotary is not None
    return values | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": rotary.interleaved,
        "num_nextn_predict_layers": 0,
    }


def _write(config: CausalLMConfig, architecture: str, model_type: str) -> dict[str, Any]:
    attention = config.trunk.layers[0].attention
    latent, rotary = attention.latent, attention.rotary
    _, experts = feedforward_kinds(config)
    assert latent is not None
    assert rotary is not None
    assert experts is not None
    values = write_decoder(
        config,
        architecture,
        model_type,
        attention_bias=bool(attention.bias),
        q_lora_rank=latent.q_rank,
        kv_lora_rank=latent.kv_rank,
        qk_nope_head_dim=attention.head_size - latent.rotary_size,
        qk_rope_head_dim=latent.rotary_size,
        v_head_dim=attention.value_size,
        rope_parameters=_write_rope(attention, rotary),
        head_dim=latent.rotary_size,  # so transformers calls the rotated part, all of which is rotated
        first_k_dense_replace=sum(isinstance(layer.feedforward, FeedForwardConfig) for layer in config.trunk.layers),
        n_routed_experts=experts.count,
        num_experts_per_tok=experts.per_token,
        moe_intermediate_size=experts.expert.hidden,
        n_shared_experts=experts.shared.hidden // experts.expert.hidden if experts.shared is not None else 0,
        norm_topk_prob=experts.normalise,
        routed_scaling_factor=experts.scale,
        n_group=experts.groups,
        topk_group=experts.groups_per_token,
    )
    del values["partial_rotary_factor"]
    return values


def _write_rope(attention: AttentionConfig, rotary: RotaryConfig) -> dict[str, Any]:
    values = write_rotary(rotary)
    if attention.scale is not None:
        assert rotary.scaling is not None
        # scale = size^-1/2 (0.1 m ln(factor) + 1)^2; m has few decimals, the rounding makes it exact again.
        magnitude = sqrt(attention.scale * sqrt(attention.head_size))
        values["mscale_all_dim"] = round((magnitude - 1) / (0.1 * log(rotary.scaling.factor)), 9)
    return values


def attention(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """Latent attention of one layer."""
    theirs, ours, config = f"{theirs}.self_attn", f"{ours}.attention", layer.attention
    assert config.latent is not None
    pairs = {"kv_a_proj_with_mqa": "kv_down", "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_up", "o_proj": "o"}
    if config.latent.q_rank is None:
        pairs |= {"q_proj": "q"}
    else:
        pairs |= {"q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_up"}
    biased = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj") if config.bias else ()
    entries = [same(f"{theirs}.{t}.weight", f"{ours}.{o}.weight") for t, o in pairs.items()]
    return entries + [same(f"{theirs}.{t}.bias", f"{ours}.{o}.bias") for t, o in pairs.items() if t in biased]


def feedforward(layer: LayerConfig, theirs: str, ours: str) -> list[Entry]:
    """The feed-forward of one layer, with its shared experts and the balancing bias of its router."""
    entries, config = mlp_entries(layer, theirs, ours), layer.feedforward
    theirs, ours = f"{theirs}.mlp", f"{ours}.feedforward"
    if isinstance(config, ExpertsConfig) and config.shared is not None:
        entries += feedforward_entries(config.shared, f"{theirs}.shared_experts", f"{ours}.shared")
    if isinstance(config, ExpertsConfig) and config.bias:
        entries.append(Entry((f"{theirs}.gate.e_score_correction_bias",), (f"{ours}.router_bias",), fp32=True))
    return entries


def entries(config: ModelConfig) -> list[Entry]:
    """Every tensor."""
    assert isinstance(config, CausalLMConfig)
    return decoder_entries(config, attention=attention, feedforward=feedforward)


DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    read_config=read_v2,
    write_config=write_v2,
    entries=entries,
)

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read_config=read_v3,
    write_config=write_v3,
    entries=entries,
    # V3's and R1's 62nd layer predicts a second token during training.
    ignored=(r"model\.layers\.61\..*", r".*\.rotary_emb\.inv_freq"),
)
