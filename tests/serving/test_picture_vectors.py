"""`/v1/embeddings` with models that see: pictures and texts in the forms that clients send, and what is refused."""

from __future__ import annotations

import base64
import json
import shutil
import threading
import time

import httpx
import numpy as np
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse
from tests.serving.conftest import running_server

from craton.checkpoints.checkpoint import Checkpoint
from craton.checkpoints.save import save_preprocessing
from craton.finetuning.adapter_files import save_adapter
from craton.finetuning.adapters import LoraSettings
from craton.finetuning.loading import load_images as load_adapted
from craton.finetuning.lora import apply_lora
from craton.inference.images import load_images
from craton.modalities.image import encode_png
from craton.serving.keys import KeyFile
from craton.store import pull

RNG = np.random.default_rng(0)
SHAPES = ((30, 40, 3), (50, 25, 3), (24, 24, 3))
PIXELS = [RNG.integers(0, 256, shape, dtype=np.uint8) for shape in SHAPES]
FILES = [base64.b64encode(encode_png(pixels)).decode() for pixels in PIXELS]
URLS = [f"data:image/png;base64,{file}" for file in FILES]
PICTURE_TOKENS = {"clip": 10, "siglip": 9, "vit": 10, "dinov3": 12}  # nine patches, and what stands before them


@pytest.fixture(scope="module")
def server(seeing_folders, tiny_model):
    with running_server([*seeing_folders.values(), tiny_model]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="module")
def models(seeing_folders):
    return {name: load_images(folder, threads=1) for name, folder in seeing_folders.items()}


def vectors(said: CreateEmbeddingResponse) -> np.ndarray:
    assert [one.index for one in said.data] == list(range(len(said.data)))
    return np.array([one.embedding for one in said.data], dtype=np.float32)


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "dinov3"])
def test_pictures_get_the_vectors_of_the_model_in_process(client, models, name):
    expected = models[name].embed_images(PIXELS).numpy()
    given = [{"image": url} for url in URLS]
    floats = client.embeddings.create(model=name, input=given, encoding_format="float")
    assert np.allclose(vectors(floats), expected, atol=1e-5)
    assert np.allclose(vectors(client.embeddings.create(model=name, input=given)), expected, atol=1e-5)  # base64
    assert floats.usage.prompt_tokens == floats.usage.total_tokens == 3 * PICTURE_TOKENS[name]
    fewer = vectors(client.embeddings.create(model=name, input=given, dimensions=8, encoding_format="float"))
    assert np.allclose(fewer, expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_texts_and_pictures_of_one_request_keep_their_order(client, models, name):
    texts, model = ["A Cat", "a dog on a boat"], models[name]
    read, seen = model.embed(texts).numpy(), model.embed_images(PIXELS[:2]).numpy()
    said = client.embeddings.create(
        model=name,
        input=[texts[0], {"image": URLS[0]}, {"text": texts[1]}, {"image": URLS[1]}],
        encoding_format="float",
    )
    assert np.allclose(vectors(said), [read[0], seen[0], read[1], seen[1]], atol=1e-5)
    counts = sum(len(text) + 2 for text in texts)  # a token for each letter, and one at either end
    assert said.usage.prompt_tokens == counts + 2 * PICTURE_TOKENS[name]
    assert np.allclose(vectors(client.embeddings.create(model=name, input=texts[1])), read[1:], atol=1e-5)
    many = [f"a cat and {'a' * i}" for i in range(30)]
    assert np.allclose(vectors(client.embeddings.create(model=name, input=many)), model.embed(many), atol=1e-5)


def test_the_forms_that_clients_send(client, models):
    seen, read = models["clip"].embed_images(PIXELS[:1]).numpy(), models["clip"].embed("a cat").numpy()
    for given in ([{"image": FILES[0]}], [URLS[0]], URLS[0], [{"text": URLS[0]}], [{"image": URLS[0], "text": None}]):
        assert np.allclose(vectors(client.embeddings.create(model="clip", input=given)), seen, atol=1e-5)
    picture = {"type": "image_url", "image_url": {"url": URLS[0], "detail": "auto"}}
    for content, expected in (([picture], seen), ([{"type": "text", "text": "a cat"}], read), ("a cat", read)):
        body = {"model": "clip", "messages": [{"role": "user", "content": content}], "encoding_format": "float"}
        said = client.post("/embeddings", cast_to=CreateEmbeddingResponse, body=body)  # as vLLM's examples do
        assert np.allclose(vectors(said), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        ("dinov3", ["a cat"], "reads no text"),
        ("vit", [{"image": URLS[0]}, {"text": "a cat"}], "reads no text"),
        ("clip", ["a" * 60], "[0] has 62 tokens; clip reads 1 to 50"),
        ("clip", [{"image": URLS[0]}, "a" * 60], "[1] has 62 tokens"),
        ("clip", [{"image": "https://example.com/cat.png"}], "[0]: pictures are not fetched here"),
        ("clip", [{"image": URLS[0]}, {"image": "cat.png"}], "[1]: the picture is not base64"),
        ("clip", [{"image": "file:///etc/passwd"}], "not fetched here"),
        ("clip", [{"image": "data:text/plain;base64,QUJD"}], "no picture"),
        ("clip", [{"image": "QUJD"}], "not a picture"),
        ("clip", [{"image": URLS[0][:300]}], "[0]: the picture"),
        ("clip", [{"image": URLS[0]}] * 17, "17 pictures, and at most 16"),
        ("clip", [{"image": URLS[0], "text": "a cat"}], "either a text or an image"),
        ("clip", [{}], "either a text or an image"),
        ("clip", [{"image": ""}], "at least 1 character"),
        ("clip", [{"bytes": FILES[0]}], "bytes"),
        ("clip", ["cat"] * 257, "at most 256"),
        ("TINY", [{"image": URLS[0]}], "makes no vectors of pictures"),
    ],
)
def test_what_cannot_be_seen_or_read_is_a_400_that_names_it(client, tiny_model, model, given, said):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model=tiny_model.name if model == "TINY" else model, input=given)
    assert caught.value.param.split(".")[0] == "input"
    assert said in caught.value.message


def test_messages_are_one_text_or_one_picture_for_a_model_that_sees(server, tiny_model):
    picture, text = {"type": "image_url", "image_url": {"url": URLS[0]}}, {"type": "text", "text": "a cat"}
    turn = {"role": "user", "content": [picture]}
    for body in (
        {"model": "clip"},
        {"model": "clip", "input": "a cat", "messages": [turn]},
        {"model": "clip", "messages": [turn, turn]},
        {"model": "clip", "messages": [{"role": "user", "content": [picture, text]}]},
        {"model": "clip", "messages": [{"role": "assistant", "content": "a cat"}]},
        {"model": "clip", "messages": [{"role": "user", "content": ""}]},
        {"model": "clip", "messages": [{"role": "user", "content": []}]},
        {"model": "dinov3", "messages": [{"role": "user", "content": "a cat"}]},
        {"model": tiny_model.name, "messages": [{"role": "user", "content": "a cat"}]},
    ):
        answer = server.http.post("/v1/embeddings", json=body)
        assert answer.status_code == 400, body
        assert answer.json()["error"]["param"].split(".")[0] in ("input", "messages")


def test_addresses_are_checked_as_those_of_chats_are(seeing_folders):
    with running_server([seeing_folders["dinov3"]], image_urls="https") as running:
        for url, said in (("https://127.0.0.1/a.png", "not a public one"), ("http://example.com/a.png", "https alone")):
            body = {"model": "dinov3", "input": [{"image": url}]}
            answer = running.http.post("/v1/embeddings", json=body)
            assert answer.status_code == 400
            assert said in answer.json()["error"]["message"]


def test_documents_are_ranked_by_what_reads(server, models):
    body = {"model": "clip", "query": "a cat", "documents": ["a dog", "a cat"]}
    said = server.http.post("/v1/rerank", json=body).json()
    assert said["results"][0] == {"index": 1, "relevance_score": pytest.approx(1, abs=1e-5)}
    refused = server.http.post("/v1/rerank", json={**body, "model": "vit"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "documents")


def test_it_is_listed_and_what_it_cannot_do_says_where_to_ask(server):
    assert {"clip", "siglip", "vit", "dinov3"} <= {one["id"] for one in server.http.get("/v1/models").json()["data"]}
    chat = [{"role": "user", "content": "a cat"}]
    shown = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": URLS[0]}}]}]
    for path, body in (
        ("chat/completions", {"messages": chat}),
        ("chat/completions", {"messages": shown}),
        ("completions", {"prompt": "a cat"}),
        ("responses", {"input": "a cat"}),
        ("messages", {"messages": chat, "max_tokens": 4}),
        ("messages/count_tokens", {"messages": chat}),
        ("tokenize", {"prompt": "a cat"}),
        ("detokenize", {"tokens": [1]}),
    ):
        for name in ("clip", "dinov3"):
            answer = server.http.post(f"/v1/{path}", json={"model": name, **body})
            assert answer.status_code == 400, (path, answer.text)
            assert "/v1/embeddings" in answer.json()["error"]["message"], path
    form = {"model": (None, "clip"), "file": ("a.wav", b"RIFF")}
    answer = server.http.post("/v1/audio/transcriptions", files=form)
    assert answer.status_code == 400
    assert "/v1/embeddings" in answer.json()["error"]["message"]


def test_pictures_are_seen_while_an_answer_is_written(server, client, models, tiny_model):
    found: list[np.ndarray] = []

    def embed() -> None:
        for _ in range(3):
            said = client.embeddings.create(model="clip", input=[{"image": url} for url in URLS * 5])
            found.append(vectors(said))

    thread = threading.Thread(target=embed)
    asked = {"model": tiny_model.name, "messages": [{"role": "user", "content": "red"}], "temperature": 0}
    alone = client.chat.completions.create(**asked, max_tokens=200)
    thread.start()
    beside = client.chat.completions.create(**asked, max_tokens=200)
    thread.join()
    assert beside.choices[0].message.content == alone.choices[0].message.content
    expected = models["clip"].embed_images(PIXELS * 5).numpy()
    assert len(found) == 3
    assert all(np.allclose(one, expected, atol=1e-5) for one in found)
    assert server.settled(10)


def test_pictures_that_keep_their_sizes(seeing_folders, tmp_path):
    folder = shutil.copytree(seeing_folders["vit"], tmp_path / "free")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_resize": False, "do_center_crop": False}))
    sizes = ((24, 32), (32, 24), (24, 32))
    pixels = [RNG.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]

    def given(*pictures: np.ndarray) -> dict:
        items = [{"image": base64.b64encode(encode_png(one)).decode()} for one in pictures]
        return {"model": "free", "input": items}

    with running_server([folder]) as running:
        said = running.http.post("/v1/embeddings", json=given(*pixels)).json()
        model = load_images(folder, threads=1)
        for one, item in zip(pixels, said["data"], strict=True):
            assert np.allclose(item["embedding"], model.embed_images([one])[0], atol=1e-5)
        assert said["usage"]["prompt_tokens"] == 3 * 13
        for size, words in (((520, 520), "4226 patches"), ((25, 24), "whole patches")):
            answer = running.http.post("/v1/embeddings", json=given(np.zeros((*size, 3), np.uint8)))
            assert answer.status_code == 400
            assert words in answer.json()["error"]["message"]


def test_an_adapter_is_merged_into_its_base(seeing_folders, tmp_path):
    checkpoint, folder = Checkpoint.open(seeing_folders["dinov3"]), tmp_path / "adapted"
    module = checkpoint.load(torch.float32)
    apply_lora(module, LoraSettings(rank=2))
    for weight in module.parameters():
        if weight.requires_grad:  # the adapter's alone
            torch.nn.init.normal_(weight)
    save_adapter(module, checkpoint.family, folder, base=str(seeing_folders["dinov3"]))
    save_preprocessing(load_images(seeing_folders["dinov3"]).preprocessing, folder)
    with running_server([folder]) as running:
        said = running.http.post("/v1/embeddings", json={"model": "adapted", "input": [{"image": FILES[0]}]}).json()
    [adapted] = load_adapted(folder, threads=1).embed_images(PIXELS[:1]).numpy()
    [base] = load_images(seeing_folders["dinov3"], threads=1).embed_images(PIXELS[:1]).numpy()
    assert np.allclose(said["data"][0]["embedding"], adapted, atol=1e-5)
    assert not np.allclose(base, adapted, atol=1e-2)


def test_it_comes_and_goes_as_other_models_do(seeing_folders, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CRATON_HOME", str(tmp_path / "home"))
    pull(str(seeing_folders["clip"]), name="eye")
    pull(str(seeing_folders["dinov3"]), name="other")
    pull(str(tiny_model), name="talker")
    keys = KeyFile(tmp_path / "keys.json")
    headers = {"x-api-key": keys.add("ops", admin=True)}

    def post(running, path: str, body: dict) -> httpx.Response:
        return httpx.post(f"{running.url}/v1/{path}", json=body, headers=headers, timeout=300)

    def see(running, name: str) -> httpx.Response:
        said = post(running, "embeddings", {"model": name, "input": [{"image": FILES[0]}]})
        until = time.monotonic() + 30
        # A client may have its answer a moment before the model is given back, and what is in use is not unloaded.
        while any(place.users for place in running.state.shelf._places.values()) and time.monotonic() < until:
            time.sleep(0.002)
        return said

    with running_server(["talker"], api_key_file=keys.path, memory="1GB") as running:
        shelf = running.state.shelf
        assert see(running, "eye").status_code == 404
        assert post(running, "models/load", {"model": "eye"}).status_code == 200
        assert see(running, "eye").status_code == 200
        assert post(running, "models/load", {"model": "other"}).status_code == 200
        held = {name: shelf._places[name].nbytes for name in ("eye", "other")}
        assert all(nbytes > 10_000 for nbytes in held.values())
        assert post(running, "models/unload", {"model": "talker"}).status_code == 200
        shelf._memory = sum(held.values()) - 1  # room for either, not for both
        assert see(running, "eye").status_code == 200
        shelf._places["other"].served = None
        assert see(running, "other").status_code == 200
        assert [name for name, _, loaded in shelf.listing if loaded] == ["other"]
        assert see(running, "eye").status_code == 200
        assert [name for name, _, loaded in shelf.listing if loaded] == ["eye"]
        assert post(running, "models/unload", {"model": "eye"}).status_code == 200
        assert see(running, "eye").status_code == 404


@pytest.mark.slow
def test_schemathesis_finds_no_fault(server):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")["/v1/embeddings"]["POST"]
    codes: dict[int, int] = {}

    @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def run(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "clip"
        response = case.call(timeout=300)
        codes[response.status_code] = codes.get(response.status_code, 0) + 1
        assert response.status_code < 500, (case.body, response.text)

    run()
    assert set(codes) >= {200, 400}, codes
