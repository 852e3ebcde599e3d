"""`/v1/embeddings`, `/v1/rerank`, `/v1/tokenize`."""

from __future__ import annotations

import numpy as np
import openai
import pytest

import craton

TEXTS = ["the code of red", "blue", "what is a class", *(f"number {i}" for i in range(20))]


@pytest.fixture(scope="module")
def model(tiny_model):
    return craton.load(str(tiny_model), threads=1)


def test_vectors_are_the_models_as_floats_and_as_base64(client, model_id, model):
    expected = model.embed(TEXTS).float().numpy()
    floats = client.embeddings.create(model=model_id, input=TEXTS, encoding_format="float")
    assert np.allclose([one.embedding for one in floats.data], expected, atol=1e-4)
    coded = client.embeddings.create(model=model_id, input=TEXTS)  # base64, unpacked by the client
    assert np.allclose([one.embedding for one in coded.data], expected, atol=1e-4)
    assert floats.usage.prompt_tokens == sum(map(len, model.tokenizer.encode_batch(TEXTS)))


def test_fewer_dimensions_are_the_first_ones_at_unit_length(client, model_id, model):
    [found] = client.embeddings.create(model=model_id, input="red", dimensions=8, encoding_format="float").data
    whole = model.embed("red")[0, :8].float().numpy()
    assert np.allclose(found.embedding, whole / np.linalg.norm(whole), atol=1e-4)
    with pytest.raises(openai.BadRequestError, match="64 dimensions"):
        client.embeddings.create(model=model_id, input="red", dimensions=65)


def test_texts_that_cannot_be_read_are_refused(client, model_id):
    for given in ("", [], ["red", ""], "red " * 600, ["x"] * 257):
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model=model_id, input=given)
        assert caught.value.param.split(".")[0] == "input"


def test_documents_are_ranked_by_cosine(server, model_id, model):
    documents = [{"text": "the code of red"}, "blue zam", "what"]
    body = {"model": model_id, "query": "the code of red", "documents": documents, "top_n": 2, "return_documents": True}
    said = server.http.post("/v1/rerank", json=body).json()
    vectors = model.embed(["the code of red", "blue zam", "what"]).float().numpy()
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = vectors @ vectors[0]
    assert [one["index"] for one in said["results"]] == np.argsort(-scores, kind="stable")[:2].tolist()
    assert [one["relevance_score"] for one in said["results"]] == pytest.approx(sorted(scores)[::-1][:2], abs=1e-3)
    assert said["results"][0]["document"] == {"text": "the code of red"}
    assert said["scored_by"] == "cosine"


def test_tokens_go_there_and_back(server, model_id, model):
    text = "the code of red, سلام 👩‍👩‍👧"
    said = server.http.post("/v1/tokenize", json={"model": model_id, "prompt": text}).json()
    assert said == {"tokens": model.tokenizer.encode(text), "count": said["count"], "max_model_len": 512}
    back = server.http.post("/v1/detokenize", json={"model": model_id, "tokens": said["tokens"]}).json()
    assert back == {"prompt": text}
    chat = [{"role": "user", "content": "red"}]
    said = server.http.post("/v1/tokenize", json={"model": model_id, "messages": chat}).json()
    assert said["tokens"] == model.render(chat)
