"""Speculation gives the text that there is without it: every setting, alone and in a batch, with any guesser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from tests.inference.test_engine import CONTEXT, MODEL, TALK, TOKENIZER, VOCAB, make_model, prompt

from craton.errors import UsageError
from craton.inference.drafting import Asked, Drafter, ModelDrafter, NGramDrafter
from craton.inference.engine import Engine, Generation, Request
from craton.inference.settings import SamplingSettings
from craton.inference.speculation import MOST, ROW_PRICE, SHARE_AT_RISK, STEPS_AT_RISK, Pace
from craton.models import CausalLM
from craton.trunk import RotaryConfig, RotaryScaling

END = VOCAB - 1


class Oracle:
    """Guesses what the answer will be, but for every `wrong`-th token."""

    price = 0.0

    def __init__(self, answers: Sequence[list[int]], wrong: int = 3) -> None:
        self._answers, self._wrong = answers, wrong

    def propose(self, asked: Sequence[Asked]) -> list[list[int]]:
        drafts = []
        for one in asked:
            known = next((a for a in self._answers if a[: len(one.ids)] == one.ids), one.ids)
            ahead = known[len(one.ids) : len(one.ids) + one.most]
            drafts.append([t if (len(one.ids) + i) % self._wrong else (t + 1) % VOCAB for i, t in enumerate(ahead)])
        return drafts


def engine(drafter: Drafter | None = None, model: CausalLM = MODEL, **settings) -> Engine:
    return Engine(model, TOKENIZER, dtype=torch.float32, drafter=drafter, **settings)


def run(drafter: Drafter | None, ids: list[int], model: CausalLM = MODEL, **fields) -> Generation:
    return engine(drafter, model).submit(Request(ids, SamplingSettings(**fields))).wait()


def compare(ids: list[int], **fields) -> Generation:
    """The answer with speculation, after checking all of it against the one without."""
    plain = run(None, ids, **fields)
    spec = run(Oracle([[*plain.ids, *plain.ids[:9]]]), ids, **fields)
    assert spec.ids == plain.ids
    assert (spec.text, spec.finish_reason) == (plain.text, plain.finish_reason)
    assert [t.text for t in spec.tokens] == [t.text for t in plain.tokens]
    for a, b in zip(spec.tokens, plain.tokens, strict=True):
        assert a.logprob == (None if b.logprob is None else pytest.approx(b.logprob, abs=1e-4))
    return spec


SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "nucleus": {"temperature": 0.9, "top_p": 0.8},
    "top-k": {"temperature": 1.3, "top_k": 5, "min_p": 0.02},
    "penalties": {"temperature": 0.7, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "biased": {"logit_bias": {5: 2.0, 17: -100.0, END: -100.0}},
    "logprobs": {"temperature": 0.5, "logprobs": 3},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_text_is_the_one_without_speculation(name):
    fields = {"logit_bias": {END: -100.0}} | SETTINGS[name]
    spec = compare(prompt(1, 20), max_tokens=60, seed=4, **fields)
    assert 20 < spec.accepted_tokens < spec.drafted_tokens


@pytest.mark.parametrize("longest", range(1, 13))
def test_an_answer_is_never_longer_than_asked(longest):
    spec = compare(prompt(2, 15), max_tokens=longest, logit_bias={END: -100.0})
    assert (len(spec.tokens), spec.finish_reason) == (longest, "length")


def test_the_context_is_filled_to_its_last_token():
    spec = compare(prompt(3, CONTEXT - 20), logit_bias={END: -100.0})
    assert (len(spec.ids), spec.finish_reason) == (CONTEXT, "length")


@pytest.mark.parametrize("seed", range(6))
def test_an_end_or_a_stop_string_inside_a_guess_ends_the_answer(seed):
    ended = compare(prompt(seed, 9), max_tokens=200, temperature=1.0, seed=seed, logit_bias={END: 3.0})
    assert ended.finish_reason == "stop"
    ids = prompt(11, 12)
    whole = run(None, ids, **TALK | {"seed": seed}).text
    for at in (2, 7, 11):
        assert (
            compare(ids, **TALK | {"seed": seed}, stop=(whole[at : at + 2],)).text
            == whole[: whole.index(whole[at : at + 2])]
        )


def test_the_form_of_an_answer_holds():
    pytest.importorskip("llguidance")
    letters = [chr(0x4E00 + i) for i in range(8)]
    spec = compare(prompt(4, 12), max_tokens=40, temperature=1.0, seed=1, regex=f"[{''.join(letters)}]{{30}}")
    assert len(spec.text) == 30
    assert set(spec.text) <= set(letters)
    assert spec.accepted_tokens


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_alone_or_in_a_batch_the_same_tokens(slots):
    requests = [
        Request(prompt(i, 3 + 7 * i), SamplingSettings(max_tokens=14 + 5 * i, temperature=0.8, seed=i))
        for i in range(9)
    ]
    alone = [engine().submit(request).wait().ids for request in requests]
    together = engine(Oracle(alone), slots=slots)
    assert [g.wait().ids for g in [together.submit(request) for request in requests]] == alone


def test_the_next_turn_finds_only_what_was_right_in_the_cache():
    first = run(None, prompt(5, 30), max_tokens=25)
    longer = first.ids + prompt(6, 7)
    expected = run(None, longer, max_tokens=25).ids
    both = engine(Oracle([first.ids, expected], wrong=2))
    assert both.submit(Request(prompt(5, 30), SamplingSettings(max_tokens=25))).wait().ids == first.ids
    second = both.submit(Request(longer, SamplingSettings(max_tokens=25))).wait()
    assert second.cached_tokens == len(first.ids) - 1
    assert second.ids == expected


@pytest.mark.parametrize("length", [20, 33, 39, 41])
def test_a_guess_does_not_cross_the_length_where_longrope_changes(length):
    factors = {"short_factors": (1.0, 1.0, 1.5, 2.0), "long_factors": (3.0, 5.0, 9.0, 20.0)}
    scaling = RotaryScaling(kind="longrope", original_context=40, attention_factor=1.2, **factors)
    model = make_model(RotaryConfig(dims=8, scaling=scaling))
    fields = {"max_tokens": 40, "logit_bias": {END: -100.0}}
    plain = run(None, prompt(16, length), model, **fields).ids
    assert run(Oracle([plain], wrong=50), prompt(16, length), model, **fields).ids == plain


def test_an_interrupt_spoils_nothing(monkeypatch):
    ids, settings = prompt(7, 20), SamplingSettings(max_tokens=40, logit_bias={END: -100.0})
    plain = engine().submit(Request(ids, settings)).wait().ids
    speculating = engine(Oracle([plain], wrong=4))
    generation = speculating.submit(Request(ids, settings))
    for _ in range(4):
        speculating.step()
    whole, stops = Generation.accept, iter([None, KeyboardInterrupt])  # after the first of several tokens

    def interrupted(self, logits_V):
        if (error := next(stops, None)) is not None:
            raise error
        whole(self, logits_V)

    monkeypatch.setattr(Generation, "accept", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speculating.step()
    assert generation.wait().ids == plain


def test_a_draft_model_goes_ahead():
    # The model itself as its own draft model: greedily, all of its guesses are right.
    fields = {"max_tokens": 60, "logit_bias": {END: -100.0}}
    drafter = ModelDrafter(MODEL, END, price=0.1, dtype=torch.float32)  # all ids but the end's
    same = run(drafter, prompt(8, 300), **fields)
    assert same.ids == run(None, prompt(8, 300), **fields).ids
    assert same.accepted_tokens == same.drafted_tokens > 30


def test_another_draft_model_changes_no_text():
    requests = [Request(prompt(i, 9 + i), SamplingSettings(max_tokens=30, temperature=0.6, seed=i)) for i in range(5)]
    alone = [engine().submit(request).wait().ids for request in requests]
    other = make_model()
    for parameter in other.parameters():
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    together = engine(ModelDrafter(other, VOCAB, price=0.1, dtype=torch.float32), slots=3)
    generations = [together.submit(request) for request in requests]
    assert [g.wait().ids for g in generations] == alone
    assert sum(g.accepted_tokens for g in generations) > 0


def test_sampling_keeps_the_distribution():
    # The first two tokens over many seeds against the model's own probabilities: chi-square over pairs that are likely
    # enough to be counted.
    ids = prompt(9, 6)
    logits = MODEL(torch.tensor(ids), torch.arange(len(ids)))[-1] / 0.5
    first = logits.softmax(-1)
    expected: dict[tuple[int, int], float] = {}
    for a in first.topk(4).indices.tolist():
        after = MODEL(torch.tensor([*ids, a]), torch.arange(len(ids) + 1))[-1] / 0.5
        for b, p in enumerate(after.softmax(-1).tolist()):
            expected[a, b] = float(first[a]) * p
    guess = max(expected, key=lambda pair: expected[pair])
    speculating = engine(Oracle([[*ids, *guess, 1, 2]], wrong=1000))
    count, seen = 300, Counter[tuple[int, ...]]()
    for seed in range(count):
        settings = SamplingSettings(max_tokens=3, temperature=0.5, seed=seed, logit_bias={})
        tokens = speculating.submit(Request(ids, settings)).wait().ids[len(ids) :]
        seen[tuple(tokens[:2])] += 1
    counted = {pair: p for pair, p in expected.items() if count * p >= 5}
    assert len(counted) >= 4
    rest = count * (1 - sum(counted.values()))
    chi2 = sum((seen[pair] - count * p) ** 2 / (count * p) for pair, p in counted.items())
    chi2 += (count - sum(seen[pair] for pair in counted) - rest) ** 2 / rest
    degrees = len(counted)
    assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


def test_n_grams_guess_what_followed_last():
    drafter = NGramDrafter()
    ids = [1, 2, 3, 4, 5, 6, 9, 9, 1, 2, 3]
    assert drafter.propose([Asked(0, ids, 4)]) == [[4, 5, 6, 9]]
    assert drafter.propose([Asked(0, ids, 2), Asked(1, ids[:8], 4)]) == [[4, 5], []]
    ids += [7, 1, 2, 3]
    assert drafter.propose([Asked(0, ids, 3)]) == [[7, 1, 2]]  # the last place counts
    # Six tokens in a row say more than three: they stood elsewhere.
    assert drafter.propose([Asked(0, [*ids, 4, 5, 6, 8, 1, 2, 3, 4, 5, 6], 2)]) == [[8, 1]]
    assert drafter.propose([Asked(0, [5, 6, 7], 3)]) == [[]]  # another text in the slot


def test_the_pace_risks_no_more_than_its_share():
    pace, guessed = Pace(), 0
    for _ in range(1000):
        most = pace.length(1, 0.0)
        guessed += most
        pace.settle(most, 0)
    assert guessed * ROW_PRICE <= STEPS_AT_RISK + 1000 * SHARE_AT_RISK
    for _ in range(100):
        most = pace.length(1, 0.0)
        pace.settle(most, most)
    assert pace.length(1, 0.0) == MOST
    assert pace.length(8, 0.0) < MOST  # rows are dear in a batch


def test_a_model_loads_with_what_guesses_for_it(tiny_model):
    import craton

    texts = set()
    for speculate in ("off", "ngram", str(tiny_model)):
        model = craton.load(tiny_model, dtype="float32", speculate=speculate)
        completion = model.generate("the code of a is red the code of a is", max_tokens=40)
        texts.add(completion.text)
        assert (completion.accepted_tokens > 0) == (speculate != "off")
    assert len(texts) == 1


def test_a_draft_model_of_other_tokens_is_refused(tiny_model, tmp_path):
    import shutil

    import craton
    from craton.checkpoints.save import save_tokenizer
    from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer

    other = shutil.copytree(tiny_model, tmp_path / "other")
    save_tokenizer(train_tokenizer(["other words altogether " * 20], TokenizerSettings(vocab=300)), other)
    with pytest.raises(UsageError, match="other tokens"):
        craton.load(tiny_model, speculate=str(other))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_packed_model_writes_the_same(smollm2_gguf, temperature):
    import craton

    texts, accepted = set(), 0
    for speculate in ("off", "ngram"):
        model = craton.load(smollm2_gguf, threads=1, speculate=speculate)
        asked = "Repeat this sentence: the quick brown fox jumps over the lazy dog near the bank of the quiet river."
        said = model.chat([{"role": "user", "content": asked}], max_tokens=40, temperature=temperature, seed=2)
        texts.add(said.text)
        accepted += said.accepted_tokens
    assert len(texts) == 1
    assert accepted > 0
