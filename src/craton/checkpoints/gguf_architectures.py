"""What GGUF calls the settings and tensors of each architecture: one table, read in both directions.

On the left of every pair stands Hugging Face's name, on the right GGUF's. {n} is a layer's number, {e} an expert's.
Names: the `gguf` package of the GGML project; what files leave unsaid: llama.cpp, which fixes it in its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from craton.checkpoints.gguf_changes import (
    INTERLEAVED_K,
    INTERLEAVED_Q,
    PARTS_FIRST,
    PLUS_ONE,
    TURNED,
    UNPACKED,
    Change,
)
from craton.checkpoints.gguf_table import Architecture, Config, Key, Shapes


def _layers(theirs: str, inside: Mapping[str, str]) -> dict[str, str]:
    return {theirs.format(name): f"blk.{{n}}.{place}" for name, place in inside.items()}


SHAPE_KEYS = (
    Key("max_position_embeddings", "context_length"),
    Key("hidden_size", "embedding_length"),
    Key("num_hidden_layers", "block_count"),
    Key("num_attention_heads", "attention.head_count"),
)
RMS_KEYS = (
    *SHAPE_KEYS,
    Key("num_key_value_heads", "attention.head_count_kv", required=False),
    Key("head_dim", "attention.key_length", required=False),
    Key("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
)
DENSE_KEYS = (*RMS_KEYS, Key("intermediate_size", "feed_forward_length"))
WINDOW = Key("sliding_window", "attention.sliding_window", required=False)

ENDS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
FEEDFORWARD = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTPUT_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
SANDWICH_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm", **OUTPUT_NORMS}

LAYER = "model.layers.{{n}}.{}"
INTERLEAVED: Mapping[str, Change] = {
    LAYER.format("self_attn.q_proj"): INTERLEAVED_Q,
    LAYER.format("self_attn.k_proj"): INTERLEAVED_K,
}


def _plus_one(*names: str) -> dict[str, Change]:
    return {"model.norm": PLUS_ONE, **{LAYER.format(name): PLUS_ONE for name in names}}


def _biases(config: Config, shapes: Shapes) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}


def _gemma(config: Config, *, window: int | None, pattern: int, widest: int) -> dict[str, Any]:
    # Scores are scaled by the head size, but by width / heads in the 27B models, which only their layer count tells.
    large = config["num_hidden_layers"] == widest
    window = config.get("sliding_window", window)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": (
            config["hidden_size"] / max(config["num_attention_heads"], 1) if large else config["head_dim"]
        ),
        "sliding_window": window,
        "layer_types": [
            "sliding_attention" if window and (n + 1) % pattern else "full_attention"
            for n in range(config["num_hidden_layers"])
        ],
    }


LLAMA = Architecture(
    name="llama",
    hf_architectures=("LlamaForCausalLM", "MistralForCausalLM"),
    model_type="llama",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **FEEDFORWARD, **NORMS})},
    changes=INTERLEAVED,
    rope_factors=("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"),
    conventions=_biases,
)

MIXTRAL = Architecture(
    name="llama",
    hf_architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    keys=(
        *DENSE_KEYS,
        Key("num_local_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
    ),
    tensors={
        **ENDS,
        **_layers(
            LAYER,
            {
                **ATTENTION,
                **NORMS,
                "block_sparse_moe.gate": "ffn_gate_inp",
                "block_sparse_moe.experts.{e}.w1": "ffn_gate_exps",
                "block_sparse_moe.experts.{e}.w2": "ffn_down_exps",
                "block_sparse_moe.experts.{e}.w3": "ffn_up_exps",
            },
        ),
    },
    changes={**INTERLEAVED, LAYER.format("block_sparse_moe.gate"): UNPACKED},
)

QWEN2 = Architecture(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **FEEDFORWARD, **NORMS})},
)

QWEN3 = Architecture(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **QK_NORMS, **FEEDFORWARD, **NORMS})},
    conventions=lambda config, shapes: {"attention_bias": "blk.0.attn_q.bias" in shapes},
)

QWEN3_MOE = Architecture(
    name="qwen3moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    keys=(
        *RMS_KEYS,
        Key("intermediate_size", "feed_forward_length", required=False),
        Key("moe_intermediate_size", "expert_feed_forward_length"),
        Key("num_experts", "expert_count"),
        Key("num_experts_per_tok", "expert_used_count"),
    ),
    tensors={
        **ENDS,
        **_layers(
            LAYER,
            {
                **ATTENTION,
                **QK_NORMS,
                **NORMS,
                "mlp.gate": "ffn_gate_inp",
                "mlp.experts.{e}.gate_proj": "ffn_gate_exps",
                "mlp.experts.{e}.up_proj": "ffn_up_exps",
                "mlp.experts.{e}.down_proj": "ffn_down_exps",
            },
        ),
    },
    changes={LAYER.format("mlp.gate"): UNPACKED},
    conventions=lambda config, shapes: {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
)

GEMMA = Architecture(
    name="gemma",
    hf_architectures=("GemmaForCausalLM",),
    model_type="gemma",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **FEEDFORWARD, **NORMS})},
    changes=_plus_one(*NORMS),
    conventions=lambda config, shapes: {"hidden_activation": "gelu_pytorch_tanh"},
)

GEMMA2 = Architecture(
    name="gemma2",
    hf_architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    keys=(
        *DENSE_KEYS,
        WINDOW,
        Key("attn_logit_softcapping", "attn_logit_softcapping", float, required=False),
        Key("final_logit_softcapping", "final_logit_softcapping", float, required=False),
    ),
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **FEEDFORWARD, **SANDWICH_NORMS})},
    changes=_plus_one(*SANDWICH_NORMS),
    conventions=lambda config, shapes: _gemma(config, window=4096, pattern=2, widest=46),
)

GEMMA3 = Architecture(
    name="gemma3",
    hf_architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    keys=(*DENSE_KEYS, WINDOW, Key("final_logit_softcapping", "final_logit_softcapping", float, required=False)),
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **QK_NORMS, **FEEDFORWARD, **SANDWICH_NORMS})},
    changes=_plus_one(*SANDWICH_NORMS, *QK_NORMS),
    conventions=lambda config, shapes: _gemma(config, window=None, pattern=6, widest=62),
)

PHI3 = Architecture(
    name="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    keys=(*DENSE_KEYS, WINDOW),
    tensors={
        **ENDS,
        **_layers(
            LAYER,
            {
                **NORMS,
                "self_attn.qkv_proj": "attn_qkv",
                "self_attn.o_proj": "attn_output",
                "mlp.gate_up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
            },
        ),
    },
    rope_factors=("rope_factors_long.weight", "rope_factors_short.weight"),
    conventions=lambda config, shapes: {"sliding_window": config.get("sliding_window") or None},
)

OLMO2 = Architecture(
    name="olmo2",
    hf_architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **QK_NORMS, **FEEDFORWARD, **OUTPUT_NORMS})},
)

SMOLLM3 = Architecture(
    name="smollm3",
    hf_architectures=("SmolLM3ForCausalLM",),
    model_type="smollm3",
    keys=DENSE_KEYS,
    tensors={**ENDS, **_layers(LAYER, {**ATTENTION, **FEEDFORWARD, **NORMS})},
    changes=INTERLEAVED,
    # Every fourth layer has no positions.
    conventions=lambda config, shapes: {
        **_biases(config, shapes),
        "no_rope_layers": [int((n + 1) % 4 != 0) for n in range(config["num_hidden_layers"])],
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
)

GPT2 = Architecture(
    name="gpt2",
    hf_architectures=("GPT2LMHeadModel",),
    model_type="gpt2",
    keys=(
        Key("n_positions", "context_length"),
        Key("n_embd", "embedding_length"),
        Key("n_layer", "block_count"),
        Key("n_head", "attention.head_count"),
        Key("n_inner", "feed_forward_length"),
        Key("layer_norm_epsilon", "attention.layer_norm_epsilon", float),
    ),
    tensors={
        "wte": "token_embd",
        "wpe": "position_embd",
        "ln_f": "output_norm",
        "lm_head": "output",
        **_layers(
            "h.{{n}}.{}",
            {
                "ln_1": "attn_norm",
                "attn.c_attn": "attn_qkv",
                "attn.c_proj": "attn_output",
                "ln_2": "ffn_norm",
                "mlp.c_fc": "ffn_up",
                "mlp.c_proj": "ffn_down",
            },
        ),
    },
    changes={f"h.{{n}}.{name}": TURNED for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
    rotary=False,
    # Some files hold the embedding a second time, as the head.
    conventions=lambda config, shapes: {"activation_function": "gelu_new", "tie_word_embeddings": True},
)

GPT_NEOX = Architecture(
    name="gptneox",
    hf_architectures=("GPTNeoXForCausalLM",),
    model_type="gpt_neox",
    keys=(
        *SHAPE_KEYS,
        Key("intermediate_size", "feed_forward_length"),
        Key("layer_norm_eps", "attention.layer_norm_epsilon", float),
        Key("use_parallel_residual", "use_parallel_residual", bool),
    ),
    tensors={
        "gpt_neox.embed_in": "token_embd",
        "gpt_neox.final_layer_norm": "output_norm",
        "embed_out": "output",
        **_layers(
            "gpt_neox.layers.{{n}}.{}",
            {
                **NORMS,
                "attention.query_key_value": "attn_qkv",
                "attention.dense": "attn_output",
                "mlp.dense_h_to_4h": "ffn_up",
                "mlp.dense_4h_to_h": "ffn_down",
            },
        ),
    },
    changes={"gpt_neox.layers.{n}.attention.query_key_value": PARTS_FIRST},
    conventions=lambda config, shapes: {"hidden_act": "gelu", "attention_bias": "blk.0.attn_qkv.bias" in shapes},
)

BERT = Architecture(
    name="bert",
    hf_architectures=("BertModel",),
    model_type="bert",
    keys=(
        *SHAPE_KEYS,
        Key("intermediate_size", "feed_forward_length"),
        Key("layer_norm_eps", "attention.layer_norm_epsilon", float),
    ),
    tensors={
        "embeddings.word_embeddings": "token_embd",
        "embeddings.position_embeddings": "position_embd",
        "embeddings.token_type_embeddings": "token_types",
        "embeddings.LayerNorm": "token_embd_norm",
        **_layers(
            "encoder.layer.{{n}}.{}",
            {
                "attention.self.query": "attn_q",
                "attention.self.key": "attn_k",
                "attention.self.value": "attn_v",
                "attention.output.dense": "attn_output",
                "attention.output.LayerNorm": "attn_output_norm",
                "intermediate.dense": "ffn_up",
                "output.dense": "ffn_down",
                "output.LayerNorm": "layer_output_norm",
            },
        ),
    },
    changes={"embeddings.token_type_embeddings": UNPACKED},
    fixed={"attention.causal": False},
    rotary=False,
    conventions=lambda config, shapes: {
        "hidden_act": "gelu",
        "type_vocab_size": shapes.get("token_types.weight", (0,))[0],
    },
    unplaced=(r"pooler\.dense",),
)

ARCHITECTURES = (
    LLAMA,
    MIXTRAL,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    OLMO2,
    SMOLLM3,
    GPT2,
    GPT_NEOX,
    BERT,
)
