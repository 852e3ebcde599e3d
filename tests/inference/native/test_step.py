"""The whole decode step: torch's numbers, the same bits however it is computed, and no crash whatever goes in."""

from __future__ import annotations

import copy
import ctypes
import math
import os
import signal
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from craton.checkpoints.gguf import GGMLType
from craton.checkpoints.gguf.quantize import quantize
from craton.checkpoints.weights import QuantizedEmbedding, QuantizedLinear, QuantizedTensor
from craton.errors import UnknownName, UsageError
from craton.inference.linears import prepare
from craton.inference.native import library, structures
from craton.inference.native.step import NativeStep, build
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import (
    AttentionConfig,
    ExpertsConfig,
    FeedForwardConfig,
    KVCache,
    LayerConfig,
    LearnedPositions,
    NormConfig,
    RotaryConfig,
    RotaryScaling,
    TrunkConfig,
    replace_linears,
)
from craton.trunk.cache import pack_rows

pytestmark = pytest.mark.usefixtures("kernels")

VOCAB, WIDTH, CONTEXT = 101, 64, 1024
RMS = NormConfig(kind="rms", eps=1e-6)
STRETCHED = RotaryScaling(kind="linear", factor=4, attention_factor=1.2)
GEMMA = NormConfig(kind="rms", eps=1e-6, offset=1.0)


def attention(**fields: Any) -> AttentionConfig:
    return AttentionConfig(**{"heads": 4, "kv_heads": 2, "head_size": 16, "rotary": RotaryConfig(dims=16)} | fields)


def layer(attend: AttentionConfig | None = None, **fields: Any) -> LayerConfig:
    gated = FeedForwardConfig(hidden=96, activation="silu", gated=True)
    return LayerConfig(**{"attention": attend or attention(), "feedforward": gated, "norm": RMS} | fields)


def make(*layers: LayerConfig, kind: str = "Q4_0", head: str = "Q8_0", seed: int = 0, **fields: Any) -> CausalLM:
    """A random model whose weights are all quantised, in torch's hands."""
    torch.manual_seed(seed)
    trunk = {key: fields.pop(key) for key in ("positions", "input_norm") if key in fields}
    settings = {"vocab": VOCAB, "context": CONTEXT, "tied": True} | fields
    norm = layers[0].norm
    model = CausalLM(
        CausalLMConfig(trunk=TrunkConfig(width=WIDTH, layers=layers, final_norm=norm, **trunk), **settings)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
        else:
            nn.init.normal_(parameter, std=1.5 * parameter.shape[1] ** -0.5)
    table = quantized(model.embedding.weight, head)
    tied = settings["tied"]

    def packable(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[1] % 32 == 0

    def replaced(name: str, module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Embedding):
            return QuantizedEmbedding(table, torch.float32)
        assert isinstance(module, nn.Linear)
        own = table if name == "head" and tied else quantized(module.weight, head if name == "head" else kind)
        return QuantizedLinear(own, None if module.bias is None else module.bias.detach())

    replace_linears(model, packable, replaced)
    return model.requires_grad_(False).eval()


def quantized(weight: Tensor, kind: str) -> QuantizedTensor:
    type_ = GGMLType[kind]
    blocks = quantize(weight.detach().numpy(), type_).reshape(len(weight), -1)
    return QuantizedTensor(type_, blocks, tuple(weight.shape))


def step_of(model: CausalLM) -> NativeStep:
    fast = copy.deepcopy(model)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    step, reason = build(fast)
    assert step is not None, reason
    return step


def cache_of(model: CausalLM, slots: int = 1, dtype: torch.dtype = torch.float32) -> KVCache:
    return KVCache(model.config.trunk, slots, dtype=dtype)


def words(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference(model: CausalLM, ids: list[int]) -> Tensor:
    """Logits by torch, in one pass without a cache."""
    return model(torch.tensor(ids), torch.arange(len(ids)))


def one_by_one(model: CausalLM, ids: list[int], dtype: torch.dtype = torch.float32, threads: int = 1) -> Tensor:
    step, cache = step_of(model), cache_of(model, dtype=dtype)
    return torch.cat([step([token], [i], [0], cache, threads) for i, token in enumerate(ids)])


def error(found: Tensor, expected: Tensor) -> float:
    """The root mean square of the difference, in standard deviations."""
    return float((found - expected).pow(2).mean().sqrt() / expected.std())


MODELS = {
    "plain": lambda: make(layer(), layer()),
    "untied": lambda: make(layer(), tied=False, head_bias=True, head="Q4_1"),
    "q4_1": lambda: make(layer(), kind="Q4_1"),
    "q8_0": lambda: make(layer(), kind="Q8_0"),
    "no grouped heads": lambda: make(layer(attention(kv_heads=4))),
    "one key head": lambda: make(layer(attention(heads=7, kv_heads=1, head_size=32, rotary=RotaryConfig(dims=32)))),
    "wide heads": lambda: make(layer(attention(heads=2, kv_heads=1, head_size=80, rotary=RotaryConfig(dims=32)))),
    "biases": lambda: make(
        layer(
            attention(bias=("q", "k", "v", "o")),
            feedforward=FeedForwardConfig(hidden=64, activation="gelu_tanh", gated=True, bias=True),
        )
    ),
    "biases of some": lambda: make(layer(attention(bias=("q",)))),
    "norms of heads": lambda: make(layer(attention(qk_norm=RMS))),
    "norms of widths": lambda: make(layer(attention(qk_norm=RMS, qk_norm_over="width"))),
    "window and softcap": lambda: make(layer(attention(window=5, softcap=2.0, scale=0.4)), layer(), logit_softcap=3.0),
    "interleaved part": lambda: make(layer(attention(rotary=RotaryConfig(dims=8, interleaved=True)))),
    "two rotaries": lambda: make(
        layer(attention(rotary=RotaryConfig(dims=16, theta=1e6))),
        layer(
            attention(
                rotary=RotaryConfig(dims=16, scaling=RotaryScaling(kind="linear", factor=4, attention_factor=1.2))
            )
        ),
    ),
    "no positions": lambda: make(layer(attention(rotary=None))),
    "not gated": lambda: make(layer(feedforward=FeedForwardConfig(hidden=96, activation="relu"))),
    "gelu": lambda: make(layer(feedforward=FeedForwardConfig(hidden=96, activation="gelu", gated=True))),
    "gemma": lambda: make(
        layer(norm=GEMMA, attention_norms=("input", "output"), feedforward_norms=("input", "output")),
        embedding_scale=8.0,
    ),
    "norms behind": lambda: make(layer(attention_norms=("residual",), feedforward_norms=("residual",))),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_agrees_with_torch(name):
    model, ids = MODELS[name](), words(21)
    expected = reference(model, ids)
    found = one_by_one(model, ids)
    assert error(found, expected) < 2e-3
    # All in one call, as when guesses are checked: the same bits.
    together = step_of(model)(ids, range(len(ids)), [0] * len(ids), cache_of(model), 2)
    assert torch.equal(together, found)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_a_cache_of_half_the_bytes(dtype, bound):
    model, ids = MODELS["plain"](), words(40)
    assert 0 < error(one_by_one(model, ids, dtype), one_by_one(model, ids)) < bound


@pytest.mark.parametrize("name", MODELS)
def test_an_8_bit_cache_agrees_with_torch(name):
    # Both go on over one cache, through the same products: what differs is a code here and there that rounds otherwise.
    model, ids = MODELS[name](), words(150)
    fast = copy.deepcopy(model)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    step, cache, found, expected = NativeStep(fast), cache_of(model, dtype=torch.int8), [], []
    for i, token in enumerate(ids):
        expected.append(fast(torch.tensor([token]), torch.tensor([i]), torch.tensor([0]), cache))
        cache.truncate(0, i)
        found.append(step([token], [i], [0], cache, 2))
    assert error(torch.cat(found), torch.cat(expected)) < 1e-3
    # And what 8 bits lose is little.
    assert 0 < error(torch.cat(found), one_by_one(model, ids)) < 3e-2


def test_the_kernels_keep_the_codes_that_torch_keeps(isa):
    model, ids = make(layer(attention(head_size=48, rotary=None))), words(20)
    fast = copy.deepcopy(model)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    ours, theirs = cache_of(model, 2, torch.int8), cache_of(model, 2, torch.int8)
    NativeStep(fast)(ids, range(20), [1] * 20, ours, 2)
    fast.hidden(torch.tensor(ids), torch.arange(20), torch.ones(20, dtype=torch.long), theirs)
    for one, other in zip((*ours.keys, *ours.values), (*theirs.keys, *theirs.values), strict=True):
        assert one.shape[-1] == 48 + 4
        assert (one[1, :, :20, :48].int() - other[1, :, :20, :48].int()).abs().max() <= 1
        torch.testing.assert_close(one[1, :, :20, 48:].view(torch.float32), other[1, :, :20, 48:].view(torch.float32))


@pytest.mark.parametrize("window", [None, 100])
def test_context_across_chunks_and_a_growing_cache(window):
    model, ids = make(layer(attention(window=window)), layer()), words(300)
    expected = reference(model, ids)
    step, cache = step_of(model), cache_of(model)
    for i, token in enumerate(ids):
        found = step([token], [i], [0], cache, 2)
        if i in (0, 15, 16, 126, 127, 128, 129, 255, 256, 299):
            assert error(found[0], expected[i]) < 2e-3
    assert cache.lengths == [300]


def test_it_goes_on_where_torch_has_read():
    model, ids = MODELS["plain"](), words(30)
    cache, fast = cache_of(model, dtype=torch.float16), copy.deepcopy(model)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    fast.hidden(torch.tensor(ids[:29]), torch.arange(29), torch.zeros(29, dtype=torch.long), cache)
    found = NativeStep(fast)([ids[29]], [29], [0], cache, 2)
    assert error(found[0], reference(model, ids)[29]) < 4e-3
    after = fast(torch.tensor([5]), torch.tensor([30]), torch.tensor([0]), cache)  # and torch where it has
    assert error(after[0], reference(model, [*ids, 5])[30]) < 4e-3


@pytest.mark.parametrize("name", ["plain", "window and softcap", "gemma", "interleaved part", "biases", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(name, dtype):
    model, ids = MODELS[name](), words(150)
    results = []
    for isa in library.ISAS:
        try:
            library.select_isa(isa)
        except UnknownName:
            continue
        step = step_of(model)
        for threads in (1, 3):
            cache = cache_of(model, 3, dtype)
            first = [step(ids[i : i + 50], range(i, i + 50), [1] * 50, cache, threads) for i in (0, 50, 100)]
            later = step([1, 2, 3, 4], [150, 0, 151, 0], [1, 0, 1, 2], cache, threads)
            results.append(torch.cat([*first, later]))
    assert len(results) >= 2
    for result in results:
        assert torch.equal(result.view(torch.int32), results[0].view(torch.int32))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model = MODELS["plain"]()
    step, rows = step_of(model), 19
    texts = [words(5 + 9 * i % 140, seed=i) for i in range(rows)]
    cache = cache_of(model, rows, torch.float16)
    for slot, ids in enumerate(texts):
        for first in range(0, len(ids), 64):
            part = ids[first : first + 64]
            step(part, range(first, first + len(part)), [slot] * len(part), cache, 1)
    lengths = [len(ids) for ids in texts]
    together = step([7] * rows, lengths, list(range(rows)), cache, 2)
    for slot in range(rows):
        alone = step([7], [lengths[slot]], [slot], cache, 1)
        assert torch.equal(alone[0], together[slot])
    pair = step([7, 7], [lengths[4], lengths[11]], [4, 11], cache, 2)
    assert torch.equal(pair, together[[4, 11]])


def test_more_rows_than_one_call_takes():
    model, ids = MODELS["plain"](), words(150)
    found = step_of(model)(ids, range(150), [0] * 150, cache_of(model), 2)
    assert torch.equal(found, one_by_one(model, ids))


def test_logits_of_the_last_rows_only():
    model, ids = MODELS["plain"](), words(300)
    expected = one_by_one(model, ids)
    for wanted in (0, 1, 50):
        found = step_of(model)(ids, range(300), [0] * 300, cache_of(model), 2, logits=wanted)
        assert torch.equal(found, expected[300 - wanted :])


needs_tiles = pytest.mark.skipif(not library.has_tiles(), reason="this CPU has no matrix unit that the kernels can use")


@needs_tiles
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_in_bfloat16_agrees_with_torch(name):
    model, ids = MODELS[name](), words(200)
    found = step_of(model)(ids, range(200), [0] * 200, cache_of(model), 2, parts=0)
    assert 0 < error(found, reference(model, ids)) < 2.5e-2


@needs_tiles
@pytest.mark.parametrize("name", ["plain", "one key head", "wide heads", "window and softcap", "biases of some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_a_prompt_is_the_same_bits_however_it_is_cut(name, dtype):
    model, ids, size = MODELS[name](), words(333), 333
    results = []
    for threads, lengths in ((1, [size]), (3, [1, 15, 16, 17, 31, 100, 153])):
        step, cache, place = step_of(model), cache_of(model, 2, dtype), 0
        for length in lengths:
            piece = range(place, place + length)
            logits = step(ids[place : place + length], piece, [1] * length, cache, threads, parts=0, logits=1)
            place += length
        assert cache.lengths == [0, size]
        kept = [t[1, :, :size].float() for t in (*cache.keys, *cache.values)]
        results.append([logits, *kept])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@needs_tiles
def test_rows_of_several_texts_in_bfloat16():
    model, texts = MODELS["plain"](), [words(20, seed=i) for i in range(3)]
    cache = cache_of(model, 3)
    ids, places = [i for text in texts for i in text], [*range(20)] * 3
    slots = [slot for slot in range(3) for _ in range(20)]
    found = step_of(model)(ids, places, slots, cache, 2, parts=0)
    for slot, text in enumerate(texts):
        assert error(found[20 * slot : 20 * slot + 20], reference(model, text)) < 2.5e-2


def test_no_rows():
    model = MODELS["plain"]()
    assert step_of(model)([], [], [], cache_of(model), 1).shape == (0, VOCAB)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_number_gives_nan_and_no_crash(isa, bad):
    model = MODELS["plain"]()
    fast = copy.deepcopy(model)
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    norm = fast.trunk.layers[0].attention_norm["input"]
    norm.weight[3] = bad
    assert NativeStep(fast)([1, 2], [0, 1], [0, 0], cache_of(model), 2).isnan().all()

    # In the cache of one sequence: its rows alone.
    step, cache = step_of(model), cache_of(model, 2, torch.float16)
    step([1, 2, 1, 2], [0, 1, 0, 1], [0, 0, 1, 1], cache, 1)
    clean = step([3, 3], [2, 2], [0, 1], cache, 1)
    cache.values[0][0, 0, 1, 5] = bad
    spoilt = step([3, 3], [2, 2], [0, 1], cache, 1)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1], clean[1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_8_bits_do_not_round_a_bad_number_away(isa, bad):
    fast = copy.deepcopy(MODELS["plain"]())
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    step, cache = NativeStep(fast), cache_of(fast, 2, torch.int8)
    step([1, 2, 1, 2], [0, 1, 0, 1], [0, 0, 1, 1], cache, 1)
    clean = step([3, 3], [2, 2], [0, 1], cache, 1)
    cache.values[0][0, 0, 1] = pack_rows(torch.tensor([bad, *[1.0] * 15]))
    spoilt = step([3, 3], [2, 2], [0, 1], cache, 1)
    assert spoilt[0].isnan().all()
    assert torch.equal(spoilt[1], clean[1])
    fast.trunk.layers[0].attention_norm["input"].weight[3] = bad
    assert NativeStep(fast)([1, 2], [0, 1], [0, 0], cache_of(fast, dtype=torch.int8), 2).isnan().all()


def test_what_lies_behind_a_sequence_is_not_seen():
    model = MODELS["plain"]()
    step, cache = step_of(model), cache_of(model)
    expected = step([1, 2, 3], [0, 1, 2], [0] * 3, cache, 1)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, 3:] = math.nan
    assert torch.equal(step([3], [2], [0], cache, 1)[0], expected[2])
    cache = cache_of(model, dtype=torch.int8)
    expected = step([1, 2, 3], [0, 1, 2], [0] * 3, cache, 1)
    for tensor in (*cache.keys, *cache.values):
        tensor[:, :, 3:] = -1  # a scale of such bytes is NaN
    assert torch.equal(step([3], [2], [0], cache, 1)[0], expected[2])


@pytest.mark.parametrize(
    ("row", "slots"), [((VOCAB, 0, 0), 1), ((-1, 0, 0), 1), ((0, -1, 0), 1), ((0, 0, 1), 1), ((0, 0, -1), 1)]
)
def test_rows_that_do_not_fit_are_refused(row, slots):
    model = MODELS["plain"]()
    with pytest.raises(UsageError, match="does not fit"):
        step_of(model)(*([number] for number in row), cache_of(model, slots), 1)


def test_null_pointers_and_wrong_shapes_are_refused():
    model = MODELS["plain"]()
    step, cache = step_of(model), cache_of(model)
    step([1], [0], [0], cache, 1)
    call, one, out = library.library().craton_step, (ctypes.c_int64 * 1)(0), torch.empty(VOCAB)
    rows = structures.StepRows(*[ctypes.addressof(one)] * 3, 1, 1, 2)
    good = [ctypes.byref(step._model), ctypes.byref(step._cache), ctypes.byref(rows), out.data_ptr(), 1]
    assert call(*good) == library.OK
    for place in (0, 1, 2, 3):
        assert call(*good[:place], None, *good[place + 1 :]) == library.BAD_ARGUMENT
    record = step._layers[0]
    for part, field, value in (
        (record, "heads", 3),
        (record, "head_size", 8),
        (record, "kv_heads", 0),
        (record, "window", -1),
        (record, "rotary", 1),
        (record, "activation", 9),
        (record.o.weight, "rows", WIDTH + 16),
        (record.down.weight, "columns", 32),
        (record.up.weight, "data", None),
        (record.gate.weight, "format", 7),
        (step._cache, "capacity", 100),
        (step._cache, "type", 4),
        (step._cache, "layers", 1),
        (rows, "ids", None),
        (rows, "positions", None),
        (rows, "slots", None),
        (rows, "count", -1),
        (rows, "count", 257),
        (rows, "logits", -1),
        (rows, "logits", 2),
        (rows, "parts", 3),
        (rows, "parts", -1),
    ):
        before = getattr(part, field)
        setattr(part, field, value)
        assert call(*good) == library.BAD_ARGUMENT, field
        setattr(part, field, before)
    assert call(*good) == library.OK


def without_packed_head() -> CausalLM:
    model = make(layer(), tied=False)
    model.head = nn.Linear(WIDTH, VOCAB)
    return model


EXPERTS = ExpertsConfig(count=2, per_token=1, expert=FeedForwardConfig(hidden=32, activation="silu", gated=True))
LONG = RotaryScaling(kind="longrope", original_context=8, short_factors=(1.0,) * 8, long_factors=(2.0,) * 8)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: make(layer(parallel=True)), "side by side"),
        (lambda: make(layer(feedforward=EXPERTS)), "Experts"),
        (lambda: make(layer(norm=NormConfig(kind="layer"))), "LayerNorm"),
        (lambda: make(layer(attention(head_size=8, heads=8, rotary=None))), "8 numbers"),
        (lambda: make(layer(attention(rotary=RotaryConfig(dims=16, scaling=LONG)))), "LongRoPE"),
        (lambda: make(layer(attention(value_size=32))), "value heads"),
        (lambda: make(layer(), positions=LearnedPositions(count=CONTEXT)), "learned positions"),
        (without_packed_head, "the head is a Linear"),
    ],
)
def test_a_model_that_it_cannot_run_has_a_reason(model, reason):
    fast = model()
    prepare(fast, prepack=False, tiles=False, release=lambda: None)
    step, words_ = build(fast)
    assert step is None
    assert reason in words_


def test_a_plain_embedding():
    model = make(layer(), tied=False)
    model.embedding = nn.Embedding(VOCAB, WIDTH).requires_grad_(False)
    assert error(one_by_one(model, words(9)), reference(model, words(9))) < 2e-3


@pytest.mark.parametrize("tied", [True, False])
def test_plain_ends_are_packed_when_asked(tied):
    plain = make(layer(), layer(), tied=tied)
    plain.embedding = nn.Embedding.from_pretrained(plain.embedding.quantized.dequantize())
    plain.head = nn.Linear(WIDTH, VOCAB, bias=False).requires_grad_(False)
    if tied:
        plain.head.weight = plain.embedding.weight
    fast, ids = copy.deepcopy(plain), words(21)
    prepare(fast, prepack=False, tiles=False, release=lambda: None, pack_ends=True)
    step, reason = build(fast)
    assert step is not None, reason
    assert (fast.head.packed is fast.embedding.packed) == tied
    found = step(ids, range(21), [0] * 21, cache_of(plain), 1)
    # A tied end comes from a grid of 8 bits here, so rounding it again costs nothing.
    assert error(found, reference(plain, ids)) < (2e-3 if tied else 2e-2)


def test_projections_of_several_kinds_are_three_products():
    model = make(layer())
    attend, forward = model.trunk.layers[0].attention, model.trunk.layers[0].feedforward
    attend.v = QuantizedLinear(quantized(attend.v.quantized.dequantize(), "Q8_0"), None)
    forward.up = QuantizedLinear(quantized(forward.up.quantized.dequantize(), "Q4_1"), None)
    assert error(one_by_one(model, words(9)), reference(model, words(9))) < 2e-3


def test_two_models_in_one_process():
    models = [make(layer(), seed=1), make(layer(), layer(), seed=2)]
    steps, caches = [step_of(m) for m in models], [cache_of(m) for m in models]
    ids = words(12)
    found = [
        [step([t], [i], [0], cache, 2) for step, cache in zip(steps, caches, strict=True)] for i, t in enumerate(ids)
    ]
    for number, model in enumerate(models):
        assert torch.equal(torch.cat([row[number] for row in found]), one_by_one(model, ids))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_goes_on():
    model = MODELS["plain"]()
    step, cache = step_of(model), cache_of(model)
    step([1], [0], [0], cache, 3)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for the parent's threads would wait for ever
        os._exit(0 if torch.equal(step([2], [1], [0], cache, 3), step([2], [1], [0], cache, 1)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_int8_activations_keep_8_bits_here_as_in_torchs_way():
    model, ids = MODELS["plain"](), words(21)
    exact = one_by_one(model, ids)
    coarse = copy.deepcopy(model)
    prepare(coarse, prepack=False, tiles=False, release=lambda: None, parts=1)
    step, cache = build(coarse)[0], cache_of(model)
    assert step is not None
    found = torch.cat([step([token], [i], [0], cache, 1) for i, token in enumerate(ids)])
    assert 5e-3 < error(found, exact) < 5e-2
    # Torch's way rounds the same inputs by the same kernel; what attention rounds on the way may tip a few.
    assert error(found, reference(coarse, ids)) < error(found, exact) / 2
    kept = step_of(model)
    kept._model.parts = 3
    with pytest.raises(UsageError):
        kept([1], [0], [0], cache_of(model), 1)
