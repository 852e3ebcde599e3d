"""A model that is being trained writes what it would write once it is saved, and goes on training."""

from __future__ import annotations

import torch

from craton.checkpoints.families.llama import LLAMA
from craton.checkpoints.save import save_checkpoint
from craton.inference.model import load
from craton.inference.preview import preview
from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
from craton.models import CausalLM, build
from craton.models.initialisation import initialise
from craton.pretraining.architecture import causal_config
from craton.pretraining.sizing import SizeOverrides, size


def test_a_preview_is_what_the_saved_model_writes(tmp_path):
    tokenizer = train_tokenizer(["the cat sat on the mat\n" * 20], TokenizerSettings(vocab=300))
    shape = SizeOverrides(width=64, layers=2, heads=2, kv_heads=1, hidden=128)
    vocab = tokenizer.vocab_size
    model = build(causal_config(size("0.1m", vocab=vocab, context=64, overrides=shape), vocab, 64))
    assert isinstance(model, CausalLM)
    initialise(model, 0)
    model.train()
    prompt = tokenizer.encode("the cat")
    written = preview(model, tokenizer, prompt, max_tokens=8)
    assert model.training
    save_checkpoint(model, LLAMA, tmp_path, tokenizer=tokenizer)
    assert written == load(tmp_path, dtype="float32", threads=1).generate(prompt, max_tokens=8).text
    model.compute_dtype = torch.bfloat16
    assert isinstance(preview(model, tokenizer, prompt, max_tokens=200), str)  # as far as the context reaches
