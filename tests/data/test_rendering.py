"""From records to tokens and targets: learnt is what should be, shifted once, and cut together with its mask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from craton.checkpoints.checkpoint import Checkpoint
from craton.data.example import UNTRAINED, Example, TokenSequence
from craton.data.labels import LabelMap
from craton.data.lengths import LengthReport
from craton.data.records import Record, read_records
from craton.data.rendering import Renderer, RenderSettings, render_record, render_records
from craton.data.schema import KeySettings, Schema, check_schema
from craton.errors import CratonError, DataError, TemplateError, UnknownName, UsageError
from craton.modalities.text import Tokenizer, render

LINES = ["The quick brown fox jumps over the lazy dog until 12:30.", "زبان فارسی از راست به چپ نوشته می‌شود."] * 3
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The end of a turn is learnt in the first turn, but not in the last.
STOP_FORGOTTEN = (
    "{% for message in messages %}{{ message['role'] + ':' }}"
    "{% if message['role'] != 'assistant' %}{{ message['content'] + '<|im_end|>' }}"
    "{% elif loop.last %}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '\n<|im_end|>' }}"
    "{% else %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% endif %}{% endfor %}"
)
# Earlier answers lose their reasoning once the conversation goes on.
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{% if loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_TOOLS = "{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}" + CHATML

SYSTEM, USER, ANSWER, MORE, LAST = (
    {"role": role, "content": content}
    for role, content in (
        ("system", "Be brief."),
        ("user", "What is the quick fox? سلام"),
        ("assistant", "A fox 🦊 می‌شود; it runs."),
        ("user", "And the dog?"),
        ("assistant", "lazy"),
    )
)


def chatml_tokenizer(template: str = CHATML, **templates: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return Tokenizer(
        backend, special_tokens={"eos_token": "<|im_end|>"}, chat_templates={"default": template, **templates}
    )


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return chatml_tokenizer()


@pytest.fixture(scope="module")
def with_bos() -> Tokenizer:
    """As SentencePiece's: BOS before every text, and a space before its first word."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


@pytest.fixture(scope="module")
def wordpiece() -> Tokenizer:
    """As BERT's: [CLS] and [SEP] around every text, and no end-of-sequence token."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return Tokenizer(backend, special_tokens={"unk_token": "[UNK]"})


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Tokenizer:
    return Checkpoint.open(smollm2_gguf).tokenizer()


def example_of(value: dict[str, Any], tokenizer: Tokenizer, schema: Schema | None = None, **options: Any) -> Example:
    checked = check_schema([Record(value, "a.jsonl:7")], expected=(schema,) if schema else ())
    template = options.pop("template", False)
    record = next(iter(checked))
    return render_record(record, tokenizer, checked.schema, settings=RenderSettings(template=template), **options)


def learnt(sequence: TokenSequence) -> list[int]:
    return [int(i) for i in sequence.targets if i != UNTRAINED]


def learnt_text(sequence: TokenSequence, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(learnt(sequence), skip_special_tokens=False)


def check_shift(sequence: TokenSequence) -> None:
    """Every target is the token that follows: shifted exactly once."""
    assert len(sequence.ids) == len(sequence.targets)
    kept = sequence.targets[:-1] != UNTRAINED
    assert (sequence.targets[:-1][kept] == sequence.ids[1:][kept]).all()
    assert sequence.targets[-1] == UNTRAINED


# --- what is learnt, by schema -------------------------------------------------------------------------------------


def test_a_document_is_learnt_with_its_end(chatml: Tokenizer) -> None:
    (sequence,) = example_of({"text": "The fox."}, chatml).sequences
    assert sequence.ids.tolist() == [*chatml.encode("The fox."), chatml.eos_ids[0]]
    assert learnt(sequence) == sequence.ids[1:].tolist()


def test_a_document_that_has_its_end_gets_no_second(chatml: Tokenizer) -> None:
    (sequence,) = example_of({"text": "The fox.<|im_end|>"}, chatml).sequences
    assert sequence.ids.tolist() == chatml.encode("The fox.<|im_end|>")


def test_bos_is_there_exactly_once_and_where_the_tokeniser_puts_it(with_bos: Tokenizer) -> None:
    for value in ({"text": "The fox"}, {"prompt": "The", "completion": " fox"}, {"text": "fox", "label": 1}):
        (sequence,) = example_of(value, with_bos).sequences
        assert sequence.ids.tolist().count(1) == 1
        assert sequence.ids[0] == 1
        assert 1 not in learnt(sequence)
    for value in ({"text": "<s>The fox"}, {"prompt": "<s>The", "completion": " fox"}, {"text": "<s> a", "label": 1}):
        with pytest.raises(DataError, match="two BOS") as caught:
            example_of(value, with_bos)
        assert (caught.value.where, caught.value.remedy) == ("a.jsonl:7", "take '<s>' out of the text")


def test_an_encoder_s_document_ends_as_its_tokeniser_ends_it(wordpiece: Tokenizer) -> None:
    (sequence,) = example_of({"text": "The fox"}, wordpiece).sequences
    assert sequence.ids.tolist() == wordpiece.encode("The fox")
    assert (sequence.ids[0], sequence.ids[-1]) == (1, 2)


def test_a_tokeniser_without_an_end_is_refused_at_once() -> None:
    tokenizer = Tokenizer(chatml_tokenizer().backend)
    with pytest.raises(UsageError, match="no token that ends a sequence"):
        Renderer(tokenizer, "text")
    Renderer(tokenizer, "labelled")


def test_a_completion_is_learnt_and_its_prompt_is_not(smollm2: Tokenizer) -> None:
    (sequence,) = example_of({"prompt": "The capital of Iran is", "completion": " تهران."}, smollm2).sequences
    check_shift(sequence)
    assert learnt_text(sequence, smollm2) == " تهران.<|im_end|>"
    assert smollm2.decode(sequence.ids, skip_special_tokens=False) == "The capital of Iran is تهران.<|im_end|>"


def test_the_prompt_s_tokens_are_those_it_has_alone(chatml: Tokenizer) -> None:
    # "until" is a token: at work the model is given "un" and must go on with "til".
    assert len(chatml.encode(" until")) == 1
    renderer = Renderer(chatml, "prompt")
    (sequence,) = renderer.render(Record({"prompt": "fox un", "completion": "til dog"}, "a:1")).sequences
    head = chatml.encode("fox un")
    assert sequence.ids[: len(head)].tolist() == head
    assert learnt(sequence) == [*chatml.encode("til dog"), chatml.eos_ids[0]]
    assert renderer.apart == 1


def test_parts_that_cannot_be_tokenised_apart_are_refused(with_bos: Tokenizer) -> None:
    # "jumps" is a token; alone, "ps" would get a space before it, which the text does not have.
    with pytest.raises(DataError, match="share a token") as caught:
        example_of({"prompt": "fox jum", "completion": "ps"}, with_bos)
    assert "white space" in str(caught.value.remedy)


def test_a_prompt_through_the_chat_template(smollm2: Tokenizer) -> None:
    (sequence,) = example_of({"prompt": "Say hi.", "completion": "hi"}, smollm2, template=True).sequences
    turns = [{"role": "user", "content": "Say hi."}, {"role": "assistant", "content": "hi"}]
    assert sequence.ids.tolist() == render(turns, smollm2).ids
    assert learnt_text(sequence, smollm2) == "hi<|im_end|>"


def test_every_turn_of_the_assistant_is_learnt_to_its_end(smollm2: Tokenizer) -> None:
    (sequence,) = example_of({"messages": [SYSTEM, USER, ANSWER, MORE, LAST]}, smollm2).sequences
    check_shift(sequence)
    assert learnt_text(sequence, smollm2) == "A fox 🦊 می‌شود; it runs.<|im_end|>lazy<|im_end|>"
    text = smollm2.decode(sequence.ids, skip_special_tokens=False)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is")


def test_tools_go_to_the_template_for_tools() -> None:
    tokenizer = chatml_tokenizer(tool_use=WITH_TOOLS)
    value = {"messages": [USER, ANSWER], "tools": [{"name": "search"}]}
    (sequence,) = example_of(value, tokenizer).sequences
    text = tokenizer.decode(sequence.ids, skip_special_tokens=False)
    assert text.startswith('<|im_start|>tools\n[{"name": "search"}]<|im_end|>\n<|im_start|>user')
    assert learnt_text(sequence, tokenizer) == f"{ANSWER['content']}<|im_end|>"


@pytest.mark.parametrize("template", [False, True])
def test_chosen_and_rejected_share_the_prompt_and_only_they_are_learnt(chatml: Tokenizer, template: bool) -> None:
    value = {"prompt": "The dog is", "chosen": " lazy", "rejected": " quick"}
    chosen, rejected = example_of(value, chatml, template=template).sequences
    assert learnt_text(chosen, chatml) == " lazy<|im_end|>"
    assert learnt_text(rejected, chatml) == " quick<|im_end|>"
    shared = int(np.argmax(chosen.targets != UNTRAINED)) + 1
    assert chosen.ids[:shared].tolist() == rejected.ids[:shared].tolist()


def test_earlier_answers_within_a_prompt_are_not_learnt(chatml: Tokenizer) -> None:
    value = {"prompt": [USER, ANSWER, MORE], "chosen": [LAST], "rejected": [{**LAST, "content": "quick"}]}
    chosen, rejected = example_of(value, chatml).sequences
    assert learnt_text(chosen, chatml) == "lazy<|im_end|>"
    assert learnt_text(rejected, chatml) == "quick<|im_end|>"
    (sequence,) = example_of({"prompt": [USER, ANSWER, MORE], "completion": [LAST]}, chatml).sequences
    assert sequence.ids.tolist() == chosen.ids.tolist()


def test_an_unpaired_preference_has_its_wish_as_label(chatml: Tokenizer) -> None:
    for label in (True, False):
        example = example_of({"prompt": "The dog is", "completion": " lazy", "label": label}, chatml)
        assert example.label == int(label)
        assert learnt_text(example.sequences[0], chatml) == " lazy<|im_end|>"


def test_a_labelled_text_is_only_read_and_has_the_number_of_its_class(wordpiece: Tokenizer) -> None:
    labels = LabelMap(("atm", "card"))
    example = example_of({"text": "The fox", "label": "card"}, wordpiece, labels=labels)
    assert (example.label, example.trained) == (1, 0)
    assert example.sequences[0].ids.tolist() == wordpiece.encode("The fox")
    assert example_of({"text": "The fox", "label": "card"}, wordpiece).label is None
    with pytest.raises(UnknownName, match="unknown label 'crad'") as caught:
        example_of({"text": "The fox", "label": "crad"}, wordpiece, labels=labels)
    assert (caught.value.where, caught.value.remedy) == ("a.jsonl:7", "did you mean 'card'?")


def test_pairs_are_read_in_their_order(wordpiece: Tokenizer) -> None:
    value = {"anchor": "fox", "positive": "dog", "negatives": ["lazy", "quick"]}
    example = example_of(value, wordpiece)
    assert [s.ids.tolist() for s in example.sequences] == [wordpiece.encode(t) for t in ("fox", "dog", "lazy", "quick")]
    assert example.trained == 0


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "words", "where"),
    [
        ({"messages": [USER]}, DataError, "no token is trained", ""),
        ({"messages": [{"role": "usr", "content": "x"}]}, UnknownName, "unknown role 'usr'", ", messages[0].role"),
        ({"messages": []}, UsageError, "no messages", ", messages"),
        ({"text": " \n"}, DataError, "text is empty", ""),
        ({"prompt": "p", "completion": ""}, DataError, "completion is empty", ""),
        ({"prompt": "p", "chosen": "c", "rejected": "\n"}, DataError, "rejected is empty", ""),
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, DataError, "the same", ""),
        ({"anchor": "a", "positive": "b", "negatives": [""]}, DataError, "negatives[0] is empty", ""),
        ({"text": "\ud800", "label": 1}, UsageError, "surrogate", ", character 0"),
    ],
)
def test_a_record_that_teaches_nothing_is_refused(
    chatml: Tokenizer, value: dict[str, Any], error: type[CratonError], words: str, where: str
) -> None:
    with pytest.raises(error) as caught:
        example_of(value, chatml)
    assert words in caught.value.what
    assert caught.value.where == f"a.jsonl:7{where}"


def test_a_text_that_the_vocabulary_cannot_spell_is_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "</s>"})
    for value in ({"text": "ب"}, {"text": "ب", "label": 1}, {"prompt": "a", "completion": "ب"}):
        with pytest.raises(DataError, match="no token for anything"):
            example_of(value, tokenizer)


def test_an_end_that_is_not_learnt_is_refused() -> None:
    tokenizer = chatml_tokenizer(STOP_FORGOTTEN)
    with pytest.raises(DataError, match="never learn to stop") as caught:
        example_of({"messages": [USER, ANSWER, MORE, LAST]}, tokenizer)
    assert caught.value.where == "a.jsonl:7"
    with pytest.raises(TemplateError, match="never stop"):
        example_of({"messages": [MORE, LAST]}, tokenizer)


def test_a_template_that_doubles_bos_is_refused() -> None:
    backend = chatml_tokenizer().backend
    tokenizer = Tokenizer(
        backend,
        special_tokens={"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        chat_templates={"default": "{{ bos_token }}" + CHATML},
    )
    with pytest.raises(TemplateError, match="two BOS") as caught:
        example_of({"messages": [USER, ANSWER]}, tokenizer)
    assert caught.value.where == "a.jsonl:7, chat template"


def test_a_prompt_that_the_template_renders_differently_later_is_refused() -> None:
    # The prompt with its reasoning is no beginning of the whole, in which the reasoning is gone.
    tokenizer = chatml_tokenizer(FORGETFUL)
    with pytest.raises(DataError, match="differently once the answer follows"):
        example_of({"prompt": [USER, ANSWER], "completion": [MORE, LAST]}, tokenizer)


def test_a_model_without_a_template_is_refused_before_any_record(with_bos: Tokenizer) -> None:
    for schema, template in (("messages", False), ("prompt", True)):
        with pytest.raises(TemplateError, match="no chat template"):
            Renderer(with_bos, schema, settings=RenderSettings(template=template))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schema", "options"),
    [("messages", {"overlong": "split"}), ("messages", {"template": True}), ("labelled", {"template": True})],
)
def test_settings_that_mean_nothing_for_the_schema_are_refused(chatml: Tokenizer, schema: Schema, options: Any) -> None:
    with pytest.raises(UsageError):
        Renderer(chatml, schema, settings=RenderSettings(**options))


# --- too long ------------------------------------------------------------------------------------------------------


def rendered(
    values: Sequence[dict[str, Any]], tokenizer: Tokenizer, schema: Schema, **options: Any
) -> tuple[list[Example], LengthReport]:
    report = LengthReport()
    records = [Record(value, f"a:{i}") for i, value in enumerate(values, 1)]
    chosen = RenderSettings(**options)
    return list(render_records(records, tokenizer, schema, settings=chosen, report=report)), report


TEXTS = [{"text": text} for text in ("fox", LINES[0], LINES[1], "dog")]


def test_dropped(chatml: Tokenizer) -> None:
    examples, report = rendered(TEXTS, chatml, "text", max_tokens=8)
    assert [e.origin for e in examples] == ["a:1", "a:4"]
    assert report == LengthReport(records=4, examples=2, overlong=2, dropped=2)


def test_nothing_is_cut_without_a_limit(chatml: Tokenizer) -> None:
    assert rendered(TEXTS, chatml, "text")[1] == LengthReport(records=4, examples=4)


def test_an_answer_out_of_reach_is_dropped_and_counted(chatml: Tokenizer) -> None:
    values = [{"prompt": LINES[0], "completion": " x"}, {"prompt": "fox", "completion": LINES[0]}]
    examples, report = rendered(values, chatml, "prompt", max_tokens=8, overlong="truncate")
    assert [e.origin for e in examples] == ["a:2"]
    assert report == LengthReport(records=2, examples=1, overlong=2, truncated=1, dropped=1, emptied=1)
    value = {"prompt": "fox" * 5, "chosen": " lazy", "rejected": " quick"}
    assert rendered([value], chatml, "preference", max_tokens=5, overlong="truncate")[1].emptied == 1


def test_a_text_that_is_only_read_keeps_its_last_special_token(wordpiece: Tokenizer) -> None:
    ((example,), report) = rendered(
        [{"text": LINES[0], "label": "x"}], wordpiece, "labelled", max_tokens=6, overlong="truncate"
    )
    whole = wordpiece.encode(LINES[0])
    assert example.sequences[0].ids.tolist() == [*whole[:5], whole[-1]]
    assert report.truncated == 1


characters = st.characters(exclude_categories=["Cs"]) | st.sampled_from("the fox\n ‌می🦊")
texts = st.text(characters, max_size=60)
filled = texts.filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(value=filled, limit=st.integers(2, 20), overlong=st.sampled_from(["truncate", "split"]))
def test_cutting_keeps_every_target_at_its_token(chatml: Tokenizer, value: str, limit: int, overlong: Any) -> None:
    whole = example_of({"text": value}, chatml).sequences[0]
    examples, report = rendered([{"text": value}], chatml, "text", max_tokens=limit, overlong=overlong)
    pieces = [example.sequences[0] for example in examples]
    assert all(len(piece) <= limit for piece in pieces)
    assert report.examples == len(pieces)
    assert report.overlong == (len(whole) > limit)
    end = len(whole) if overlong == "split" else limit
    # Nothing but a lone end of the document, which has no target, may be missing.
    ids = np.concatenate([piece.ids for piece in pieces])
    assert len(whole.ids[:end]) - len(ids) in (0, 1)
    assert ids.tolist() == whole.ids[:end][: len(ids)].tolist()
    assert np.concatenate([p.targets for p in pieces]).tolist() == whole.targets[:end][: len(ids)].tolist()
    assert sum(example.trained for example in examples) == np.count_nonzero(whole.targets[:end] != UNTRAINED)


# --- any text ------------------------------------------------------------------------------------------------------


def is_spellable(text: str, tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary has tokens for all of its bytes; SmolLM2's lacks a few."""
    return tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=150, deadline=None)
@given(prompt=texts, completion=filled, which=st.sampled_from(["chatml", "smollm2"]))
def test_any_prompt_and_completion(prompt: str, completion: str, which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    assume(is_spellable(prompt + completion, tokenizer))
    (sequence,) = example_of({"prompt": prompt, "completion": completion}, tokenizer).sequences
    check_shift(sequence)
    assert sequence.ids[: len(tokenizer.encode(prompt))].tolist() == tokenizer.encode(prompt)
    assert tokenizer.decode(sequence.ids, skip_special_tokens=False) == f"{prompt}{completion}<|im_end|>"
    if prompt:  # else the first token is nobody's target
        assert learnt_text(sequence, tokenizer) == f"{completion}<|im_end|>"


@settings(max_examples=100, deadline=None)
@given(
    first=texts,
    turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), texts), max_size=4),
    which=st.sampled_from(["chatml", "smollm2"]),
)
def test_any_conversation(first: str, turns: list[tuple[str, str]], which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(which)
    turns = [("user", first), *turns]
    assume(is_spellable("".join(content for _, content in turns), tokenizer))
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        (sequence,) = example_of({"messages": messages}, tokenizer).sequences
    except CratonError as error:
        refusal = error
    else:
        check_shift(sequence)
        answers = [content for role, content in turns if role == "assistant"]
        assert learnt_text(sequence, tokenizer) == "".join(f"{answer}<|im_end|>" for answer in answers)
        return
    # An answer whose first token would swallow the line end before it could not be generated.
    swallowed = any(role == "assistant" and content[:1].isspace() for role, content in turns)
    assert swallowed or all(role == "user" for role, _ in turns), refusal


# --- real data -----------------------------------------------------------------------------------------------------


def test_banking77_as_a_classifier_reads_it(shared_data: Path, minilm_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(minilm_folder)
    source, keys = shared_data / "banking77" / "test.csv", KeySettings(label_key="category")
    labels = LabelMap.of(record.value["category"] for record in read_records(source))
    checked = check_schema(read_records(source), keys=keys, expected=("labelled",))
    examples = list(render_records(checked, tokenizer, checked.schema, labels=labels))
    assert len(examples) == 3080
    assert {example.label for example in examples} == set(range(77))
    assert all(e.trained == 0 and e.sequences[0].ids[0] == 101 for e in examples)


def test_persian_reviews_as_prompts(shared_data: Path, smollm2: Tokenizer) -> None:
    rows = list(read_records(shared_data / "parsinlu" / "sentiment_movie_dev.jsonl"))[:50]
    records = [
        Record({"prompt": f"{r.value['review']}\n{r.value['question']}", "completion": r.value["label"]}, r.origin)
        for r in rows
    ]
    checked = check_schema(records)
    chosen = RenderSettings(template=True)
    for record, example in zip(rows, render_records(checked, smollm2, checked.schema, settings=chosen), strict=True):
        assert learnt_text(example.sequences[0], smollm2) == f"{record.value['label']}<|im_end|>"
        assert example.origin == record.origin
