"""The engine on a small random model: batching, caching, stopping and refusing."""

from __future__ import annotations

import pytest
import tokenizers
import torch

from craton.errors import ContextOverflow, UsageError
from craton.inference.engine import PREFILL_CHUNK, Engine, Request
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import (
    AttentionConfig,
    FeedForwardConfig,
    LayerConfig,
    NormConfig,
    RotaryConfig,
    RotaryScaling,
    TrunkConfig,
)

VOCAB, CONTEXT = 97, 1200


def make_model(rotary: RotaryConfig = RotaryConfig(dims=8)) -> CausalLM:  # noqa: B008
    torch.manual_seed(0)
    norm = NormConfig(kind="rms")
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=rotary),
        feedforward=FeedForwardConfig(hidden=48, activation="silu", gated=True),
        norm=norm,
    )
    config = CausalLMConfig(
        vocab=VOCAB, context=CONTEXT, tied=False, trunk=TrunkConfig(width=32, layers=(layer,) * 2, final_norm=norm)
    )
    model = CausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    return model.requires_grad_(False).eval()


def make_tokenizer() -> Tokenizer:
    # One letter-like token for each id; the last one ends a text.
    vocab = {chr(0x4E00 + i): i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="</s>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


MODEL, TOKENIZER = make_model(), make_tokenizer()


def make_engine(slots: int = 8) -> Engine:
    return Engine(MODEL, TOKENIZER, dtype=torch.float32, slots=slots)


def prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def naive(ids: list[int], settings: SamplingSettings, model: CausalLM = MODEL) -> list[int]:
    """The answer by whole forward passes, without cache or batch."""
    from craton.inference.sampling import Sampler

    sampler, out = Sampler(settings, ids, settings.seed or 0), list(ids)
    for _ in range(settings.max_tokens or CONTEXT):
        logits = model(torch.tensor(out), torch.arange(len(out)))[-1].float()
        token = sampler(logits)
        if token in TOKENIZER.eos_ids:
            break
        out.append(token)
    return out[len(ids) :]


def answer(engine: Engine, ids: list[int], **fields) -> list[int]:
    return [token.id for token in engine.submit(Request(ids, SamplingSettings(**fields))).wait().tokens]


def test_greedy_equals_whole_forward_passes():
    ids = prompt(1, 20)
    assert answer(make_engine(), ids, max_tokens=30) == naive(ids, SamplingSettings(max_tokens=30))


def test_sampled_equals_whole_forward_passes():
    fields = {"max_tokens": 25, "temperature": 1.0, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.2}
    ids = prompt(2, 9)
    assert answer(make_engine(), ids, **fields) == naive(ids, SamplingSettings(**fields))


def test_a_prompt_longer_than_a_chunk():
    ids = prompt(3, PREFILL_CHUNK * 2 + 7)
    assert answer(make_engine(), ids, max_tokens=5) == naive(ids, SamplingSettings(max_tokens=5))


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_alone_or_in_a_batch_the_same_tokens(slots):
    requests = [
        Request(prompt(i, 3 + 7 * i), SamplingSettings(max_tokens=4 + 5 * i, temperature=0.8, seed=i)) for i in range(9)
    ]
    alone = [[t.id for t in make_engine().submit(request).wait().tokens] for request in requests]
    engine = make_engine(slots)
    generations = [engine.submit(request) for request in requests]
    assert [[t.id for t in g.wait().tokens] for g in generations] == alone


def test_a_second_turn_reads_only_what_is_new():
    engine = make_engine()
    first = engine.submit(Request(prompt(4, 30), SamplingSettings(max_tokens=10))).wait()
    longer = first.ids + prompt(5, 6)
    second = engine.submit(Request(longer, SamplingSettings(max_tokens=10))).wait()
    assert second.cached_tokens == len(first.ids) - 1  # the last token was chosen and never read
    assert [t.id for t in second.tokens] == naive(longer, SamplingSettings(max_tokens=10))


def test_a_prefix_in_a_busy_slot_is_copied():
    engine = make_engine()
    shared = prompt(6, 40)
    running = engine.submit(Request(shared, SamplingSettings(max_tokens=60)))
    engine.step()
    other = engine.submit(Request(shared + prompt(7, 3), SamplingSettings(max_tokens=8))).wait()
    assert other.cached_tokens == 40
    assert [t.id for t in other.tokens] == naive(shared + prompt(7, 3), SamplingSettings(max_tokens=8))
    assert [t.id for t in running.wait().tokens] == naive(shared, SamplingSettings(max_tokens=60))


@pytest.mark.parametrize("length", [20, 37, 41, 300])
def test_longrope_reads_a_sequence_again_where_its_frequencies_change(length):
    factors = {"short_factors": (1.0, 1.0, 1.5, 2.0), "long_factors": (3.0, 5.0, 9.0, 20.0)}
    scaling = RotaryScaling(kind="longrope", original_context=40, attention_factor=1.2, **factors)
    model = make_model(RotaryConfig(dims=8, scaling=scaling))
    engine = Engine(model, TOKENIZER, dtype=torch.float32)
    ids, settings = prompt(16, length), SamplingSettings(max_tokens=30, logit_bias={VOCAB - 1: -100.0})
    first = engine.submit(Request(ids, settings)).wait()
    assert [t.id for t in first.tokens] == naive(ids, settings, model)
    again = engine.submit(Request(ids, settings)).wait()
    assert [t.id for t in again.tokens] == [t.id for t in first.tokens]


@pytest.mark.parametrize("calls_before", [0, 1])
def test_an_interrupt_in_the_middle_of_a_step_spoils_nothing(monkeypatch, calls_before):
    engine = make_engine()
    other = engine.submit(Request(prompt(17, 9), SamplingSettings(max_tokens=20)))
    stopped = engine.submit(Request(prompt(18, 30), SamplingSettings(max_tokens=40)))
    for _ in range(5):
        engine.step()
    # With one call before it, the pass over the answers is complete and that over a new prompt is interrupted.
    engine.submit(Request(prompt(20, 12), SamplingSettings(max_tokens=2)))
    whole, calls = MODEL.trunk.layers[1].forward, iter([None] * calls_before + [KeyboardInterrupt])

    def interrupted(*arguments):
        if (error := next(calls, None)) is not None:
            raise error
        return whole(*arguments)

    monkeypatch.setattr(MODEL.trunk.layers[1], "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    stopped.cancel()
    longer = stopped.ids + prompt(19, 5)
    following = engine.submit(Request(longer, SamplingSettings(max_tokens=10))).wait()
    assert [t.id for t in following.tokens] == naive(longer, SamplingSettings(max_tokens=10))
    assert [t.id for t in other.wait().tokens] == naive(prompt(17, 9), SamplingSettings(max_tokens=20))


def test_several_answers_differ_and_share_the_prompt():
    engine = make_engine()
    settings = SamplingSettings(max_tokens=12, temperature=1.5, seed=3, n=3)
    generations = [engine.submit(Request(prompt(8, 50), settings, choice)) for choice in range(3)]
    texts = {tuple(t.id for t in g.wait().tokens) for g in generations}
    assert len(texts) == 3
    assert [g.cached_tokens for g in generations] == [0, 49, 49]


def test_cancelling_frees_the_slot_and_leaves_the_others():
    engine = make_engine(slots=1)
    first = engine.submit(Request(prompt(9, 5), SamplingSettings(max_tokens=500)))
    second = engine.submit(Request(prompt(10, 5), SamplingSettings(max_tokens=6)))
    next(iter(first))
    first.cancel()
    assert [t.id for t in second.wait().tokens] == naive(prompt(10, 5), SamplingSettings(max_tokens=6))
    assert first.finish_reason == "cancelled"


TALK = {"max_tokens": 20, "temperature": 1.0, "seed": 1, "logit_bias": {VOCAB - 1: -100.0}}


def test_a_stop_string_ends_the_answer_and_is_not_in_it():
    ids = prompt(11, 12)
    whole = make_engine().submit(Request(ids, SamplingSettings(**TALK))).wait().text
    assert len(whole) == 20
    stop = whole[7:9]
    stopped = make_engine().submit(Request(ids, SamplingSettings(**TALK, stop=(stop,)))).wait()
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_beginning_of_a_stop_string_that_leads_nowhere_is_given_out():
    ids = prompt(11, 12)
    whole = make_engine().submit(Request(ids, SamplingSettings(**TALK))).wait().text
    settings = SamplingSettings(**TALK, stop=(whole[-1] + "\0", whole[7] + "\0"))
    assert make_engine().submit(Request(ids, settings)).wait().text == whole


def test_length_and_end_of_text():
    generation = make_engine().submit(Request(prompt(12, 4), SamplingSettings(max_tokens=3))).wait()
    assert (generation.finish_reason, len(generation.tokens)) == ("length", 3)
    end = TOKENIZER.eos_ids[0]
    ended = make_engine().submit(Request(prompt(12, 4), SamplingSettings(logit_bias={end: 1000.0}))).wait()
    assert (ended.finish_reason, ended.tokens) == ("stop", [])


def test_the_context_is_filled_to_its_last_token():
    ids = prompt(13, CONTEXT - 4)
    generation = make_engine().submit(Request(ids, SamplingSettings())).wait()
    assert generation.finish_reason in ("length", "stop")
    assert len(ids) + len(generation.tokens) <= CONTEXT


def test_log_probabilities_come_with_each_token():
    settings = SamplingSettings(max_tokens=4, logprobs=2)
    for token in make_engine().submit(Request(prompt(14, 6), settings)).wait().tokens:
        assert token.top_logprobs is not None
        assert token.logprob == pytest.approx(token.top_logprobs[0][1])
        assert len(token.top_logprobs) == 2


def test_too_long_a_prompt_says_by_how_much():
    with pytest.raises(ContextOverflow, match=r"3 more than the context of 1200"):
        make_engine().submit(Request(prompt(15, CONTEXT), SamplingSettings(max_tokens=3)))
    with pytest.raises(ContextOverflow, match=r"101 more"):
        make_engine().submit(Request(prompt(15, CONTEXT + 100), SamplingSettings()))


def test_bad_ids_are_refused():
    for bad in ([], [VOCAB], [-1]):
        with pytest.raises(UsageError):
            make_engine().submit(Request(bad))
    with pytest.raises(UsageError):
        make_engine().submit(Request([1], SamplingSettings(logit_bias={VOCAB: 1.0})))
