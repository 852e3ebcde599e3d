"""Answers of a given form from models that know nothing: what they write can only be right by constraint."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from craton.checkpoints.checkpoint import Checkpoint
from craton.config import parse
from craton.errors import UsageError
from craton.inference.constraints import make_constraint
from craton.inference.drafting import NGramDrafter
from craton.inference.engine import Engine, Generation, Request
from craton.inference.settings import SamplingSettings
from craton.modalities.text import Tokenizer, tokenizer_from_gguf
from craton.modalities.text.token_pieces import byte_level_alphabet
from craton.models import CausalLM, CausalLMConfig
from craton.trunk import AttentionConfig, FeedForwardConfig, LayerConfig, NormConfig, RotaryConfig, TrunkConfig

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["کارت", "card", "😀"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
CHOICES = (
    "card",
    "card arrival",
    "car",
    "سلام",
    "سلام دنیا",
    "می‌رود",
    "😀",
    "😀👍🏽",
    'a "quoted" \\ line\n',
    " space",
    "x*(y)|z?",
)


def make_model(vocab: int) -> CausalLM:
    torch.manual_seed(0)
    norm = NormConfig(kind="rms")
    layer = LayerConfig(
        attention=AttentionConfig(heads=2, kv_heads=1, head_size=8, rotary=RotaryConfig(dims=8)),
        feedforward=FeedForwardConfig(hidden=32, activation="silu", gated=True),
        norm=norm,
    )
    config = CausalLMConfig(
        vocab=vocab, context=400, tied=False, trunk=TrunkConfig(width=16, layers=(layer,), final_norm=norm)
    )
    model = CausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    return model.requires_grad_(False).eval()


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, two merges and four special tokens, two of which end an answer."""
    tokens = [*sorted(byte_level_alphabet()), "ca", "car", "<s>", "</s>", "<|end|>", "<pad>"]
    made = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 258 + [3] * 4,
            "tokenizer.ggml.merges": ["c a", "ca r"],
            "tokenizer.ggml.bos_token_id": 258,
            "tokenizer.ggml.eos_token_id": 259,
        }
    )
    return Tokenizer(made.backend, special_tokens=made.special_tokens, eos_ids=(259, 260))


def sentencepiece_tokenizer() -> Tokenizer:
    """As Llama 2's: spaces are ▁, the first one of a text is dropped, unknown characters are bytes."""
    pieces = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁▁", "▁card", "card", "▁car", "c", "a", "r", "▁arrival", "▁space", "s", "{", "▁{", '"', "1", "2"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=None, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, special_tokens={"eos_token": "</s>"})


@pytest.fixture(scope="module", params=["bytes", "sentencepiece", "smollm2"])
def engine(request) -> Engine:
    if request.param == "bytes":
        tokenizer = byte_tokenizer()
    elif request.param == "sentencepiece":
        tokenizer = sentencepiece_tokenizer()
    else:
        tokenizer = Checkpoint.open(request.getfixturevalue("smollm2_gguf")).tokenizer()
    # A head is often longer than the vocabulary: those rows can never be chosen.
    return Engine(make_model(tokenizer.vocab_size + 30), tokenizer, dtype=torch.float32)


def answers(engine: Engine, count: int, **fields: Any) -> list[Generation]:
    fields = {"temperature": 1.0, "max_tokens": 300} | fields
    requests = [Request([5, 6, 7 + i % 3], SamplingSettings(**fields, seed=i)) for i in range(count)]
    return [generation.wait() for generation in [engine.submit(request) for request in requests]]


def is_right(record: Any) -> bool:
    assert list(record) == ["name", "age", "kind", "tags"]
    assert isinstance(record["name"], str)
    assert 1 <= len(record["name"]) <= 6
    assert isinstance(record["age"], int)
    assert 0 <= record["age"] <= 150
    assert record["kind"] in SCHEMA["properties"]["kind"]["enum"]  # type: ignore[index]
    assert len(record["tags"]) <= 3
    return all(isinstance(tag, bool) for tag in record["tags"])


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_json_of_a_schema(engine, temperature):
    for generation in answers(engine, 8, json_schema=SCHEMA, temperature=temperature):
        assert generation.finish_reason == "stop"
        assert is_right(json.loads(generation.text))


def test_a_regex(engine):
    pattern = r"[A-Z]{2}-[0-9]{3,5}( [آ-ی]{1,4}ب)?"
    for generation in answers(engine, 15, regex=pattern, temperature=2.0):
        assert generation.finish_reason == "stop"
        assert re.fullmatch(pattern, generation.text)


def test_a_lark_grammar(engine):
    found = answers(engine, 20, grammar='start: "sum " NUMBER ("+" NUMBER){1,3}\nNUMBER: /[0-9]{1,3}/')
    assert all(re.fullmatch(r"sum \d{1,3}(\+\d{1,3}){1,3}", generation.text) for generation in found)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_can_be_the_answer_exactly(engine, choice):
    """The model is pushed along each choice; where one is the beginning of another, both are within reach."""
    constraint = make_constraint(SamplingSettings(choices=CHOICES), engine.tokenizer)
    assert constraint is not None
    decoder, text, end = engine.tokenizer.stream(), "", engine.tokenizer.eos_ids[0]
    vocab = engine.tokenizer.vocab_size
    spelt = b""
    while spelt != choice.encode():
        allowed = constraint.mask(torch.zeros(vocab)).isfinite().nonzero()[:, 0].tolist()
        # The first tokens of a text may say less than they do in its middle.
        fitting = [
            (self_bytes, i)
            for i in allowed
            if i not in engine.tokenizer.eos_ids
            for self_bytes in [said(engine.tokenizer, i, first=not spelt)]
            if choice.encode().startswith(spelt + self_bytes)
        ]
        piece, token = max(fitting)
        spelt += piece
        text += decoder.push(token)
        constraint.accept(token)
    assert text + decoder.finish() == choice
    longer = any(other != choice and other.startswith(choice) for other in CHOICES)
    assert constraint.finished == (not longer)
    assert constraint.mask(torch.zeros(vocab))[end] == 0


def said(tokenizer: Tokenizer, token: int, first: bool) -> bytes:
    piece = tokenizer.token_bytes(token)
    strips = isinstance(tokenizer.backend.decoder, decoders.Sequence)
    return piece[1:] if first and strips and piece.startswith(b" ") else piece


def test_choices_are_answered_exactly(engine):
    found = answers(engine, 40, choices=CHOICES, temperature=5.0)
    assert {generation.finish_reason for generation in found} == {"stop"}
    assert {generation.text for generation in found} <= set(CHOICES)
    assert len({generation.text for generation in found}) > 3
    assert {generation.text for generation in answers(engine, 5, choices=("می‌رود",))} == {"می‌رود"}


@pytest.mark.parametrize("form", [{"choices": CHOICES}, {"json_schema": SCHEMA}], ids=["choices", "schema"])
def test_what_the_form_forces_is_guessed_and_changes_no_token(engine, form):
    """However odd the tokens are in which a model that knows nothing writes it."""
    ahead = Engine(engine.model, engine.tokenizer, dtype=torch.float32, drafter=NGramDrafter())
    for temperature in (0.0, 1.0, 5.0):
        plain, fast = (answers(one, 8, **form, temperature=temperature) for one in (engine, ahead))
        assert [(g.ids, g.text, g.finish_reason) for g in fast] == [(g.ids, g.text, g.finish_reason) for g in plain]


def test_what_is_forced_takes_few_steps():
    tokenizer = byte_tokenizer()
    steps = []
    for drafter in (None, NGramDrafter()):
        one = Engine(make_model(tokenizer.vocab_size), tokenizer, dtype=torch.float32, drafter=drafter)
        said = answers(one, 1, choices=("from that moment on", "to the end of the line"))[0]
        assert said.finish_reason == "stop"
        steps.append(one._steps)
    # One for the prompt, one for each of the rest, or for four and then eight letters at once.
    assert steps[0] == len(said.tokens)
    assert steps[1] <= 2 + len(said.tokens) // 8


def test_what_is_forced_is_known():
    tokenizer = byte_tokenizer()
    constraint = make_constraint(SamplingSettings(choices=("care", "caddy é", "cab")), tokenizer)
    assert constraint is not None
    assert constraint.forced == "ca"
    for letter in "cad":
        constraint.accept(tokenizer.encode(letter)[-1])
    assert constraint.forced == "dy é"
    for byte in "dy é".encode()[:-1]:
        assert not constraint.finished
        constraint.accept(next(i for i in range(256) if tokenizer.token_bytes(i) == bytes([byte])))
    assert constraint.forced == ""  # half a character is left


def test_every_end_token_may_end_the_answer():
    tokenizer = byte_tokenizer()
    constraint = make_constraint(SamplingSettings(choices=("a", "ab")), tokenizer)
    assert constraint is not None
    a, b = tokenizer.encode("a")[-1], tokenizer.encode("b")[-1]

    def allowed() -> set[int]:
        return set(constraint.mask(torch.zeros(300)).isfinite().nonzero()[:, 0].tolist())

    assert allowed() == {a}
    constraint.accept(a)
    assert allowed() == {b, 259, 260}
    assert not constraint.finished
    constraint.accept(b)
    assert constraint.finished


def test_a_tokenizer_without_an_end():
    made = byte_tokenizer()
    engine = Engine(make_model(262), Tokenizer(made.backend), dtype=torch.float32)
    assert engine.tokenizer.eos_ids == ()
    assert {generation.text for generation in answers(engine, 8, choices=("one", "two"))} <= {"one", "two"}


def test_too_few_tokens_end_by_length(engine):
    for generation in answers(engine, 3, json_schema=SCHEMA, max_tokens=4):
        assert (generation.finish_reason, len(generation.tokens)) == ("length", 4)


def test_a_stop_string_still_stops(engine):
    (generation,) = answers(engine, 1, regex="ab[0-9]{3}c", stop=("b",))
    assert (generation.text, generation.finish_reason) == ("a", "stop")


def test_the_same_seed_gives_the_same_answer_alone_and_in_a_batch(engine):
    def fresh() -> Engine:
        return Engine(engine.model, engine.tokenizer, dtype=torch.float32)

    forms: list[dict[str, Any]] = [{"json_schema": SCHEMA}, {"regex": "[a-z ]{5,9}"}, {"choices": CHOICES}, {}] * 2
    requests = [
        Request([5 + i, 6], SamplingSettings(**form, max_tokens=50, temperature=1.0, seed=i))
        for i, form in enumerate(forms)
    ]
    alone = [fresh().submit(request).wait().ids for request in requests]
    shared = fresh()
    assert [g.wait().ids for g in [shared.submit(request) for request in requests]] == alone


def test_log_probabilities_are_those_of_the_model(engine):
    (generation,) = answers(engine, 1, regex="[0-9]{3}", logprobs=2)
    ids = list(generation.request.prompt)
    for token in generation.tokens:
        logits_V = engine.model(torch.tensor(ids), torch.arange(len(ids)))[-1].double()
        assert token.logprob == pytest.approx(float(logits_V.log_softmax(0)[token.id]), abs=1e-4)
        assert token.top_logprobs is not None
        assert token.top_logprobs[0][0] == int(logits_V.argmax())
        ids.append(token.id)


def test_penalties_and_filters_keep_to_the_form(engine):
    fields = {"top_k": 2, "top_p": 0.5, "min_p": 0.9, "repetition_penalty": 3.0, "frequency_penalty": 2.0}
    for generation in answers(engine, 8, json_schema=SCHEMA, logit_bias={8: 90.0}, **fields):
        assert is_right(json.loads(generation.text))


def test_an_unconstrained_answer_is_untouched(engine):
    """No form, no code on the way: the answer is the sampler's on the model's own logits."""
    from craton.inference.sampling import Sampler

    settings = SamplingSettings(temperature=1.0, top_p=0.9, seed=3, max_tokens=12)
    generation = engine.submit(Request([5, 6, 7], settings)).wait()
    sampler, ids = Sampler(settings, [5, 6, 7], 3), [5, 6, 7]
    for _ in generation.tokens:
        ids.append(sampler(engine.model(torch.tensor(ids), torch.arange(len(ids)))[-1].float()))
    assert generation.ids[: len(ids)] == ids
    assert make_constraint(settings, engine.tokenizer) is None


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"json_schema": {"type": "objekt"}}, "JSON schema.*objekt"),
        ({"json_schema": {"type": "string", "not": {"type": "string"}}}, "Unimplemented keys"),
        ({"json_schema": {"enum": [{1, 2}]}}, "JSON schema"),
        ({"regex": "(a"}, "regex.*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: foo"}, "grammar.*foo"),
        ({"regex": "[^\\x00-\\x{10ffff}]"}, "cannot follow|cannot be followed"),
    ],
)
def test_a_malformed_form_is_refused_in_llguidance_s_words(form, words):
    engine = Engine(make_model(262), byte_tokenizer(), dtype=torch.float32)
    with pytest.raises(UsageError, match=f"(?s){words}"):
        engine.submit(Request([1], SamplingSettings(**form)))
    assert engine.submit(Request([1], SamplingSettings(max_tokens=2))).wait().tokens


def test_a_form_that_the_tokenizer_cannot_write_is_refused_or_ends_in_an_error():
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="</s>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    engine = Engine(make_model(3), Tokenizer(backend, special_tokens={"eos_token": "</s>"}), dtype=torch.float32)
    with pytest.raises(UsageError, match="no token"):
        engine.submit(Request([0], SamplingSettings(choices=("c",))))
    other = engine.submit(Request([0], SamplingSettings(max_tokens=20, logit_bias={2: -100.0})))
    stuck = engine.submit(Request([0], SamplingSettings(choices=("abc",))))
    with pytest.raises(UsageError, match="any further"):
        stuck.wait()
    assert stuck.finish_reason == "cancelled"
    assert len(other.wait().tokens) == 20


def test_a_form_is_one_form():
    def settings(**values: Any) -> SamplingSettings:
        return parse(SamplingSettings, values, where="the test")

    with pytest.raises(UsageError, match="one form, not regex and choices"):
        settings(regex="a", choices=("b",))
    with pytest.raises(UsageError, match="empty choice"):
        settings(choices=("a", ""))
    assert settings(json_schema={}).json_schema == {}


def test_without_llguidance_a_form_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UsageError, match="pip install"):
        make_constraint(SamplingSettings(regex="a"), byte_tokenizer())
    assert make_constraint(SamplingSettings(), byte_tokenizer()) is None


def test_a_tokenizer_is_not_kept_alive():
    import gc
    import weakref

    def use(make: Callable[[], Tokenizer]) -> weakref.ref[Tokenizer]:
        tokenizer = make()
        make_constraint(SamplingSettings(regex="a"), tokenizer)
        return weakref.ref(tokenizer)

    gone = use(byte_tokenizer)
    gc.collect()
    assert gone() is None
