"""The default models against reference implementations, on real text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import craton
from craton.errors import ContextOverflow, UsageError
from craton.inference.engine import Engine, Request
from craton.inference.linears import EXACT_ROWS
from craton.inference.model import Completion, Model
from craton.inference.settings import SamplingSettings
from craton.trunk import KVCache

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf) -> Model:
    return craton.load(smollm2_gguf)


@pytest.fixture(scope="module")
def minilm(minilm_folder) -> Model:
    return craton.load(minilm_folder)


def wikitext(model: Model, shared_data: Path, tokens: int) -> list[int]:
    return model.tokenizer.encode((shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:8000])[:tokens]


def logits_in_pieces(model: Model, ids: list[int], piece: int) -> Tensor:
    cache = KVCache(model.module.config.trunk, 1, dtype=torch.float32)
    outs = []
    with torch.inference_mode():
        for first in range(0, len(ids), piece):
            part = torch.tensor(ids[first : first + piece])
            positions = torch.arange(first, first + len(part))
            outs.append(model.module(part, positions, torch.zeros(len(part), dtype=torch.long), cache))
    return torch.cat(outs)


@pytest.mark.slow
@pytest.mark.peer
def test_top_1_agrees_with_a_float32_reference_on_500_tokens(smollm2, smollm2_gguf, shared_data):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="transformers reads GGUF through accelerate")
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()
    ids = wikitext(smollm2, shared_data, 500)
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0]
    unpacked = craton.load(smollm2_gguf, dtype="float32")
    assert torch.equal(unpacked.logits(ids).argmax(-1), expected.argmax(-1))
    if smollm2.plan.packed:
        packed = logits_in_pieces(smollm2, ids, EXACT_ROWS)
        assert torch.equal(packed.argmax(-1), expected.argmax(-1))
        # A long piece keeps 8 bits of each activation.
        coarse = smollm2.logits(ids)
        assert (coarse.argmax(-1) == expected.argmax(-1)).float().mean() > 0.95


def test_one_token_at_a_time_equals_a_whole_prompt(smollm2):
    ids = smollm2.tokenizer.encode("The rain in Spain stays mainly in the plain, or so the song has it.")
    assert len(ids) <= EXACT_ROWS
    whole, steps = smollm2.logits(ids), logits_in_pieces(smollm2, ids, 1)
    # 15-bit activations on the packed path; bfloat16's 8 bits where there are no native kernels.
    tolerance = 1e-3 if smollm2.plan.dtype == torch.float32 else 0.05
    assert ((whole - steps).abs().max() / whole.abs().max()).item() < tolerance


def test_the_same_seed_gives_the_same_text_alone_and_in_a_batch(smollm2):
    if not smollm2.plan.packed:
        pytest.skip(f"kernel {smollm2.plan.kernel}: its sums depend on the number of rows")
    words = ("Gravity", "Tea", "The old man and the sea", "One", "Music in the streets")
    requests = [
        Request(
            smollm2.tokenizer.encode(f"{word} is"),
            SamplingSettings(max_tokens=20 + i, temperature=0.9, seed=i, logprobs=1),
        )
        for i, word in enumerate(words)
    ]

    def engine() -> Engine:
        return Engine(smollm2.module, smollm2.tokenizer, dtype=smollm2.plan.dtype, native_threads=2)

    alone = [engine().submit(request).wait() for request in requests]
    shared = engine()
    together = [shared.submit(request) for request in requests]
    for a, b in zip(alone, [generation.wait() for generation in together], strict=True):
        assert [t.id for t in a.tokens] == [t.id for t in b.tokens]
        # The linear layers give the same bits; attention adds in an order that depends on the longest sequence.
        assert [t.logprob for t in a.tokens] == pytest.approx([t.logprob for t in b.tokens], rel=1e-2, abs=1e-3)


def test_chat_answers(smollm2):
    completion = smollm2.chat(QUESTION, max_tokens=20)
    assert isinstance(completion, Completion)
    assert "Paris" in completion.text
    assert completion.choices[0].finish_reason == "stop"
    stream = smollm2.chat(QUESTION, stream=True, max_tokens=20)
    assert "".join(stream) == completion.text
    assert stream.completion.cached_tokens > 0
    assert stream.completion.text == completion.text


def test_leaving_a_stream_early_cancels_it(smollm2):
    stream = smollm2.generate("Once upon a time", stream=True, max_tokens=200)
    for _ in stream:
        break
    assert stream.completion.choices[0].finish_reason == "cancelled"
    assert smollm2.generate("One, two,", max_tokens=2).completion_tokens == 2


def test_what_a_model_refuses(smollm2, minilm):
    with pytest.raises(UsageError, match="one answer"):
        smollm2.generate("x", stream=True, n=2)
    with pytest.raises(UsageError, match="encoder"):
        minilm.generate("x")
    with pytest.raises(ContextOverflow, match="808 more than the context of 8192"):
        smollm2.generate([1] * 8999)
    with pytest.raises(UsageError, match="text 2 is empty"):
        smollm2.embed(["x", ""])


@pytest.mark.peer
def test_embeddings_are_the_reference_s(minilm, minilm_folder):
    transformers = pytest.importorskip("transformers")
    texts = ["A cat sits on a mat.", "Ein Hund läuft.", "سلام دنیا", "x", "word " * 200]
    ours = minilm.embed(texts)
    reference = transformers.AutoModel.from_pretrained(minilm_folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = reference(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    theirs = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    assert (ours * theirs).sum(-1).min() > 0.9999
    assert torch.allclose(minilm.embed(texts[1])[0], ours[1], atol=1e-5)
