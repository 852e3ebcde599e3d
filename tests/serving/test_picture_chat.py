"""Pictures over HTTP, through OpenAI's and Anthropic's own clients, with a small random model that sees."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from tests.inference.test_pictures import asking, write_seeing
from tests.serving.conftest import running_server

import craton
from craton.modalities.image import encode_png

openai = pytest.importorskip("openai")
anthropic = pytest.importorskip("anthropic")

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
OTHER = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_seeing(tmp_path_factory.mktemp("models") / "smolvlm")


@pytest.fixture(scope="module")
def server(folder, tiny_model):
    with running_server([folder, tiny_model]) as running:
        yield running


@pytest.fixture(scope="module")
def model(folder):
    return craton.load(folder, threads=1)


def encoded(pixels) -> str:
    return base64.b64encode(encode_png(pixels)).decode()


def ask(*urls: str, text: str = "What is this?") -> list:
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "auto"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ids(server) -> list[str]:
    return [one["id"] for one in server.http.get("/v1/models").json()["data"]]


def test_openai_and_anthropic_give_the_answer_of_the_model_in_process(server, folder, model):
    name = next(one for one in ids(server) if "smolvlm" in one)
    for pixels in (PIXELS, OTHER, PIXELS):
        expected = model.chat(asking(pixels, "What is this?"), max_tokens=12)
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        url = f"data:image/png;base64,{encoded(pixels)}"
        said = client.chat.completions.create(model=name, messages=ask(url), temperature=0, max_tokens=12)
        assert said.choices[0].message.content == expected.text
        assert said.usage.prompt_tokens == expected.prompt_tokens
        chunks = client.chat.completions.create(
            model=name, messages=ask(url), temperature=0, max_tokens=12, stream=True
        )  # fmt: skip
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected.text
        block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded(pixels)}}
        turn = {"role": "user", "content": [block, {"type": "text", "text": "What is this?"}]}
        other = anthropic.Anthropic(base_url=server.url, api_key="none")
        message = other.messages.create(model=name, messages=[turn], max_tokens=12, extra_body={"temperature": 0})
        assert message.content[0].text == expected.text
        count = other.messages.count_tokens(model=name, messages=[turn])
        assert count.input_tokens == expected.prompt_tokens
    assert server.settled(10)


def test_responses_show_pictures_too(server, model):
    name = next(one for one in ids(server) if "smolvlm" in one)
    expected = model.chat(asking(PIXELS, "What is this?"), max_tokens=12)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    picture = {"type": "input_image", "image_url": f"data:image/png;base64,{encoded(PIXELS)}", "detail": "auto"}
    given = [{"role": "user", "content": [picture, {"type": "input_text", "text": "What is this?"}]}]
    said = client.responses.create(model=name, input=given, temperature=0, max_output_tokens=12)
    assert said.output_text == expected.text
    assert said.usage.input_tokens == expected.prompt_tokens
    events = list(client.responses.create(model=name, input=given, temperature=0, max_output_tokens=12, stream=True))
    assert events[-1].response.output_text == expected.text
    further = [*given, {"role": "assistant", "content": said.output_text or "x"}, {"role": "user", "content": "Why?"}]
    assert client.responses.create(model=name, input=further, max_output_tokens=2).usage.input_tokens > 12


PNG_URL = {"image_url": "data:image/png;base64," + encoded(PIXELS)}


@pytest.mark.parametrize(
    ("role", "picture", "said"),
    [
        ("user", {"image_url": "https://example.com/cat.png"}, "not fetched here"),
        ("user", {"image_url": "data:image/png;base64,QUJD"}, "not a picture"),
        ("user", {"file_id": "file-1"}, "file_id"),
        ("user", {**PNG_URL, "file_id": "file-1"}, "file_id"),
        ("user", {"image_url": None, "file_id": None}, "image_url"),
        ("user", {**PNG_URL, "colour": "red"}, "colour"),
        ("system", PNG_URL, "only a user"),
        ("assistant", PNG_URL, "only a user"),
    ],
)
def test_bad_pictures_of_responses_are_400(server, role, picture, said):
    name = next(one for one in ids(server) if "smolvlm" in one)
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    given = [{"role": role, "content": [{"type": "input_image", **picture}]}]
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        client.responses.create(model=name, input=given)
    assert caught.value.param.split(".")[0] == "input"


@pytest.mark.parametrize(
    ("urls", "text", "said"),
    [
        (["https://example.com/cat.png"], "What?", "not fetched here"),
        (["data:image/png;base64,!"], "What?", "not base64"),
        (["data:image/png;base64,QUJD"], "What?", "not a picture"),
        (["data:image/png;base64," + encoded(PIXELS)] * 17, "What?", "at most 16"),
        (["data:image/png;base64," + encoded(PIXELS)], "What is <image>?", "2 places for 1 pictures"),
        ([], "What is <image>?", "1 places for 0 pictures"),
    ],
)
def test_bad_pictures_are_400(server, urls, text, said):
    name = next(one for one in ids(server) if "smolvlm" in one)
    answer = server.http.post("/v1/chat/completions", json={"model": name, "messages": ask(*urls, text=text)})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_model_that_does_not_see_says_so(server):
    name = next(one for one in ids(server) if "smolvlm" not in one)
    answer = server.http.post("/v1/chat/completions", json={"model": name, "messages": ask("https://example.com/a")})
    assert answer.status_code == 400
    assert "does not see" in answer.json()["error"]["message"]
    given = [{"role": "user", "content": [{"type": "input_image", **PNG_URL}]}]
    answer = server.http.post("/v1/responses", json={"model": name, "input": given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")
    assert "does not see" in answer.json()["error"]["message"]


def test_only_users_show_pictures(server):
    name = next(one for one in ids(server) if "smolvlm" in one)
    content = ask("data:image/png;base64," + encoded(PIXELS))[0]["content"]
    messages = [{"role": "system", "content": content}, {"role": "user", "content": "x"}]
    assert server.http.post("/v1/chat/completions", json={"model": name, "messages": messages}).status_code == 400
