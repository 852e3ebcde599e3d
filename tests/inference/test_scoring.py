"""Scores of given text against whole forward passes: shared contexts, unrelated pairs, alone and in a batch."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import craton
from craton.errors import ContextOverflow, UsageError
from craton.inference import scoring
from craton.inference.engine import PREFILL_CHUNK
from craton.inference.model import Model
from craton.inference.plan import Plan
from craton.inference.scoring import Score, Scorer, rolling_windows
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

VOCAB, CONTEXT = 61, 700


def make_module(rotary: RotaryConfig = RotaryConfig(dims=8), window: int | None = None) -> CausalLM:  # noqa: B008
    torch.manual_seed(0)
    norm = NormConfig(kind="rms")
    layer = LayerConfig(
        attention=AttentionConfig(heads=4, kv_heads=2, head_size=8, rotary=rotary, window=window),
        feedforward=FeedForwardConfig(hidden=48, activation="silu", gated=True),
        norm=norm,
    )
    config = CausalLMConfig(
        vocab=VOCAB, context=CONTEXT, tied=False, trunk=TrunkConfig(width=32, layers=(layer,) * 2, final_norm=norm)
    )
    module = CausalLM(config)
    for parameter in module.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    return module.requires_grad_(False).eval()


def make_model(module: CausalLM, special_tokens: dict[str, str]) -> Model:
    vocab = {chr(0x4E00 + i): i for i in range(VOCAB - 1)} | {"</s>": VOCAB - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="</s>"))
    plan = Plan(
        torch.float32,
        packed=False,
        pack_ends=False,
        prepack=False,
        tiles=False,
        parts=2,
        threads=1,
        kernel="torch",
        decisions=(),
    )
    return Model("tiny", None, module, Tokenizer(backend, special_tokens=special_tokens), plan)  # type: ignore[arg-type]


MODULE = make_module()
END = VOCAB - 1


def fresh(module: CausalLM = MODULE) -> Model:
    return make_model(module, {"eos_token": "</s>"})


def text(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(model: Model, context: Sequence[int], continuation: Sequence[int]) -> Score:
    """The score by one whole forward pass."""
    logprobs_TV = model.logits([*context, *continuation]).double().log_softmax(-1)
    rows_TV = logprobs_TV[len(context) - 1 : len(context) + len(continuation) - 1]
    found = rows_TV.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
    greedy = rows_TV.argmax(-1).tolist() == list(continuation)
    return Score(sum(found), len(continuation), greedy, found)


def assert_scores(found: list[Score], wanted: list[Score], tolerance: float = 1e-4) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.token_logprobs == pytest.approx(theirs.token_logprobs, abs=tolerance)
        assert ours.logprob == pytest.approx(theirs.logprob, abs=tolerance * theirs.tokens)
        assert (ours.tokens, ours.greedy) == (theirs.tokens, theirs.greedy)


def check(pairs: list[tuple[list[int], list[int]]], model: Model | None = None, tolerance: float = 1e-4) -> None:
    """Together, one by one, and one by one with a scorer that has read nothing before."""
    model = model or fresh()
    wanted = [expected(model, *pair) for pair in pairs]
    assert_scores(model.score(pairs), wanted, tolerance)
    assert_scores([model.score([pair])[0] for pair in pairs], wanted, tolerance)
    assert isinstance(model.module, CausalLM)
    assert_scores([fresh(model.module).score([pair])[0] for pair in pairs], wanted, tolerance)


def greedy_continuation(model: Model, context: list[int], length: int) -> list[int]:
    ids = list(context)
    for _ in range(length):
        ids.append(int(model.logits(ids)[-1].argmax()))
    return ids[len(context) :]


def test_continuations_of_one_context():
    context = text(1, 40)
    labels = [text(100 + i, 1 + i % 6) for i in range(77)]
    stems = [text(7, 3) + text(i, 2) for i in range(10)]  # a common beginning
    nested = [text(7, n) for n in range(1, 8)]  # each one the beginning of the next
    check([(context, label) for label in (*labels, *stems, *nested, labels[0])])


def test_unrelated_pairs():
    check([(text(i, 1 + 9 * i % 50), text(50 + i, 1 + i % 7)) for i in range(40)])


def test_contexts_with_a_common_beginning_in_any_order():
    begin = text(3, 300)
    pairs = [(begin[: 300 - 20 * i] + text(i, 5), text(60 + i % 2, 4)) for i in range(8)]
    check([pairs[i] for i in (3, 0, 7, 1, 6, 2, 5, 4)] + [(text(9, 12), text(8, 3)), (begin, [1]), (begin, [2])])


def test_a_continuation_longer_than_a_piece():
    context = text(4, PREFILL_CHUNK + 9)
    long = text(5, PREFILL_CHUNK + 40)
    check([(context, long), (context, [*long[:30], 1]), (context, [2]), (context, text(6, 30))])


def test_a_greedy_continuation_is_known_as_one():
    model, context = fresh(), text(10, 30)
    best = greedy_continuation(model, context, 6)
    other = [*best[:5], (best[5] + 1) % END]
    assert [score.greedy for score in model.score([(context, best), (context, other)])] == [True, False]


@pytest.mark.parametrize("bytes_held", [1, 400_000])
def test_with_little_memory_and_growing_contexts(monkeypatch, bytes_held):
    monkeypatch.setattr(scoring, "CACHE_BYTES", bytes_held)
    model = fresh()
    for length in (20, 300, 30, 500, 690):
        pairs = [(text(1, length), text(20 + i, 1 + i % 9)) for i in range(12)]
        assert_scores(model.score(pairs), [expected(model, *pair) for pair in pairs])


def test_with_a_window_of_attention():
    check([(text(i % 3, 90 + 40 * (i % 3)), text(30 + i, 1 + i)) for i in range(9)], fresh(make_module(window=17)))


def test_with_longrope_on_both_sides_of_its_border():
    factors = {"short_factors": (1.0, 1.0, 1.5, 2.0), "long_factors": (3.0, 5.0, 9.0, 20.0)}
    scaling = RotaryScaling(kind="longrope", original_context=40, attention_factor=1.2, **factors)
    module = make_module(RotaryConfig(dims=8, scaling=scaling))
    context = text(1, 36)
    # All pairs of one context, and some longer than 40 tokens; the border itself too.
    check([(context, text(i, 1 + i)) for i in range(9)] + [(text(2, 60), text(3, 5))], fresh(module))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=70), st.lists(st.integers(0, 2), min_size=1, max_size=5)
        ),
        max_size=12,
    )
)
def test_any_pairs(pairs):
    model = fresh()
    assert_scores(model.score(pairs), [expected(model, *pair) for pair in pairs])


def test_a_context_is_read_once_and_a_common_beginning_is_kept():
    scorer = Scorer(MODULE, dtype=torch.float32)
    context = text(1, 200)
    scorer.score([(context, text(i, 1)) for i in range(20)])
    assert scorer.tokens_read == 200  # nothing follows the last token of a continuation
    scorer.score([(context, [1, 2, 3]), (context, [1, 2, 4]), (context, [5, 6])])
    assert scorer.tokens_read == 200 + 3  # 1, 2 and 5: the context is still there, and 1, 2 is common
    scorer.score([(context[:150] + text(2, 30), [1])])
    assert scorer.tokens_read == 203 + 30


def test_an_interrupt_spoils_nothing(monkeypatch):
    model, context = fresh(), text(1, PREFILL_CHUNK + 60)
    pairs = [(context, text(i, 4)) for i in range(5)]
    whole = MODULE.trunk.layers[1].forward
    for calls in range(3):  # in the first or second piece of the context, or in the continuations
        steps = iter([None] * calls + [KeyboardInterrupt])

        def interrupted(*arguments, steps=steps):
            if (error := next(steps, None)) is not None:
                raise error
            return whole(*arguments)

        monkeypatch.setattr(MODULE.trunk.layers[1], "forward", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            model.score(pairs)
        assert next(steps, None) is None, "the interrupt came"
        monkeypatch.setattr(MODULE.trunk.layers[1], "forward", whole)
        assert_scores(model.score(pairs), [expected(model, *pair) for pair in pairs])
        model.score([(text(90 + calls, 300), [1])])  # takes the context's place


def test_an_empty_context_is_the_beginning_of_a_text():
    model = fresh()
    assert_scores(model.score([([], [3, 4]), ([], [3, 5])]), [expected(model, [END], [3, i]) for i in (4, 5)])
    nameless = make_model(MODULE, {})
    with pytest.raises(UsageError, match="neither a BOS nor an EOS"):
        nameless.score([([], [3])])
    assert nameless.score([([2], [3])])[0].tokens == 1


def test_what_is_refused():
    model = fresh()
    assert model.score([]) == []
    with pytest.raises(ContextOverflow, match="2 more than 700"):
        model.score([([1], [2]), (text(1, 690), text(2, 12))])
    assert model.score([(text(1, 690), text(2, 10))])[0].tokens == 10
    with pytest.raises(UsageError, match="no token"):
        model.score([([1], [])])
    with pytest.raises(UsageError, match="not in the vocabulary"):
        model.score([([1], [VOCAB])])
    with pytest.raises(UsageError, match="window"):
        model.rolling_score([1, 2], window=CONTEXT + 1)
    with pytest.raises(UsageError, match="no token"):
        model.rolling_score([END])


@pytest.mark.parametrize(("length", "window"), [(1, 8), (7, 8), (8, 8), (9, 8), (50, 8), (64, 16), (1600, 700), (5, 1)])
def test_rolling_windows_are_lm_eval_s(length, window):
    ids = text(1, length)
    pairs = rolling_windows(ids, window, END)
    assert [i for _, targets in pairs for i in targets] == ids
    assert all(len(context) + len(targets) <= window + 1 for context, targets in pairs)
    utils = pytest.importorskip("lm_eval.utils")
    theirs = utils.get_rolling_token_windows(ids, END, window, 1)
    assert pairs == [tuple(map(list, utils.make_disjoint_window(pair))) for pair in theirs]


def test_a_document_longer_than_the_context():
    model, ids = fresh(), text(1, 1600)
    score = model.rolling_score(ids)
    found: list[float] = []
    for context, targets in rolling_windows(ids, CONTEXT, END):
        logprobs_TV = model.logits([*context, *targets[:-1]]).double().log_softmax(-1)[len(context) - 1 :]
        found += logprobs_TV.gather(1, torch.tensor(targets)[:, None])[:, 0].tolist()
    assert score.token_logprobs == pytest.approx(found, abs=1e-4)
    assert (score.tokens, score.logprob) == (1600, pytest.approx(math.fsum(found), abs=0.05))
    assert model.rolling_score([END, *ids]) == score  # BOS is where the text begins, not a part of it
    short = model.rolling_score(ids[:20], window=8)
    assert short.tokens == 20
    assert short.logprob < 0


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Model:
    return craton.load(smollm2_gguf)


def test_a_real_model_shared_unrelated_and_one_by_one(smollm2):
    encode = smollm2.tokenizer.encode
    question = encode("The capital of France is")
    labels = [encode(f" {city}") for city in ("Paris", "Parma", "Berlin", "New York", "New Delhi", "New Orleans")]
    pairs = [(question, label) for label in labels]
    pairs += [(encode(a), encode(b)) for a, b in (("Two and two make", " four"), ("Tea is a", " drink of China"))]
    together = smollm2.score(pairs)
    assert max(range(6), key=lambda i: together[i].logprob) == 0
    # 15-bit activations on the packed path; bfloat16's 8 bits where there are no native kernels.
    tolerance = 2e-2 if smollm2.plan.dtype == torch.float32 else 0.2
    wanted = [expected(smollm2, *pair) for pair in pairs]
    assert_scores(together, wanted, tolerance)
    alone = [Scorer(smollm2.module, dtype=smollm2.plan.dtype, native_threads=2).score([pair])[0] for pair in pairs]
    if smollm2.plan.packed:
        assert_scores(alone, together, 5e-3)
    else:
        assert_scores(alone, wanted, tolerance)


@pytest.mark.slow
def test_a_real_model_s_rolling_score_is_near_its_float32_one(smollm2, smollm2_gguf, shared_data):
    words = (shared_data / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:3000]
    ids = smollm2.tokenizer.encode(words)
    ours = smollm2.rolling_score(ids, window=256)
    reference = craton.load(smollm2_gguf, dtype="float32").rolling_score(ids, window=256)
    assert ours.logprob == pytest.approx(reference.logprob, rel=2e-3)
