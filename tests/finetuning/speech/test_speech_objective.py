"""The losses of speech: equal to their plain forms, and to themselves however a step is cut up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from craton.data.speech import SpeechSet
from craton.data.speech_batches import SpeechLoader, SpeechWriter
from craton.finetuning.speech.fresh import fresh_model, speech_config, speech_tokenizer
from craton.finetuning.speech.objective import SpeechRecognition
from craton.modalities.audio import SpeechTokens
from craton.models.ctc import CTCSeq2Seq
from craton.models.initialisation import initialise

TEXTS = ("one", "two two", "three", "one two three")


@pytest.fixture(scope="module")
def made():
    """(model with a CTC head, loader)."""
    rng = np.random.default_rng(0)
    sounds = tuple(rng.integers(-9000, 9000, 6000 + 500 * n).astype(np.int16) for n in range(4))
    tokenizer = speech_tokenizer(TEXTS, 280, 1)
    config = speech_config(60_000, seconds=1, mels=20, vocab=tokenizer.vocab_size, context=64)
    tokens = SpeechTokens.of(tokenizer, config.vocab, multilingual=False)
    model = CTCSeq2Seq(fresh_model(config, 0), tokens.end)
    initialise(model.ctc_head, 0)
    texts = tokenizer.encode_batch([f" {text}" for text in TEXTS], add_special_tokens=False)
    data = SpeechSet(sounds, TEXTS, TEXTS)
    loader = SpeechLoader(
        data, texts, SpeechWriter(tokens), batch=4, micro=4, mels=20, vectors=config.frames, seed=0, augment=None
    )
    return model, loader


def test_the_decoder_loss_is_cross_entropy_of_each_text_alone(made):
    model, loader = made
    expected = 0.0
    for number in range(4):
        batch = loader.make(np.array([number]))
        with torch.no_grad():
            logits_nV = model.seq2seq(batch.mel_BMF, batch.ids_T[None])[0]
        expected += float(F.cross_entropy(logits_nV, batch.targets_T, reduction="sum"))
    batch = loader.make(np.arange(4))
    parts = SpeechRecognition(0.0)(model.seq2seq, batch)
    assert parts.count == batch.trained
    assert float(parts.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_ctc_sums_over_all_ways_to_write_a_text(made):
    model, loader = made
    batch = loader.make(np.arange(4))
    parts = SpeechRecognition(1.0)(model, batch)
    logs_BSL = model.label_logits(model.seq2seq.encode(batch.mel_BMF)).log_softmax(-1)
    labels, expected = list(batch.labels_N.split(batch.label_counts)), 0.0
    for logs_SL, label_N in zip(logs_BSL, labels, strict=True):
        # The forward algorithm (Graves 2006, section 4.1), plainly.
        path = [model.blank]
        for label in label_N.tolist():
            path += [label, model.blank]
        alpha = torch.full((len(path),), -torch.inf)
        alpha[:2] = logs_SL[0, path[:2]]
        for logs_L in logs_SL[1:]:
            before = alpha.clone()
            for i, label in enumerate(path):
                ways = [before[i], *([before[i - 1]] if i else [])]
                if i > 1 and label not in (model.blank, path[i - 2]):
                    ways.append(before[i - 2])
                alpha[i] = torch.stack(ways).logsumexp(0) + logs_L[label]
        expected -= float(alpha[-2:].logsumexp(0))
    assert parts.count == sum(batch.label_counts)
    assert float(parts.loss_sum.detach()) == pytest.approx(expected, rel=1e-4)


def test_both_are_weighted(made):
    model, loader = made
    batch = loader.make(np.arange(4))
    plain, ctc = SpeechRecognition(0.0)(model.seq2seq, batch), SpeechRecognition(1.0)(model, batch)
    both = SpeechRecognition(0.25)(model, batch)
    assert float(both.loss_sum.detach()) == pytest.approx(
        0.75 * float(plain.loss_sum.detach()) + 0.25 * float(ctc.loss_sum.detach()), rel=1e-5
    )
    assert set(both.metrics) == {"decoder_loss", "ctc_loss"}
    assert both.count == plain.count


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_how_a_step_is_cut_changes_nothing(made, weight):
    model, loader = made
    learner = model if weight else model.seq2seq
    objective = SpeechRecognition(weight)

    def gradients(cuts):
        learner.zero_grad()
        count = 0
        for cut in cuts:
            parts = objective(learner, loader.make(np.array(cut)))
            parts.loss_sum.backward()
            count += parts.count
        return count, [p.grad.clone() for p in learner.parameters() if p.grad is not None]

    (count, whole), (again, cut) = gradients([[0, 1, 2, 3]]), gradients([[3], [1, 0], [2]])
    assert count == again
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_batch_without_targets_has_a_gradient_of_zero(made, weight):
    model, loader = made
    nothing = loader._nothing()
    learner = model if weight else model.seq2seq
    learner.zero_grad()
    parts = SpeechRecognition(weight)(learner, nothing)
    assert (float(parts.loss_sum.detach()), parts.count) == (0.0, 0)
    parts.loss_sum.backward()
    assert all(not p.grad.any() for p in learner.parameters() if p.grad is not None)
