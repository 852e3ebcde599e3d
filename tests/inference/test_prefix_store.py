"""The prefix store and the slots: what is found, what is never mixed up, and what goes first."""

from __future__ import annotations

import pytest
import torch
from tests.inference.test_engine import MODEL, TOKENIZER, naive, prompt

from craton.inference.engine import Engine, Request
from craton.inference.prefix_store import BLOCK, Kind, PrefixStore
from craton.inference.settings import SamplingSettings
from craton.inference.slots import Slots, common_length
from craton.trunk import KVCache

PLAIN = Kind("", stretched=False)


def filled(slots: int = 3, length: int = 6 * BLOCK) -> KVCache:
    """A cache in which every position of every slot has other numbers."""
    cache = KVCache(MODEL.config.trunk, slots, dtype=torch.float32)
    cache.reserve(length)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor.shape))))
    cache.lengths = [length] * slots
    return cache


def content(cache: KVCache, slot: int, length: int) -> torch.Tensor:
    return torch.stack([t[slot, :, :length] for t in (*cache.keys, *cache.values)]).clone()


def test_what_was_kept_is_loaded_as_it_was():
    cache, ids = filled(), prompt(1, 3 * BLOCK + 5)
    store, before = PrefixStore(cache), content(cache, 0, 3 * BLOCK)
    store.keep(PLAIN, ids, 0, room=10)
    store.check()
    assert store.match(PLAIN, ids[: 2 * BLOCK + 3]) == 2 * BLOCK
    for tensor in (*cache.keys, *cache.values):
        tensor[0] = 0
    assert store.load(PLAIN, ids, 1) == cache.lengths[1] == 3 * BLOCK
    assert torch.equal(content(cache, 1, 3 * BLOCK), before)


def test_texts_share_blocks_and_keep_their_own():
    cache = filled()
    store, a = PrefixStore(cache), prompt(1, 4 * BLOCK)
    b = a[: 2 * BLOCK] + prompt(2, 2 * BLOCK)
    for tensor in (*cache.keys, *cache.values):
        tensor[1, :, : 2 * BLOCK] = tensor[0, :, : 2 * BLOCK]
    kept = [content(cache, slot, 4 * BLOCK) for slot in (0, 1)]
    store.keep(PLAIN, a, 0, room=10)
    store.keep(PLAIN, b, 1, room=10)
    assert len(store) == 6
    for ids, expected in zip((a, b), kept, strict=True):
        store.load(PLAIN, ids, 2)
        assert torch.equal(content(cache, 2, 4 * BLOCK), expected)
    assert store.match(PLAIN, a[:BLOCK] + prompt(3, 40)) == BLOCK


def test_other_salts_and_other_frequencies_find_nothing():
    store, ids = PrefixStore(filled()), prompt(1, 2 * BLOCK)
    store.keep(Kind("a", stretched=False), ids, 0, room=10)
    assert store.match(Kind("a", stretched=False), ids) == 2 * BLOCK
    for other in (PLAIN, Kind("b", stretched=False), Kind("a", stretched=True)):
        assert store.match(other, ids) == 0


def test_equal_hashes_are_not_equal_texts():
    ids = prompt(1, BLOCK)
    other = [ids[0] + 2**61 - 1, *ids[1:]]  # Python's hash of a number is its rest by this prime
    assert hash(tuple(ids)) == hash(tuple(other))
    store = PrefixStore(filled())
    store.keep(PLAIN, ids, 0, room=10)
    assert store.match(PLAIN, other) == 0


def test_a_block_behind_another_beginning_is_not_found():
    store, end = PrefixStore(filled()), prompt(3, BLOCK)
    store.keep(PLAIN, prompt(1, BLOCK) + end, 0, room=10)
    assert store.match(PLAIN, prompt(2, BLOCK) + end) == 0
    assert store.match(PLAIN, end) == 0


def test_the_longest_unused_goes_first_and_from_its_end():
    store, old, new = PrefixStore(filled()), prompt(1, 3 * BLOCK), prompt(2, 3 * BLOCK)
    store.keep(PLAIN, old, 0, room=6)
    store.keep(PLAIN, new, 1, room=6)
    store.match(PLAIN, old)
    store.drop()
    assert (store.match(PLAIN, new), store.match(PLAIN, old)) == (2 * BLOCK, 3 * BLOCK)
    store.keep(PLAIN, prompt(3, 4 * BLOCK), 2, room=6)
    store.check()
    assert len(store) == 6
    assert (store.match(PLAIN, new), store.match(PLAIN, old)) == (0, 2 * BLOCK)
    store.keep(PLAIN, prompt(4, 6 * BLOCK), 2, room=3)  # only its beginning has room
    assert (len(store), store.match(PLAIN, prompt(4, 6 * BLOCK))) == (3, 3 * BLOCK)


def test_what_was_used_last_may_be_spared():
    store, old = PrefixStore(filled()), prompt(1, 4 * BLOCK)
    store.keep(PLAIN, old, 0, room=6)
    store.match(PLAIN, old)
    store.keep(PLAIN, prompt(2, 4 * BLOCK), 1, room=6, but=4)
    store.check()
    assert (store.match(PLAIN, old), store.match(PLAIN, prompt(2, 4 * BLOCK))) == (4 * BLOCK, 2 * BLOCK)


def test_common_length():
    for a, b, expected in (([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2, 9, 4], [1, 2, 3, 4], 2), ([5], [6], 0)):
        assert common_length(a, b) == common_length(b, a) == expected


class Reader:
    """A tenant that has read all of its text."""

    def __init__(self, ids: list[int], salt: str = "") -> None:
        self.readable, self.kind = ids, Kind(salt, stretched=False)


def test_the_check_finds_what_nobody_accounts_for():
    cache = KVCache(MODEL.config.trunk, dtype=torch.float32)
    slots = Slots(cache, 2, 10 * BLOCK * cache.position_bytes)
    cache.reserve(64)
    slots.check()
    slot, _ = slots.place(Reader(prompt(1, 40)), [], 40)
    with pytest.raises(RuntimeError, match="tenants"):
        slots.check()
    cache.lengths[slot] = 40
    slots.leave(slot)
    slots.check()
    assert slots.used == 2
    cache.lengths[slot] = 39
    with pytest.raises(RuntimeError, match="holds 39 positions"):
        slots.check()


def engine(slots: int, blocks: int = 1000) -> Engine:
    bytes_ = blocks * BLOCK * KVCache(MODEL.config.trunk, dtype=torch.float32).position_bytes
    return Engine(MODEL, TOKENIZER, dtype=torch.float32, slots=slots, cache_bytes=bytes_)


def ask(engine: Engine, ids: list[int], salt: str = "") -> int:
    """How many tokens of a prompt were found; the answer must be the right one."""
    settings = SamplingSettings(max_tokens=4)
    generation = engine.submit(Request(ids, settings, salt=salt)).wait()
    assert [t.id for t in generation.tokens] == naive(ids, settings)
    engine.check()
    return generation.cached_tokens


def test_a_text_that_lost_its_slot_is_found_again():
    one, a, b = engine(slots=1), prompt(1, 5 * BLOCK), prompt(2, 3 * BLOCK)
    assert [ask(one, ids) for ids in (a, b, a, b)] == [0, 0, 4 * BLOCK, 2 * BLOCK]
    assert ask(one, a[: 2 * BLOCK + 7]) == 2 * BLOCK


def test_a_long_text_does_not_lose_its_slot_to_a_short_beginning():
    two, long = engine(slots=2), prompt(1, 6 * BLOCK)
    assert ask(two, long) == 0
    assert ask(two, long[:10] + prompt(2, 5)) == 10
    assert ask(two, long + prompt(3, 5)) == 6 * BLOCK


def test_with_little_memory_the_longest_unused_is_read_again():
    small, texts = engine(slots=2, blocks=8), [prompt(i, 3 * BLOCK) for i in range(4)]
    for ids in texts:
        assert ask(small, ids) == 0
        assert small._slots.used <= 8
    assert ask(small, texts[3]) == 3 * BLOCK - 1
    assert ask(small, texts[0]) == 0


@pytest.mark.parametrize("slots", [1, 3])
def test_salts_share_neither_slots_nor_blocks(slots):
    shared, ids = engine(slots), prompt(1, 4 * BLOCK)
    assert ask(shared, ids, "a") == 0
    assert ask(shared, ids, "b") == 0
    assert ask(shared, ids, "b") > 0
    assert ask(shared, ids, "a") > 0
    assert ask(shared, ids) == 0
    running = shared.submit(Request(ids, SamplingSettings(max_tokens=20), salt="c"))
    while not running.tokens:
        shared.step()
    beside = shared.submit(Request(ids, SamplingSettings(max_tokens=3), salt="d")).wait()
    assert beside.cached_tokens == 0


def test_a_prompt_that_another_is_reading_is_waited_for():
    shared, ids = engine(slots=4), prompt(1, 600)
    settings = SamplingSettings(max_tokens=3)
    first, second, other = (
        shared.submit(Request(p, settings)) for p in (ids, ids[:500] + prompt(2, 50), prompt(3, 20))
    )
    other.wait()
    assert first.finish_reason is None  # it has not held up what it shares nothing with
    assert [t.id for t in second.wait().tokens] == naive(second.request.prompt, settings)
    assert second.cached_tokens >= 500
    first.wait()
    shared.check()
