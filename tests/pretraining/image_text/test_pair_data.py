"""Pictures with captions from tables and folders, and the tokeniser of captions."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from craton.errors import DataError, FileFormatError, UsageError
from craton.modalities.image import encode_png
from craton.pretraining.image_text.data import END, START, caption_tokenizer, encode_captions, read_pairs

pytest.importorskip("PIL", reason="pictures need Pillow")

CAPTIONS = ("A red square.", "a blue square", "Un carré bleu.", "یک مربع آبی", "a red circle", "A blue circle.")


@pytest.fixture
def folder(tmp_path):
    """Two pictures with captions beside them, one of them in a folder of its own."""
    for name, caption in (("a.png", "A first.\nde=Ein erstes.\n"), ("in/b.png", "\ufeffگربه")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(np.zeros((9, 7, 3), np.uint8)))
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return tmp_path / "data"


def test_a_folder_and_a_table_are_read_alike(folder):
    found = read_pairs([str(folder)], size=8)
    assert found.captions == ("A first.", "گربه")
    assert found.pixels.shape == (2, 8, 8, 3)
    assert (found.labels, found.names) == (None, ())
    table = folder / "pairs.jsonl"
    table.write_text(json.dumps({"image": "a.png", "caption": "another"}) + "\n")
    both = read_pairs([str(folder), str(table)], size=8)
    assert both.captions == ("A first.", "گربه", "another")
    assert len(both.origins) == len(both) == 3


def test_what_is_missing_or_broken_is_named(folder):
    (folder / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="empty"):
        read_pairs([str(folder)], size=8)
    (folder / "a.txt").write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(FileFormatError, match="UTF-8"):
        read_pairs([str(folder)], size=8)
    (folder / "a.txt").write_bytes(b"x" * (1 << 20 | 1))
    with pytest.raises(FileFormatError, match="1 MiB"):
        read_pairs([str(folder)], size=8)
    (folder / "a.txt").unlink()
    with pytest.raises(DataError, match="no caption") as error:
        read_pairs([str(folder)], size=8)
    assert str(folder / "a.png") in str(error.value.where)
    table = folder / "pairs.jsonl"
    table.write_text(json.dumps({"image": "a.png"}) + "\n")
    with pytest.raises(DataError, match="no captions"):
        read_pairs([str(table)], size=8)
    with pytest.raises(UsageError):
        read_pairs([str(folder / "nowhere")], size=8)


def test_the_tokeniser_has_clips_form():
    tokenizer = caption_tokenizer(CAPTIONS, 400)
    assert tokenizer.vocab_size <= 400
    end = tokenizer.vocab_size - 1
    assert tokenizer.backend.token_to_id(END) == end == tokenizer.pad_id
    assert tokenizer.backend.token_to_id(START) == end - 1 == tokenizer.bos_id
    ids = tokenizer.encode("A RED Circle")
    assert ids == tokenizer.encode("a red circle")
    assert (ids[0], ids[-1]) == (end - 1, end)
    assert sorted(tokenizer.backend.get_vocab().values()) == list(range(end + 1))
    again = caption_tokenizer(CAPTIONS, 400)
    assert again.backend.to_str() == tokenizer.backend.to_str()
    with pytest.raises(UsageError, match="too few"):
        caption_tokenizer(CAPTIONS, 200)


TOKENIZER = caption_tokenizer(CAPTIONS, 300)


@given(st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=60), max_size=5), st.integers(3, 20))
def test_captions_of_any_kind_fit_the_context(captions, context):
    texts, cut = encode_captions(TOKENIZER, captions, context, lower=True)
    assert len(texts) == len(captions)
    assert all(2 <= len(text) <= context for text in texts)
    assert all(text[-1] == TOKENIZER.vocab_size - 1 for text in texts)
    assert cut == sum(len(TOKENIZER.encode(caption.lower())) > context for caption in captions)
