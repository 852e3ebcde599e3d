"""Cross-encoders: the scores of transformers' files, and passages in their order."""

from __future__ import annotations

import json
from typing import Any

import pytest
import tokenizers
import torch

from craton.errors import ContextOverflow, UsageError
from craton.retrieval.rerank import CrossEncoder

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(60)), "##a"]
QUESTION = "w1 w2 w3"
TEXTS = ["w4 w1", "w1 w2 w3", "w6 w7 w8 w9 w1", "w1", "w4 w1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT with one output, as transformers writes it, and its tokeniser."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more: dict[str, Any] = {"intermediate_size": 48, "max_position_embeddings": 24, "initializer_range": 0.3}
    config = transformers.BertConfig(vocab_size=len(WORDS), num_labels=1, **sizes, **more)
    transformers.BertForSequenceClassification(config).eval().save_pretrained(folder)
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.peer
def test_scores_are_those_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    encoder = CrossEncoder(str(folder))
    expected = []
    for text in TEXTS:
        pair = encoder.tokenizer.backend.encode(QUESTION, text)
        assert set(pair.type_ids) == {0, 1}
        with torch.inference_mode():
            out = theirs(torch.tensor([pair.ids]), token_type_ids=torch.tensor([pair.type_ids]))
        expected.append(out.logits.item())
    assert max(expected) - min(expected) > 0.01
    assert encoder(QUESTION, TEXTS) == pytest.approx(expected, abs=1e-5)
    assert encoder(QUESTION, []) == []


def test_of_a_long_text_the_beginning_is_read(folder):
    encoder = CrossEncoder(str(folder))
    fits = " ".join(f"w{n}" for n in range(10, 28))  # 18, and 3 of the question, and 3 around them
    assert encoder(QUESTION, [fits + " w5 w6a"]) == encoder(QUESTION, [fits])
    with pytest.raises(ContextOverflow, match="no room"):
        encoder("w1 " * 30, ["w2"])


def test_an_answer_is_read_from_the_passages_that_it_puts_first(folder, craton, tiny_model, tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    for number, text in enumerate(TEXTS[:4]):
        (docs / f"{number}.txt").write_text(text)
    craton("index", "add", docs, "--encoder", tiny_model, "--threads", "1")
    ask = ("ask", QUESTION, "-m", tiny_model, "--threads", "1", "--max-tokens", "4", "--passages", "2", "--json")
    status, out, err = craton(*ask, "--rerank", folder)
    assert status == 0, err
    scores = sorted(CrossEncoder(str(folder))(QUESTION, TEXTS[:4]), reverse=True)
    assert [one["score"] for one in json.loads(out)["sources"]] == pytest.approx(scores[:2], abs=1e-4)


def test_another_model_is_no_reranker(tiny_model):
    with pytest.raises(UsageError, match="no reranker"):
        CrossEncoder(str(tiny_model))
