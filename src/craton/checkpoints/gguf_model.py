"""A GGUF file as a checkpoint: its metadata as a config.json, its tensors under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from craton.checkpoints.gguf import GGUFFile
from craton.checkpoints.weights import QuantizedTensor, Weight


class GGUFSource:
    """The weights of a GGUF file under Hugging Face's names."""

    def __init__(self, file: GGUFFile, names: Mapping[str, str], permuted: Callable[[str], int]) -> None:
        """names: theirs -> in the file. permuted(name): heads whose rotary pairs are interleaved in the file, or 0."""
        self._file, self._names, self._permuted = file, names, permuted
        self.shapes = {name: file.tensors[inside].shape for name, inside in names.items()}
        self.kinds = {name: file.tensors[inside].type.name for name, inside in names.items()}

    def weight(self, name: str) -> Weight:
        """The named tensor; matrices in a block format stay as they are."""
        inside = self._names[name]
        info = self._file.tensors[inside]
        if len(info.shape) == 2 and info.type.name.startswith("Q"):
            weight: Weight = QuantizedTensor(info.type, self._file.blocks(inside), info.shape)
        else:
            weight = torch.from_numpy(self._file.array(inside))
        heads = self._permuted(name)
        if heads:
            order = np.arange(info.shape[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
            weight = weight[order]
        return weight


def open_gguf_model(path: Path) -> tuple[dict[str, Any], GGUFSource, Mapping[str, Any]]:
    """Its config in Hugging Face's terms, its weights under Hugging Face's names, and its metadata."""
    file = GGUFFile.open(path)
    m = file.metadata
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": m["llama.embedding_length"],
        "intermediate_size": m["llama.feed_forward_length"],
        "num_hidden_layers": m["llama.block_count"],
        "num_attention_heads": m["llama.attention.head_count"],
        "num_key_value_heads": m["llama.attention.head_count_kv"],
        "max_position_embeddings": m["llama.context_length"],
        "rms_norm_eps": m["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": m["llama.rope.freq_base"],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if "output.weight" in file.tensors:
        names["lm_head.weight"] = "output.weight"
    for i in range(hf["num_hidden_layers"]):
        for a, b in {
            "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        }.items():
            names[f"model.layers.{i}.{a}.weight"] = f"blk.{i}.{b}.weight"

    def permuted(name: str) -> int:
        if name.endswith("q_proj.weight"):
            return hf["num_attention_heads"]
        return hf["num_key_value_heads"] if name.endswith("k_proj.weight") else 0

    return hf, GGUFSource(file, names, permuted), m
