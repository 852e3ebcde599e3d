"""Who goes first, who gives way, and that nobody's text tells: any program of requests against each one alone."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.inference.test_engine import CONTEXT, MODEL, TOKENIZER, VOCAB, make_model, naive, prompt

import craton
from craton.errors import ContextOverflow, DeadlineExceeded, UsageError
from craton.inference.drafting import NGramDrafter
from craton.inference.engine import PREFILL_CHUNK, Engine, Generation, Request
from craton.inference.native import has_tiles
from craton.inference.prefix_store import BLOCK
from craton.inference.scheduling import PASS_TOKENS, STEP_COPIES, STEP_TOKENS, Line, next_pieces
from craton.inference.settings import SamplingSettings
from craton.inference.streaming import StreamWindow
from craton.trunk import KVCache, RotaryConfig, RotaryScaling

NO_END = {VOCAB - 1: -100.0}
BLOCK_BYTES = BLOCK * KVCache(MODEL.config.trunk, dtype=torch.float32).position_bytes


def engine(slots: int = 8, blocks: int = 1000, **settings) -> Engine:
    return Engine(MODEL, TOKENIZER, dtype=torch.float32, slots=slots, cache_bytes=blocks * BLOCK_BYTES, **settings)


def sampled(seed: int, tokens: int, **fields) -> SamplingSettings:
    return SamplingSettings(max_tokens=tokens, temperature=0.8, seed=seed, logit_bias=NO_END, **fields)


def ids_of(generation: Generation) -> list[int]:
    return [token.id for token in generation.wait().tokens]


@dataclass
class One:
    rank: tuple[int, int]
    last_read: int = 0
    piece: int = PREFILL_CHUNK


def test_a_line_is_by_priority_and_then_by_arrival():
    line: Line[One] = Line()
    came = [One((-priority, number)) for number, priority in enumerate([0, 5, 0, 5, -1])]
    for one in came:
        line.add(one)
    assert [one.rank[1] for one in line] == [1, 3, 0, 2, 4]
    line.remove(came[1])
    line.remove(came[0])
    line.add(came[0])  # what gave up its place stands before what came later
    assert [one.rank[1] for one in line] == [3, 0, 2, 4]


def test_a_step_reads_whole_pieces_within_its_tokens_and_in_turn():
    readers = [One((0, number)) for number in range(5)]
    assert next_pieces(readers, written=0) == readers[:2]
    readers[0].last_read = readers[1].last_read = 1
    assert next_pieces(readers, written=0) == readers[2:4]
    assert next_pieces(readers, written=10 * STEP_TOKENS) == [readers[2]]  # prompts do not starve either
    readers[4].rank = (-1, 4)
    assert next_pieces(readers, written=0)[0] is readers[4]
    short = [One((0, number), piece=4) for number in range(100)]
    assert len(next_pieces(short, written=0)) == STEP_TOKENS // (PASS_TOKENS + 4)
    assert next_pieces([], written=3) == []


def test_answers_go_on_in_every_step_while_prompts_are_read():
    busy = engine(slots=12)
    writing = [busy.submit(Request(prompt(i, 9), sampled(i, 60))) for i in range(3)]
    while not all(g.tokens for g in writing):
        busy.step()
    reading = [busy.submit(Request(prompt(i, 900), sampled(i, 2))) for i in range(10, 18)]
    for _ in range(12):
        before, done = [len(g.tokens) for g in writing], sum(g._done for g in reading)
        busy.step()
        assert [len(g.tokens) for g in writing] == [n + 1 for n in before]
        assert sum(g._done for g in reading) - done <= STEP_TOKENS
    for generation in [*writing, *reading]:
        assert ids_of(generation) == naive(generation.request.prompt, generation.request.settings)
    busy.check()


def test_a_step_does_not_copy_for_all_who_wait():
    busy, beginning = engine(slots=40), prompt(1, 900)
    busy.submit(Request(beginning, sampled(1, 1))).wait()
    generations = [busy.submit(Request(beginning + prompt(i, 5), sampled(i, 2))) for i in range(30)]
    busy.step()
    assert 0 < sum(g.cached_tokens for g in generations) < STEP_COPIES + 900
    for generation in generations:
        generation.wait()
    assert sum(g.cached_tokens for g in generations) >= 30 * 900
    busy.check()


def test_a_short_prompt_is_not_held_up_by_long_ones():
    busy = engine()
    long = [busy.submit(Request(prompt(i, 1100), sampled(i, 2))) for i in range(4)]
    short = busy.submit(Request(prompt(9, 20), sampled(9, 2)))
    short.wait()
    assert not any(g.first_token_at for g in long)


def test_the_higher_priority_goes_first_and_equals_as_they_came():
    one, ended = engine(slots=1), []
    asked = [(number, priority) for number, priority in enumerate([0, 0, 2, 1, 2])]
    waiting = {n: one.submit(Request(prompt(n, 9), sampled(n, 3), priority=p)) for n, p in asked}
    while waiting:
        one.step()
        ended += [n for n, g in waiting.items() if g.finish_reason]
        waiting = {n: g for n, g in waiting.items() if not g.finish_reason}
    assert ended == [2, 4, 3, 0, 1]


@pytest.mark.parametrize("blocks", [3, 1000])
@pytest.mark.parametrize("drafter", [None, NGramDrafter()])
def test_who_gives_way_to_a_higher_priority_goes_on_where_it_was(blocks, drafter):
    # With three blocks there is no memory to keep what was read: it is read again.
    one, settings = engine(slots=1, blocks=blocks, drafter=drafter), sampled(1, 40, repetition_penalty=1.3)
    low = one.submit(Request(prompt(1, 40), settings))
    while len(low.tokens) < 15:
        one.step()
    high = one.submit(Request(prompt(2, 40), sampled(2, 30), priority=1))
    assert ids_of(high) == naive(prompt(2, 40), sampled(2, 30))
    assert len(low.tokens) < 20
    assert ids_of(low) == naive(prompt(1, 40), settings)
    one.check()


def test_equals_do_not_push_each_other_out():
    one = engine(slots=1)
    first, second = (one.submit(Request(prompt(i, 9), sampled(i, 20), priority=3)) for i in range(2))
    second.wait()
    assert first.finish_reason == "length"


def test_who_came_last_gives_way_where_memory_is_short():
    small = engine(slots=4, blocks=12)
    generations = [small.submit(Request(prompt(i, 60), sampled(i, 90))) for i in range(4)]
    gave_way = set()
    while not all(g.finish_reason for g in generations):
        small.step()
        assert small.used_bytes <= 12 * BLOCK_BYTES
        gave_way |= {i for i, g in enumerate(generations) if g.tokens and g._slot is None and not g.finish_reason}
    assert gave_way
    assert 0 not in gave_way
    assert [ids_of(g) for g in generations] == [naive(g.request.prompt, g.request.settings) for g in generations]
    small.check()


def test_a_constraint_is_untouched_by_giving_way():
    pytest.importorskip("llguidance")
    letters = [chr(0x4E00 + i) for i in range(8)]
    settings = SamplingSettings(max_tokens=40, temperature=1.0, seed=1, regex=f"[{''.join(letters)}]{{30}}")
    alone = engine().submit(Request(prompt(4, 12), settings)).wait().text
    one = engine(slots=1, blocks=3)
    low = one.submit(Request(prompt(4, 12), settings))
    for _ in range(10):
        one.step()
    one.submit(Request(prompt(5, 50), sampled(5, 20), priority=9)).wait()
    assert low.wait().text == alone


def test_what_cannot_fit_alone_is_refused_with_numbers():
    small = engine(blocks=4)
    with pytest.raises(ContextOverflow, match=r"130 tokens .* memory for 128 tokens"):
        small.submit(Request(prompt(1, 100), sampled(1, 30)))
    assert len(ids_of(small.submit(Request(prompt(1, 100), sampled(1, 28))))) == 28
    free = small.submit(Request(prompt(1, 100), SamplingSettings(logit_bias=NO_END))).wait()
    assert (len(free.tokens), free.finish_reason) == (28, "length")
    small.check()
    with pytest.raises(UsageError, match="a window of 204 tokens"):
        engine(blocks=4, stream=StreamWindow(200, 4))


def test_a_deadline_ends_what_waits_and_what_runs():
    one = engine(slots=1)
    running = one.submit(Request(prompt(1, 9), sampled(1, 500), deadline=time.monotonic() + 0.05))
    waiting = one.submit(Request(prompt(2, 9), sampled(2, 5), deadline=time.monotonic() - 1))
    other = one.submit(Request(prompt(3, 9), sampled(3, 5), deadline=time.monotonic() + 1000))
    with pytest.raises(DeadlineExceeded):
        waiting.wait()
    with pytest.raises(DeadlineExceeded):
        running.wait()
    assert (running.finish_reason, waiting.finish_reason, waiting.tokens) == ("cancelled", "cancelled", [])
    assert ids_of(other) == naive(prompt(3, 9), sampled(3, 5))
    one.check()


def test_the_check_is_for_an_idle_engine():
    one = engine()
    generation = one.submit(Request(prompt(1, 9), sampled(1, 5)))
    with pytest.raises(RuntimeError, match="1 wait"):
        one.check()
    generation.wait()
    one.check()


def test_a_sequence_that_longrope_stretches_gives_way_too():
    factors = {"short_factors": (1.0, 1.0, 1.5, 2.0), "long_factors": (3.0, 5.0, 9.0, 20.0)}
    scaling = RotaryScaling(kind="longrope", original_context=64, attention_factor=1.2, **factors)
    model = make_model(RotaryConfig(dims=8, scaling=scaling))
    texts = {1: prompt(1, 40), 2: prompt(1, 40) + prompt(2, 60), 3: prompt(1, 40) + prompt(3, 20)}
    expected = {i: naive(ids, sampled(i, 40), model) for i, ids in texts.items()}
    for after in range(0, 44, 4):
        one = Engine(model, TOKENIZER, dtype=torch.float32, slots=2, cache_bytes=8 * BLOCK_BYTES)
        generations = {
            i: one.submit(Request(ids, sampled(i, 40), priority=0 if i == 1 else 1)) for i, ids in texts.items()
        }
        for _ in range(after):
            one.step()
        high = one.submit(Request(texts[2], sampled(2, 40), priority=2))
        assert ids_of(high) == expected[2]
        assert {i: ids_of(g) for i, g in generations.items()} == expected
        one.check()


def test_a_window_that_has_moved_does_not_give_way():
    one = engine(slots=1, stream=StreamWindow(64, 4))
    low = one.submit(Request(prompt(1, 30), sampled(1, 150)))
    alone = ids_of(engine(stream=StreamWindow(64, 4)).submit(Request(prompt(1, 30), sampled(1, 150))))
    while len(low.tokens) < 20:
        one.step()
    one.submit(Request(prompt(2, 30), sampled(2, 5), priority=1)).wait()
    assert len(low.tokens) < 30  # it had not moved yet and gave way
    while len(low.tokens) < 100:
        one.step()
    high = one.submit(Request(prompt(2, 30), sampled(2, 5), priority=1))
    assert ids_of(low) == alone
    assert not high.tokens
    high.wait()
    one.check()


@pytest.mark.parametrize("slots", [5, 64])
def test_among_63_others_the_same_tokens(slots):
    # Beginnings in common, priorities, and memory for a part of it: slots are taken over, given up and read again.
    shared = [prompt(100, 70), prompt(101, 300)]
    requests = [
        Request(
            (shared[i % 2] if i % 3 else []) + prompt(i, 3 + 5 * (i % 17)),
            sampled(i, 5 + i % 29),
            salt="ab"[i % 5 == 0],
            priority=i * 7 % 3,
        )
        for i in range(64)
    ]
    alone = [ids_of(engine().submit(request)) for request in requests]
    busy = engine(slots=slots, blocks=60, drafter=NGramDrafter())
    generations = []
    for i, request in enumerate(requests):
        generations.append(busy.submit(request))
        if i % 4 == 0:
            busy.step()
    assert [ids_of(g) for g in generations] == alone
    assert sum(g.cached_tokens for g in generations) > 1000
    busy.check()


BEGINNINGS = [prompt(50, 100), prompt(51, 40), []]


@st.composite
def requests(draw) -> Request:
    beginning = draw(st.sampled_from(BEGINNINGS))
    ids = beginning[: draw(st.integers(0, len(beginning)))] + prompt(draw(st.integers(0, 3)), draw(st.integers(1, 40)))
    fields = {"presence_penalty": 1.0} if draw(st.booleans()) else {}
    return Request(
        ids,
        sampled(draw(st.integers(0, 5)), draw(st.integers(1, 40)), **fields),
        salt=draw(st.sampled_from(["", "a"])),
        priority=draw(st.integers(0, 2)),
    )


steps = st.one_of(
    st.tuples(st.just("submit"), requests()),
    st.tuples(st.just("step"), st.integers(1, 12)),
    st.tuples(st.sampled_from(["cancel", "late"]), st.integers(0, 30)),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    program=st.lists(steps, min_size=3, max_size=40),
    slots=st.integers(1, 5),
    blocks=st.integers(6, 24),
    guess=st.booleans(),
)
def test_any_program_gives_each_text_as_alone_and_leaks_nothing(program, slots, blocks, guess):
    busy = engine(slots, blocks, drafter=NGramDrafter() if guess else None)
    asked: list[Generation] = []
    for what, value in program:
        if what == "submit":
            asked.append(busy.submit(value))
        elif what == "step":
            for _ in range(value):
                busy.step()
                assert busy.used_bytes <= blocks * BLOCK_BYTES
                assert all(g._slot is None or busy.cache.lengths[g._slot] <= CONTEXT for g in asked)
        elif asked and what == "cancel":
            asked[value % len(asked)].cancel()
        elif asked:
            asked[value % len(asked)].request.deadline = 0.0
    while not all(g.finish_reason for g in asked):
        busy.step()
        assert busy.used_bytes <= blocks * BLOCK_BYTES
    busy.check()
    for generation in asked:
        told = [token.id for token in generation.tokens]
        whole = naive(generation.request.prompt, generation.request.settings)
        assert told == whole[: len(told)]
        if generation.finish_reason == "length":
            assert told == whole
        else:
            assert generation.finish_reason == "cancelled"


@pytest.mark.slow
def test_a_real_model_says_the_same_among_63_others(smollm2_gguf):
    model = craton.load(smollm2_gguf)
    if not has_tiles() or not model.plan.packed:
        pytest.skip("only here a prompt's numbers do not depend on how much of it was found in the cache")

    def made(**settings) -> Engine:
        threads = model.plan.threads
        return Engine(model.module, model.tokenizer, dtype=model.plan.dtype, native_threads=threads, **settings)

    beginning = model.tokenizer.encode("You are a careful assistant who answers in one sentence. " * 6)
    requests = [
        Request(
            (beginning if i % 2 else []) + model.tokenizer.encode(f"Tell me about the number {i} " * (1 + i % 9)),
            SamplingSettings(max_tokens=6 + i % 15, temperature=0.9, seed=i),
            priority=i % 3,
        )
        for i in range(64)
    ]
    alone = [ids_of(made(slots=1).submit(request)) for request in requests]
    busy = made(slots=16, cache_bytes=1500 * made().cache.position_bytes, drafter=NGramDrafter())
    generations = []
    for request in requests:
        generations.append(busy.submit(request))
        busy.step()
    assert [ids_of(g) for g in generations] == alone
    assert sum(g.cached_tokens for g in generations) > 1000
    busy.check()
