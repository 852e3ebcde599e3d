"""Text without end: constant memory, keys at the right places, and what is seen of a text."""

from __future__ import annotations

import pytest
import torch
from tests.inference.test_engine import CONTEXT, MODEL, TOKENIZER, VOCAB, make_model, prompt

from craton.errors import ContextOverflow, UsageError
from craton.inference.drafting import NGramDrafter
from craton.inference.engine import Engine, Request
from craton.inference.settings import SamplingSettings
from craton.inference.streaming import StreamWindow, slide
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import KVCache, LatentConfig, LearnedPositions, NormConfig, RotaryConfig, RotaryScaling

NO_END = {VOCAB - 1: -100.0}


def engine(window: int = 64, sinks: int = 4, model: CausalLM = MODEL, **settings) -> Engine:
    return Engine(model, TOKENIZER, dtype=torch.float32, stream=StreamWindow(window, sinks), **settings)


def read(model: CausalLM, ids: list[int], positions: list[int], cache: KVCache) -> torch.Tensor:
    return model.hidden(torch.tensor(ids), torch.tensor(positions), torch.zeros(len(ids), dtype=torch.long), cache)


YARN = RotaryScaling(kind="yarn", factor=4.0, original_context=64, attention_factor=1.14)
ROTARIES = {
    "plain": RotaryConfig(dims=8),
    "interleaved": RotaryConfig(dims=8, interleaved=True),
    "partial": RotaryConfig(dims=4),
    "linear": RotaryConfig(dims=8, scaling=RotaryScaling(kind="linear", factor=2.0)),
    "yarn": RotaryConfig(dims=8, scaling=YARN),
}


@pytest.mark.parametrize("name", ROTARIES)
def test_moved_keys_are_those_of_their_new_places(name):
    # The first layer's keys depend on a token and its position alone, so reading it there gives the same ones.
    model, ids = make_model(ROTARIES[name]), prompt(1, 40)
    moved, fresh = (KVCache(model.config.trunk, 1, dtype=torch.float32) for _ in range(2))
    read(model, ids, list(range(40)), moved)
    moved.lengths[0] = slide(moved, model.config.trunk, 0, 4, 16)
    read(model, ids[:4] + ids[20:], list(range(24)), fresh)
    assert moved.lengths == [24]
    torch.testing.assert_close(moved.keys[0][0, :, :24], fresh.keys[0][0, :, :24], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moved.values[0][0, :, :24], fresh.values[0][0, :, :24])


def test_latent_attention_moves_the_end_of_its_keys():
    norm = NormConfig(kind="rms")
    latent = LatentConfig(q_rank=None, kv_rank=16, rotary_size=4, norm=norm)
    attention = {"kv_heads": 4, "head_size": 12, "value_size": 8, "latent": latent, "rotary": RotaryConfig(dims=4)}
    base = MODEL.config
    layer = base.trunk.layers[0]
    layer = layer.model_copy(update={"attention": layer.attention.model_copy(update=attention)})
    config = base.model_copy(update={"trunk": base.trunk.model_copy(update={"layers": (layer,)})})
    torch.manual_seed(0)
    model, ids = CausalLM(config).requires_grad_(False), prompt(1, 30)
    moved, fresh = (KVCache(config.trunk, 1, dtype=torch.float32) for _ in range(2))
    read(model, ids, list(range(30)), moved)
    moved.lengths[0] = slide(moved, config.trunk, 0, 2, 10)
    read(model, ids[:2] + ids[12:], list(range(20)), fresh)
    torch.testing.assert_close(moved.keys[0][0, :, :20], fresh.keys[0][0, :, :20], atol=1e-5, rtol=1e-5)


def test_five_contexts_of_text_in_constant_memory():
    short = CausalLM(MODEL.config.model_copy(update={"context": 80}))
    short.load_state_dict(MODEL.state_dict())
    streaming, held = engine(model=short.requires_grad_(False)), set()
    settings = SamplingSettings(max_tokens=5 * 80, temperature=1.0, seed=1, logit_bias=NO_END)
    generation = streaming.submit(Request(prompt(2, 30), settings))
    for number, _ in enumerate(generation):
        if number > 100:
            held.add((streaming.cache.nbytes, max(streaming.cache.lengths) <= 68, len(generation.seen) <= 69))
    assert len(generation.tokens) == 5 * 80
    assert len(held) == 1
    assert next(iter(held))[1:] == (True, True)


def test_within_the_window_nothing_changes():
    ids, settings = prompt(3, 20), SamplingSettings(max_tokens=48, logit_bias=NO_END)
    plain = Engine(MODEL, TOKENIZER, dtype=torch.float32).submit(Request(ids, settings)).wait()
    assert engine().submit(Request(ids, settings)).wait().ids == plain.ids


def test_what_is_seen_is_the_beginning_and_the_end():
    generation = engine(64, 4).submit(Request(prompt(4, 30), SamplingSettings(max_tokens=150, logit_bias=NO_END)))
    generation.wait()
    ids, seen = generation.ids, generation.seen
    assert 4 + 48 <= len(seen) <= 69
    assert seen == ids[:4] + ids[len(ids) - len(seen) + 4 :]


def test_a_prompt_of_any_length_is_read():
    ids = prompt(5, CONTEXT + 500)
    generation = engine().submit(Request(ids, SamplingSettings(max_tokens=20, logit_bias=NO_END))).wait()
    assert len(generation.tokens) == 20
    with pytest.raises(ContextOverflow):
        Engine(MODEL, TOKENIZER, dtype=torch.float32).submit(Request(ids, SamplingSettings(max_tokens=20)))


def test_one_layer_streams_as_if_it_read_what_it_sees_anew():
    # With one layer, keys and values depend on their own token alone: a moved cache is the one of a fresh reading.
    config: CausalLMConfig = MODEL.config
    one = config.model_copy(update={"trunk": config.trunk.model_copy(update={"layers": config.trunk.layers[:1]})})
    torch.manual_seed(3)
    model = CausalLM(one).requires_grad_(False)
    streaming = engine(32, 4, model)
    generation = streaming.submit(Request(prompt(6, 10), SamplingSettings(max_tokens=120, logit_bias=NO_END)))
    chosen, whole = [], Engine._forward

    def watched(self, group):
        found = whole(self, group)
        chosen.extend((list(g.seen), logits_RV[0].clone()) for g, logits_RV in found)
        return found

    Engine._forward = watched  # type: ignore[method-assign]
    try:
        generation.wait()
    finally:
        Engine._forward = whole  # type: ignore[method-assign]
    for seen, logits_V in chosen[::7]:
        fresh_V = model(torch.tensor(seen), torch.arange(len(seen)))[-1]
        torch.testing.assert_close(logits_V, fresh_V, atol=1e-4, rtol=1e-4)
    assert len(chosen) == 120


@pytest.mark.parametrize("window", [8, 20, 64])
def test_batches_and_guesses_change_no_text(window):
    requests = [
        Request(prompt(i, 5 + 20 * i), SamplingSettings(max_tokens=60, temperature=0.3, seed=i, logit_bias=NO_END))
        for i in range(4)
    ]
    alone = [engine(window).submit(request).wait().ids for request in requests]
    together = engine(window, slots=3, drafter=NGramDrafter())
    generations = [together.submit(request) for request in [*requests, requests[3]]]
    assert [g.wait().ids for g in generations] == [*alone, alone[3]]


def test_a_window_that_has_moved_is_not_shared():
    streaming = engine()
    first = streaming.submit(Request(prompt(7, 20), SamplingSettings(max_tokens=200, logit_bias=NO_END))).wait()
    again = streaming.submit(Request(first.seen, SamplingSettings(max_tokens=5, logit_bias=NO_END))).wait()
    assert again.cached_tokens == 0


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_interrupt_in_the_middle_of_a_move_spoils_nothing(monkeypatch, calls):
    import craton.inference.streaming as module

    ids, settings = prompt(8, 20), SamplingSettings(max_tokens=120, logit_bias=NO_END)
    whole, stops = module._turned_back, iter([None] * calls + [KeyboardInterrupt])

    def interrupted(*arguments):
        if (error := next(stops, None)) is not None:
            raise error
        return whole(*arguments)

    streaming = engine()
    generation = streaming.submit(Request(ids, settings))
    monkeypatch.setattr(module, "_turned_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generation.wait()
    generation.wait()
    assert len(generation.tokens) == 120
    seen = generation.seen
    assert seen == generation.ids[:4] + generation.ids[len(generation.ids) - len(seen) + 4 :]
    assert streaming.cache.lengths[0] <= 68


def test_models_that_cannot_stream_and_windows_that_do_not_fit_are_refused():
    factors = {"short_factors": (1.0,) * 4, "long_factors": (2.0,) * 4}
    longrope = RotaryScaling(kind="longrope", original_context=40, **factors)
    with pytest.raises(UsageError, match="LongRoPE"):
        engine(model=make_model(RotaryConfig(dims=8, scaling=longrope)))
    trunk = MODEL.config.trunk.model_copy(update={"positions": LearnedPositions(count=CONTEXT)})
    with pytest.raises(UsageError, match="learned positions"):
        engine(model=CausalLM(MODEL.config.model_copy(update={"trunk": trunk})))
    with pytest.raises(UsageError, match=f"at most {CONTEXT - 4}"):
        engine(window=CONTEXT)
