"""The control tokens of a speech model, found in its tokeniser."""

from __future__ import annotations

import pytest
import tokenizers

from craton.errors import CheckpointError
from craton.modalities.audio import SpeechTokens
from craton.modalities.text import Tokenizer

CONTROL = (
    *("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|fa|>", "<|translate|>", "<|transcribe|>"),
    *("<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
)


def tokenizer(control=CONTROL) -> Tokenizer:
    words = {word: i for i, word in enumerate(("a", "b", "c", "[UNK]"))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    backend.add_special_tokens(list(control))
    return Tokenizer(backend)


def test_a_multilingual_model():
    found = SpeechTokens.of(tokenizer(), 1514, suppressed=(1, 4, 5), suppressed_first=(2,), multilingual=True)
    assert (found.end, found.start, found.translate, found.transcribe) == (4, 5, 8, 9)
    assert found.languages == {"en": 6, "fa": 7}
    assert found.language_of[7] == "fa"
    assert found.first_time == 14
    assert found.seconds(14) == 0
    assert found.seconds(1514) == pytest.approx(30)
    # What was asked for and every control token but the end, which ends a text.
    assert found.suppressed == (1, 5, 6, 7, 8, 9, 10, 11, 12)
    assert found.suppressed_first == (2,)


def test_english_alone_has_no_languages():
    assert SpeechTokens.of(tokenizer(), 1514).languages == {}
    assert SpeechTokens.of(tokenizer(), 51_865).languages == {"en": 6, "fa": 7}


def test_old_models_have_another_name_for_silence():
    old = tuple("<|nocaptions|>" if name == "<|nospeech|>" else name for name in CONTROL)
    assert SpeechTokens.of(tokenizer(old), 1514).no_speech == 12


@pytest.mark.parametrize("gone", ["<|startoftranscript|>", "<|notimestamps|>", "<|nospeech|>"])
def test_a_tokeniser_of_something_else(gone):
    with pytest.raises(CheckpointError, match="has no token"):
        SpeechTokens.of(tokenizer(tuple(name for name in CONTROL if name != gone)), 1514)
