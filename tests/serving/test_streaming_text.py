"""Streamed text over HTTP is right for every script: pieces of whole characters that add up to the whole answer."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PIECES = ["سلام", "می‌روم", "👩‍👩‍👧", "é́", "नमस्ते", "漢字", "🇮🇷", "a", " ", "\n", "½", "\u200f", "ﷺ", "\U00010348"]


def lines_of(server, body: dict) -> list[bytes]:
    """The events of a stream as they were cut by the server, each checked to be whole."""
    with server.http.stream("POST", "/v1/completions", json=body) as said:
        raw = b"".join(said.iter_raw())
    events = [event for event in raw.split(b"\n\n") if event]
    assert events[-1] == b"data: [DONE]"
    return events[:-1]


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join))
def test_characters_of_many_bytes_come_whole(server, model_id, text):
    # The tiny tokeniser knows few words, so each of these characters is several byte tokens.
    body = {"model": model_id, "prompt": "red", "max_tokens": 400, "stream": True, "guided_choice": [text]}
    pieces = [json.loads(event.removeprefix(b"data: "))["choices"][0]["text"] for event in lines_of(server, body)]
    assert "".join(pieces) == text
    for piece in pieces:
        assert "\ufffd" not in piece
        piece.encode()


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 2**31))
def test_random_bytes_are_never_taken_back(server, model_id, seed):
    # A random model writes broken UTF-8, too: even then the pieces add up to what the tokens decode to.
    body = {"model": model_id, "prompt": "red", "max_tokens": 24, "temperature": 2, "seed": seed, "logprobs": 0}
    whole = server.http.post("/v1/completions", json=body).json()["choices"][0]
    events = [json.loads(event.removeprefix(b"data: ")) for event in lines_of(server, {**body, "stream": True})]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["text"]
    names = [name for event in events for name in (event["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
    assert names == whole["logprobs"]["tokens"]


def test_byte_fallback_is_held_until_it_is_known(tmp_path, serving):
    """A model with a SentencePiece-like tokeniser, whose bytes may all turn into U+FFFD later."""
    from craton.checkpoints.families.llama import LLAMA
    from craton.checkpoints.save import save_checkpoint
    from craton.modalities.text.tokenizer_training import TokenizerSettings, train_tokenizer
    from craton.models import build
    from craton.models.initialisation import initialise
    from craton.pretraining.architecture import causal_config
    from craton.pretraining.sizing import SizeOverrides, size

    words = "the code of red is blue green zim zam what text class answer question document number word small large "
    tokenizer = train_tokenizer([words * 30 + "user assistant system"], TokenizerSettings(kind="unigram", vocab=400))
    shape = SizeOverrides(width=64, layers=1, heads=2, kv_heads=1, hidden=64)
    config = causal_config(
        size("0.1m", vocab=tokenizer.vocab_size, context=256, overrides=shape), tokenizer.vocab_size, 256
    )
    model = build(config)
    initialise(model, 0)
    save_checkpoint(model, LLAMA, tmp_path / "bytes", tokenizer=tokenizer)
    with serving([tmp_path / "bytes"]) as running:
        for text in ("سلام دنیا", "👩‍👩‍👧 red", "é"):
            body = {"model": "bytes", "prompt": "red", "max_tokens": 200, "stream": True, "guided_choice": [text]}
            events = [json.loads(event.removeprefix(b"data: ")) for event in lines_of(running, body)]
            pieces = [event["choices"][0]["text"] for event in events]
            assert "".join(pieces) == text
            assert not any("\ufffd" in piece for piece in pieces)
        for seed in range(5):
            body = {"model": "bytes", "prompt": "red", "max_tokens": 30, "temperature": 2, "seed": seed}
            whole = running.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
            events = [json.loads(e.removeprefix(b"data: ")) for e in lines_of(running, {**body, "stream": True})]
            assert "".join(event["choices"][0]["text"] for event in events) == whole
