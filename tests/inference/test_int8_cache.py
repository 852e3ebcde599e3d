"""A cache of 8 bits in the engine: the same text whatever is reused, taken away or guessed, and less memory."""

from __future__ import annotations

import pytest
import torch
from tests.inference.test_engine import CONTEXT, MODEL, TOKENIZER, VOCAB, prompt

import craton
from craton.inference.drafting import NGramDrafter
from craton.inference.engine import Engine, Request
from craton.inference.prefix_store import BLOCK
from craton.inference.scoring import Scorer
from craton.inference.settings import SamplingSettings
from craton.inference.streaming import StreamWindow, slide
from craton.trunk import KVCache

NO_END = {VOCAB - 1: -100.0}
PLAIN, INT8 = (KVCache(MODEL.config.trunk, dtype=dtype).position_bytes for dtype in (torch.float32, torch.int8))


def engine(**settings) -> Engine:
    return Engine(MODEL, TOKENIZER, dtype=torch.float32, kv="int8", **settings)


def asked(seed: int, length: int, tokens: int = 30, **fields) -> Request:
    settings = SamplingSettings(max_tokens=tokens, logit_bias=NO_END, temperature=0.5, seed=seed)
    return Request(prompt(seed, length), settings, **fields)


def test_a_position_takes_its_codes_and_their_scales():
    assert engine().cache.position_bytes == INT8 == PLAIN * (8 + 4) // (8 * 4)
    memory = 64 * BLOCK * INT8
    assert engine(cache_bytes=memory)._slots.total == 64
    assert Engine(MODEL, TOKENIZER, dtype=torch.float32, cache_bytes=memory)._slots.total < 32


def test_logits_are_near_those_of_a_plain_cache():
    ids = prompt(1, 300)
    caches = [KVCache(MODEL.config.trunk, 1, dtype=dtype) for dtype in (torch.float32, torch.int8)]
    slots_T = torch.zeros(300, dtype=torch.long)
    plain_TV, coded_TV = (MODEL(torch.tensor(ids), torch.arange(300), slots_T, cache) for cache in caches)
    assert 0 < (coded_TV - plain_TV).pow(2).mean().sqrt() < 0.03 * plain_TV.std()


def test_batches_reuse_preemption_and_guesses_change_no_text():
    requests = [asked(seed, 20 + 45 * seed) for seed in range(5)]
    alone = [engine().submit(request).wait().ids for request in requests]
    together = engine(slots=3, drafter=NGramDrafter())
    assert [g.wait().ids for g in [together.submit(request) for request in requests]] == alone
    # Read again from what the cache, or the store, still holds.
    again = together.submit(requests[4]).wait()
    assert (again.ids, again.cached_tokens > BLOCK) == (alone[4], True)
    # Memory for two of them: the others take turns, and one of higher rank takes the place of who runs.
    short = engine(slots=4, cache_bytes=16 * BLOCK * INT8)
    generations = [short.submit(request) for request in requests]
    for _ in range(6):
        short.step()
    first = short.submit(asked(9, 200, priority=5))
    assert first.wait().ids == engine().submit(asked(9, 200)).wait().ids
    assert [g.wait().ids for g in generations] == alone
    short.check()


def test_scores_go_through_the_cache():
    ids = prompt(3, 700)
    plain = Scorer(MODEL, dtype=torch.float32).rolling(ids, 500, 1)
    coded = Scorer(MODEL, dtype=torch.int8).rolling(ids, 500, 1)
    assert 0 < abs(coded.logprob - plain.logprob) < 0.01 * abs(plain.logprob)
    # A context that is carried over to a larger cache keeps its scales.
    scorer, context = Scorer(MODEL, dtype=torch.int8), prompt(4, 300)
    scorer.score([(context, [5])])
    longer = scorer.score([(context + prompt(5, 400), [6])])[0]
    assert longer.logprob == pytest.approx(
        Scorer(MODEL, dtype=torch.int8).score([(context + prompt(5, 400), [6])])[0].logprob
    )


def test_a_moved_key_is_that_of_its_new_place():
    ids, slots_T = prompt(1, 40), torch.zeros(40, dtype=torch.long)
    moved, fresh = (KVCache(MODEL.config.trunk, 1, dtype=dtype) for dtype in (torch.int8, torch.float32))
    MODEL.hidden(torch.tensor(ids), torch.arange(40), slots_T, moved)
    moved.lengths[0] = slide(moved, MODEL.config.trunk, 0, 4, 16)
    MODEL.hidden(torch.tensor(ids[:4] + ids[20:]), torch.arange(24), slots_T[:24], fresh)
    # Of the first layer, whose keys depend on a token and its position alone; two roundings by half a step.
    found, expected = (cache.read(0, slice(0, 1), 0, 24, torch.float32) for cache in (moved, fresh))
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).abs() <= 2 / 127 * other.abs().amax(-1, keepdim=True)).all()


def test_text_without_end():
    requests = [asked(seed, 30, tokens=150) for seed in range(3)]
    alone = [engine(stream=StreamWindow(64, 4)).submit(request).wait().ids for request in requests]
    together = engine(stream=StreamWindow(64, 4))
    assert [g.wait().ids for g in [together.submit(request) for request in requests]] == alone
    assert max(together.cache.lengths) <= 68


def test_a_model_says_what_was_decided(smollm2_gguf):
    model = craton.load(smollm2_gguf, kv="int8", speculate="off")
    assert "keys and values: int8, 12.2 kB a token (as asked)" in model.plan.decisions
    assert model.engine.cache.keys[0].dtype == torch.int8
    plain = craton.load(smollm2_gguf, speculate="off")
    assert not any("keys and values" in decision for decision in plain.plan.decisions)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert "Paris" in model.chat(question, max_tokens=24).text


def test_a_context_still_has_its_end():
    generation = engine().submit(asked(2, CONTEXT - 3, tokens=3)).wait()
    assert len(generation.tokens) == 3
