"""Tokenizers into GGUF metadata: what is written reads back as the same tokenizer, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from craton.errors import CheckpointError
from craton.modalities.text import GGUF_TYPES, Tokenizer, gguf_metadata_from_tokenizer, tokenizer_from_gguf

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def copy(tokenizer: Tokenizer, **changes: Any) -> Tokenizer:
    """The same tokenizer with parts of its description changed."""
    description = json.loads(tokenizer.backend.to_str()) | changes
    return Tokenizer(
        tokenizers.Tokenizer.from_str(json.dumps(description)),
        special_tokens=tokenizer.special_tokens,
        eos_ids=tokenizer.eos_ids,
        chat_templates=tokenizer.chat_templates,
    )


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
@FAST
@given(text=st.text())
def test_what_is_written_reads_back_the_same(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    read_back = request.getfixturevalue("read_back")(kind)
    ids = tokenizer.encode(text)
    assert read_back.encode(text) == ids
    assert read_back.decode(ids) == tokenizer.decode(ids)


@pytest.fixture(scope="session")
def read_back(byte_level: Tokenizer, sentencepiece: Tokenizer, wordpiece: Tokenizer) -> Any:
    kinds = {"byte_level": byte_level, "sentencepiece": sentencepiece, "wordpiece": wordpiece}
    return {k: tokenizer_from_gguf(gguf_metadata_from_tokenizer(t)) for k, t in kinds.items()}.__getitem__


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "wordpiece"])
def test_every_entry_is_plain_and_has_a_stored_type(kind: str, request: pytest.FixtureRequest) -> None:
    metadata = gguf_metadata_from_tokenizer(request.getfixturevalue(kind))
    plain = {
        "string": lambda v: type(v) is str,
        "bool": lambda v: type(v) is bool,
        "uint32": lambda v: type(v) is int,
        "array of string": lambda v: all(type(x) is str for x in v),
        "array of int32": lambda v: all(type(x) is int for x in v),
        "array of float32": lambda v: all(type(x) is float for x in v),
    }
    for key, value in metadata.items():
        assert plain[GGUF_TYPES[key]](value), key


def test_the_real_file_is_written_as_it_was(smollm2: Tokenizer, smollm2_metadata: dict[str, Any]) -> None:
    written = gguf_metadata_from_tokenizer(smollm2)
    assert smollm2_metadata["tokenizer.ggml.pre"] == "smollm"
    implied = {"tokenizer.ggml.add_space_prefix"}
    assert {key: written.get(key) for key in smollm2_metadata.keys() - implied} == {
        key: value for key, value in smollm2_metadata.items() if key not in implied
    }
    assert written.keys() - smollm2_metadata.keys() == {"tokenizer.ggml.add_eos_token"}


def test_a_real_wordpiece_folder(minilm_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(minilm_folder)
    written = gguf_metadata_from_tokenizer(tokenizer)
    assert written["tokenizer.ggml.tokens"][:2] == ["[PAD]", "▁[unused0]"]
    assert written["tokenizer.ggml.bos_token_id"] == 101
    read_back = tokenizer_from_gguf(written)
    assert read_back.special_tokens == tokenizer.special_tokens
    assert read_back.encode("Unaffable ÉCOLE 東京!") == tokenizer.encode("Unaffable ÉCOLE 東京!")


def test_ends_templates_and_surroundings_are_kept(byte_level: Tokenizer) -> None:
    tokenizer = copy(byte_level)
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer = Tokenizer(
        tokenizer.backend,
        special_tokens=byte_level.special_tokens,
        eos_ids=(40, 41),
        chat_templates={"default": "plain", "tool_use": "tools"},
    )
    written = gguf_metadata_from_tokenizer(tokenizer)
    assert (written["tokenizer.ggml.eot_token_id"], written["tokenizer.ggml.eom_token_id"]) == (40, 41)
    read_back = tokenizer_from_gguf(written)
    assert read_back.encode("fox") == tokenizer.encode("fox") == [1, *byte_level.encode("fox"), 2]
    assert read_back.chat_templates == tokenizer.chat_templates
    assert set(tokenizer.eos_ids) <= set(read_back.eos_ids)


def test_tokens_matched_whole_but_not_special(byte_level: Tokenizer) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level.backend.to_str())
    backend.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    read_back = tokenizer_from_gguf(gguf_metadata_from_tokenizer(Tokenizer(backend)))
    assert read_back.encode("a<think>b") == backend.encode("a<think>b").ids
    assert read_back.decode(read_back.encode("a<think>b")) == "a<think>b"


def test_every_known_cut_is_written_under_a_name_that_means_it(byte_level: Tokenizer) -> None:
    from craton.modalities.text.pretokenizers import PRE_TOKENIZERS

    for family in PRE_TOKENIZERS.values():
        model = json.loads(byte_level.backend.to_str())["model"] | {"ignore_merges": family.ignore_merges}
        changed = copy(byte_level, pre_tokenizer=family.pre_tokenizer, normalizer=family.normalizer, model=model)
        name = gguf_metadata_from_tokenizer(changed)["tokenizer.ggml.pre"]
        assert PRE_TOKENIZERS[name] == family


def test_tokenizers_that_gguf_cannot_express(
    byte_level: Tokenizer, sentencepiece: Tokenizer, metaspace: Tokenizer, wordpiece: Tokenizer
) -> None:
    def refused(tokenizer: Tokenizer, complaint: str) -> None:
        with pytest.raises(CheckpointError, match=complaint) as refusal:
            gguf_metadata_from_tokenizer(tokenizer)
        assert "Hugging Face" in str(refusal.value.remedy)

    white_space = json.loads(pre_tokenizers.WhitespaceSplit().__getstate__())
    refused(copy(byte_level, pre_tokenizer=white_space), "cutting text into words")
    refused(copy(byte_level, normalizer={"type": "NFKC"}), "cutting text into words")
    refused(metaspace, "normalizer")
    refused(copy(wordpiece, pre_tokenizer=white_space), "pre_tokenizer")
    refused(
        copy(wordpiece, normalizer=json.loads(normalizers.BertNormalizer(clean_text=False).__getstate__())), "normal"
    )
    refused(Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", -1.0), ("b", -2.0)], unk_id=0))), "Unigram")

    model = json.loads(sentencepiece.backend.to_str())["model"]
    made = ["".join(merge) for merge in model["merges"]]
    twice = next(i for i, token in enumerate(made) if made.count(token) > 1)
    del model["merges"][twice]  # a score for each token would bring this way of making it back
    refused(copy(sentencepiece, model=model), "score")

    stripping = tokenizers.Tokenizer.from_str(byte_level.backend.to_str())
    stripping.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True)])
    refused(Tokenizer(stripping), "added tokens")

    around = tokenizers.Tokenizer.from_str(byte_level.backend.to_str())
    around.post_processor = processors.TemplateProcessing(single="$A <x>", special_tokens=[("<x>", 40)])
    refused(Tokenizer(around, special_tokens=byte_level.special_tokens), "around a text")
    refused(Tokenizer(copy(byte_level).backend, eos_ids=(40, 41, 42, 43)), "end a generation")
