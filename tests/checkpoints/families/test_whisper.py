"""Whisper, on random small models."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.families.whisper_generation import WhisperGeneration, read_generation
from craton.checkpoints.safetensors import open_weights, write_safetensors
from craton.checkpoints.save import save_checkpoint
from craton.errors import CheckpointError, FileFormatError
from craton.models import Seq2Seq
from craton.trunk import KVCache

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peer

TOLERANCE = 2e-4  # of the largest logit


def small(**changes):
    values = {
        "vocab_size": 99,
        "num_mel_bins": 16,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 48,
        "max_source_positions": 20,
        "max_target_positions": 30,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
        "begin_suppress_tokens": None,
    }
    return transformers.WhisperConfig(**(values | changes))


@pytest.fixture
def random_whisper(tmp_path):
    def make(config):
        torch.manual_seed(0)
        model = transformers.WhisperForConditionalGeneration(config).float().eval().requires_grad_(False)
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.3 * noise if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
        model.save_pretrained(tmp_path / "theirs")
        return model, tmp_path / "theirs"

    return make


def inputs(config):
    torch.manual_seed(1)
    return torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions), torch.randint(0, 99, (2, 9))


def relative_error(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_function": "relu"}, {"num_mel_bins": 24, "decoder_layers": 1, "tie_word_embeddings": False}],
    ids=["plain", "relu", "untied, one layer"],
)
def test_logits_and_the_way_back(random_whisper, tmp_path, changes):
    config = small(**changes)
    theirs, folder = random_whisper(config)
    mel, ids = inputs(config)
    reference = theirs(input_features=mel, decoder_input_ids=ids).logits
    checkpoint = Checkpoint.open(folder)
    ours = checkpoint.load(torch.float32)
    assert isinstance(ours, Seq2Seq)
    with torch.inference_mode():
        assert relative_error(ours(mel, ids), reference) < TOLERANCE
        hidden = theirs.model.encoder(mel).last_hidden_state
        assert relative_error(ours.encode(mel), hidden) < TOLERANCE
        # One token at a time, both windows together.
        context = ours.decoder.read(ours.encode(mel))
        cache = KVCache(ours.config.decoder, 2, dtype=torch.float32)
        for i in range(ids.shape[1]):
            step = ours.hidden(ids[:, i], torch.full((2,), i), torch.arange(2), context.view([0, 1]), cache)
            assert relative_error(ours.logits(step), reference[:, i]) < TOLERANCE
    save_checkpoint(ours, checkpoint.family, tmp_path / "ours")
    again = transformers.WhisperForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert relative_error(again(input_features=mel, decoder_input_ids=ids).logits.detach(), reference) < 1e-5


# Hugging Face's names -> OpenAI's.
TO_OPENAI = (
    (r"^model\.", ""),
    (r"\.layers\.", ".blocks."),
    (r"\.fc1\.", ".mlp.0."),
    (r"\.fc2\.", ".mlp.2."),
    (r"\.encoder_attn_layer_norm\.", ".cross_attn_ln."),
    (r"\.self_attn_layer_norm\.", ".attn_ln."),
    (r"(blocks\.\d+)\.final_layer_norm\.", r"\1.mlp_ln."),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn\.", ".attn."),
    (r"\.q_proj\.", ".query."),
    (r"\.k_proj\.", ".key."),
    (r"\.v_proj\.", ".value."),
    (r"\.out_proj\.", ".out."),
    (r"\.embed_positions\.weight", ".positional_embedding"),
    (r"\.embed_tokens\.", ".token_embedding."),
    (r"^encoder\.layer_norm\.", "encoder.ln_post."),
    (r"^decoder\.layer_norm\.", "decoder.ln."),
)


def test_openais_own_names(random_whisper, tmp_path):
    config = small()
    theirs, folder = random_whisper(config)
    file, tensors = open_weights(folder), {}
    for name in file.tensors:
        renamed = name
        for pattern, replacement in TO_OPENAI:
            renamed = re.sub(pattern, replacement, renamed)
        tensors[renamed] = file.tensor(name).clone()
    assert {"decoder.token_embedding.weight", "decoder.blocks.2.cross_attn.key.weight", "encoder.ln_post.bias"} <= set(
        tensors
    )
    (tmp_path / "openai").mkdir()
    write_safetensors(tmp_path / "openai" / "model.safetensors", tensors)
    shutil.copy(folder / "config.json", tmp_path / "openai" / "config.json")
    ours = Checkpoint.open(tmp_path / "openai").load(torch.float32)
    mel, ids = inputs(config)
    with torch.inference_mode():
        assert relative_error(ours(mel, ids), theirs(input_features=mel, decoder_input_ids=ids).logits) < TOLERANCE


def test_openais_pickle_is_refused_with_a_way_out(tmp_path):
    from craton.checkpoints.sources import parse_reference

    (tmp_path / "tiny.en.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(FileFormatError, match="pickle") as refusal:
        parse_reference(str(tmp_path / "tiny.en.pt"))
    assert "safetensors" in refusal.value.remedy


def test_what_is_not_done_is_refused(random_whisper):
    _, folder = random_whisper(small(scale_embedding=True))
    with pytest.raises(CheckpointError, match="scale_embedding"):
        Checkpoint.open(folder)


def test_how_it_is_to_be_decoded(tmp_path):
    assert read_generation(tmp_path) == WhisperGeneration()
    (tmp_path / "config.json").write_text('{"suppress_ids": [1, -1, 7], "suppress_ids_begin": [220]}')
    assert read_generation(tmp_path) == WhisperGeneration((1, 7), (220,))
    (tmp_path / "generation_config.json").write_text(
        '{"suppress_tokens": [5], "begin_suppress_tokens": [6], "alignment_heads": [[1, 2]], "is_multilingual": true}'
    )
    assert read_generation(tmp_path) == WhisperGeneration((5,), (6,), ((1, 2),), True)
    (tmp_path / "generation_config.json").write_text('{"alignment_heads": [[1, "x"]]}')
    with pytest.raises(FileFormatError, match="alignment_heads"):
        read_generation(tmp_path)
