"""Decoding on a small random model: rules, batches, beams and draws against what they should be by definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from craton.checkpoints.families.family import Keys
from craton.checkpoints.families.whisper import read_config
from craton.inference.transcription_decoding import Job, TextDecoder
from craton.modalities.audio import SpeechTokens
from craton.models import Seq2Seq, build
from craton.trunk import Context

# Ids 0 to 9 are text, 10 the end, 11 to 17 control tokens, 18 to 97 times: 1.58 s.
TOKENS = SpeechTokens(
    start=11,
    end=10,
    previous=12,
    no_speech=13,
    no_times=17,
    transcribe=14,
    translate=15,
    languages={},
    suppressed=(3, 11, 12, 13, 14, 15, 16),
    suppressed_first=(4, 10),
)
CONFIG = {
    "vocab_size": 98,
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 32,
    "max_source_positions": 10,
    "max_target_positions": 24,
}


@pytest.fixture(scope="module")
def model() -> Seq2Seq:
    torch.manual_seed(0)
    made = build(read_config(Keys(CONFIG, "test")))
    assert isinstance(made, Seq2Seq)
    made.embedding.weight.data *= 0.5
    return made.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def context(model) -> Context:
    torch.manual_seed(1)
    return model.decoder.read(model.encode(torch.randn(4, 8, 20)))


@pytest.fixture
def decoder(model) -> TextDecoder:
    return TextDecoder(model, TOKENS, torch.float32)


JOBS = [Job(0, [11], "a"), Job(1, [12, 1, 2, 5, 11], "b"), Job(2, [12, 7, 11], "c"), Job(3, [11], "d")]


def obeys(tokens: list[int]) -> bool:
    times = [t for t in tokens if t >= 18]
    paired = all(
        tokens[i] >= 18 or tokens[i + 1] < 18 or i + 2 == len(tokens) or tokens[i + 2] >= 18
        for i in range(len(tokens) - 1)
    )
    return (
        bool(tokens)
        and 18 <= tokens[0] <= 68
        and times == sorted(times)
        and not {3, 17, 10, 11, 12, 13} & set(tokens)
        and (len(tokens) < 2 or tokens[1] < 18)
        and paired
    )


def score(model: Seq2Seq, context: Context, job: Job, tokens: list[int], ended: bool) -> float:
    """The log-probability of a text under the rules, by one pass over all of it and the rules read token by token."""
    ids = torch.tensor([*job.prompt, *tokens])
    view = context.view([job.context] * len(ids))
    logits = model.logits(model.hidden(ids, torch.arange(len(ids)), None, view))[len(job.prompt) - 1 :]
    total = 0.0
    wanted = [*tokens, 10] if ended else tokens
    for i, token in enumerate(wanted):
        allowed = torch.tensor([_may_follow(tokens[:i], t) for t in range(98)])
        row = logits[i].masked_fill(~allowed, -torch.inf)
        if row[18:].logsumexp(0) > row[:18].max():
            row = row.masked_fill(torch.arange(98) < 18, -torch.inf)
        total += float(row.log_softmax(0)[token])
    return total


def _may_follow(before: list[int], token: int) -> bool:
    if token in TOKENS.suppressed or token == TOKENS.no_times:
        return False
    if not before:
        return 18 <= token <= 68
    time, last = token >= 18, max((t for t in before if t >= 18), default=None)
    if before[-1] >= 18 and (len(before) == 1 or before[-2] >= 18):
        return not time  # a pair is complete: text
    if before[-1] >= 18:
        return token == 10 or token >= last  # the second of a pair, or the end
    return not time or last is None or token > last


@pytest.mark.parametrize(("temperature", "width"), [(0.0, 1), (0.0, 4), (0.7, 1), (0.7, 3)])
def test_texts_keep_the_rules_and_know_their_probability(model, context, decoder, temperature, width):
    for job, text in zip(JOBS, decoder.write(context, JOBS, temperature=temperature, width=width, seed=0), strict=True):
        assert obeys(text.tokens)
        ended = len(text.tokens) < decoder.limit
        options = [score(model, context, job, text.tokens, e) / (len(text.tokens) + 1) for e in {True, ended}]
        assert any(text.mean_logprob == pytest.approx(option, abs=1e-4) for option in options)


@pytest.mark.parametrize(("temperature", "width"), [(0.0, 1), (0.0, 3), (0.7, 3)])
def test_a_text_is_the_same_alone_and_in_a_batch(context, decoder, temperature, width):
    together = decoder.write(context, JOBS, temperature=temperature, width=width, seed=5)
    alone = [decoder.write(context, [job], temperature=temperature, width=width, seed=5)[0] for job in JOBS]
    assert [text.tokens for text in together] == [text.tokens for text in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.mean_logprob == pytest.approx(other.mean_logprob, abs=1e-5)
        assert one.no_speech == pytest.approx(other.no_speech, abs=1e-6)


def test_a_wide_beam_finds_the_likeliest_text(model, context):
    # A model that reads two tokens at most: all texts can be listed.
    small = TextDecoder(model, TOKENS, torch.float32)
    small.limit = 2
    job = JOBS[0]
    (found,) = small.write(context, [job], temperature=0.0, width=16, seed=0)
    texts = [
        [first, second]
        for first, second in itertools.product(range(18, 69), range(10))
        if _may_follow([first], second) and _may_follow([], first)
    ]
    best = max(score(model, context, job, text, ended=False) for text in texts)
    (greedy,) = small.write(context, [job], temperature=0.0, width=1, seed=0)
    assert score(model, context, job, found.tokens, ended=False) == pytest.approx(best, abs=1e-4)
    assert found.mean_logprob >= greedy.mean_logprob


def test_draws_follow_the_seed(context, decoder):
    def draw(seed: int) -> list[list[int]]:
        return [text.tokens for text in decoder.write(context, JOBS, temperature=1.0, width=1, seed=seed)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_no_speech_is_read_where_the_transcript_starts(model, context, decoder):
    job = JOBS[1]
    ids = torch.tensor(job.prompt)
    view = context.view([job.context] * len(ids))
    at_start = model.logits(model.hidden(ids, torch.arange(len(ids)), None, view))[job.prompt.index(11)]
    (text,) = decoder.write(context, [job], temperature=0.0, width=1, seed=0)
    assert text.no_speech == pytest.approx(float(at_start.softmax(0)[13]), abs=1e-6)


def test_the_language_is_the_likeliest_of_those_known(model, context):
    from dataclasses import replace

    tokens = replace(TOKENS, languages={"en": 14, "fa": 15, "de": 16})
    decoder = TextDecoder(model, tokens, torch.float32)
    found = decoder.detect_language(context, [0, 2])
    for number, language in zip((0, 2), found, strict=True):
        logits = model.logits(model.hidden(torch.tensor([11]), torch.arange(1), None, context.view([number])))[0]
        assert language == ["en", "fa", "de"][int(logits[14:17].argmax())]
