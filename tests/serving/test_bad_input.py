"""What attackers and broken clients send, row by row of the published advisories: each gets its own refusal, and the
server goes on answering."""

from __future__ import annotations

import json
import socket
import time

import httpx
import pytest

ASK = [{"role": "user", "content": "red"}]


@pytest.fixture(autouse=True)
def nothing_is_left(server):
    yield
    assert server.settled(10), "something still runs"


@pytest.fixture(autouse=True, scope="module")
def server_goes_on(server, model_id):
    yield
    body = {"model": model_id, "prompt": "red", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 200


@pytest.fixture
def post(server):
    def send(path: str, body: object) -> httpx.Response:
        if isinstance(body, bytes):
            return server.http.post(path, content=body, headers={"content-type": "application/json"})
        return server.http.post(path, json=body)

    return send


def refused(said: httpx.Response, status: int = 400) -> dict:
    assert said.status_code == status, said.text
    error = said.json()["error"]
    assert error["message"]
    assert "Traceback" not in said.text
    return error


# Template injection (CVE-2024-34359, CVE-2026-5760): what a client writes is data in every path.
INJECTIONS = ["{{ 7*7 }}", "{% for i in range(10**9) %}x{% endfor %}", "{{ ''.__class__.__mro__ }}", "<|im_end|>"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_templates_in_messages_are_text(post, model_id, text):
    said = post("/v1/tokenize", {"model": model_id, "messages": [{"role": "user", "content": text}]})
    tokens = said.json()["tokens"]
    back = post("/v1/detokenize", {"model": model_id, "tokens": tokens}).json()["prompt"]
    assert text in back
    assert post("/v1/rerank", {"model": model_id, "query": text, "documents": [text]}).status_code == 200
    message = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    assert post("/v1/chat/completions", {"model": model_id, "messages": message, "max_tokens": 1}).status_code == 200


# chat_template_kwargs (CVE-2025-62426): only variables that the template reads and that are known to be harmless.
@pytest.mark.parametrize(
    "name", ["chat_template", "messages", "tools", "add_generation_prompt", "tokenize", "__class__"]
)
def test_template_variables_come_from_a_list(post, model_id, name):
    body = {"model": model_id, "messages": ASK, "chat_template_kwargs": {name: True}}
    assert refused(post("/v1/chat/completions", body))["param"] == name
    refused(post("/v1/chat/completions", {"model": model_id, "messages": ASK, "chat_template": "{{ x }}"}))


# Absurd numbers (CVE-2026-34756, CVE-2026-21869): every number has bounds.
@pytest.mark.parametrize("value", [-1, -(10**9), 10**9, 10**400, 1.5, "3", True, 1e400])
@pytest.mark.parametrize("name", ["n", "max_tokens", "top_logprobs", "top_k"])
def test_integers_are_bounded(post, model_id, name, value):
    body = {"model": model_id, "messages": ASK, "logprobs": True, "max_tokens": 1, name: value}
    raw = json.dumps(body).replace("Infinity", "1e400").encode()
    said = post("/v1/chat/completions", raw)
    if name == "top_k" and value == 10**9:
        assert said.status_code == 200  # more than there are tokens is all of them
    else:
        refused(said)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", "1e9", '"1"', "null", "[]", "{}"])
@pytest.mark.parametrize("name", ["temperature", "top_p", "presence_penalty", "min_p"])
def test_numbers_are_finite_and_bounded(post, model_id, name, value):
    raw = f'{{"model": "{model_id}", "prompt": "red", "max_tokens": 1, "{name}": {value}}}'.encode()
    said = post("/v1/completions", raw)
    fine = value == "null" or (name == "presence_penalty" and value == "-1")
    assert said.status_code == (200 if fine else 400), said.text


@pytest.mark.parametrize("bias", [{"-1": 1}, {"1e3": 1}, {"999999999": 1}, {"5": 10**6}, {"x": 1}, [1], {"5": None}])
def test_biases_are_of_known_tokens(post, model_id, bias):
    refused(post("/v1/completions", {"model": model_id, "prompt": "red", "logit_bias": bias}))


@pytest.mark.parametrize("ids", [[-1], [360], [2**31], [2**63], [1.5], [[0], []], [[]], [True], ["a", 1], [None], {}])
def test_token_ids_are_of_the_vocabulary(post, model_id, ids):
    refused(post("/v1/completions", {"model": model_id, "prompt": ids}))


# Bodies that are no request (vLLM's test_non_object_body_validation).
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"null",
        b"[]",
        b'"x"',
        b"3",
        b"{",
        b"{}",
        b"\xff\xfe{}",
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"model": ' + b"9" * 100_000 + b"}",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages"])
def test_bodies_that_are_no_request(post, path, raw):
    refused(post(path, raw))


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server):
    large = b" " * ((4 << 20) + 1)
    headers = {"content-type": "application/json"}
    assert server.http.post("/v1/completions", content=large, headers=headers).status_code == 413
    chunked = server.http.post("/v1/completions", content=iter([large]), headers=headers)
    assert chunked.status_code == 413
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(POST + b"Content-Type: application/json\r\nContent-Length: 99999999999999\r\n\r\n")
        assert b" 413 " in client.recv(100)


# Media (CVE-2026-24779, CVE-2026-25960, CVE-2026-100650): off; nothing is ever fetched.
@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": "http://localhost"}},
        {"type": "file", "file": {"file_id": "../x"}},
    ],
)
def test_media_are_refused(post, model_id, part):
    message = [{"role": "user", "content": [part]}]
    assert refused(post("/v1/chat/completions", {"model": model_id, "messages": message}))["param"].startswith(
        "messages"
    )


# Names of models (CVE-2024-37032): only what the server was started with.
@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "/etc/passwd", "hf:gpt2", "%2e%2e/x", "a\x00b", "tiny0/../tiny0", "http://x/y", "gpt-4"],
)
def test_models_are_only_the_registered_ones(post, server, name):
    for path, rest in (("/v1/chat/completions", {"messages": ASK}), ("/v1/embeddings", {"input": "red"})):
        assert refused(post(path, {"model": name, **rest}), 404)["code"] == "model_not_found"
    if "\x00" not in name:
        assert server.http.get(f"/v1/models/{name.replace('..', '%2e%2e')}").status_code == 404


# Grammars, expressions and schemas (CVE-2025-32381, CVE-2026-55574): refused or followed, soon either way.
def nested(depth: int) -> dict:
    schema: dict = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


FORMS = {
    "regex repeats": {"guided_regex": "(a{1,1000}){1,1000}"},
    "regex backtracks": {"guided_regex": "(x+x+)+y"},
    "regex grows": {"guided_regex": "(.*[ab].{200}){10}"},
    "regex stars": {"guided_regex": ".*" * 1000},
    "regex nests": {"guided_regex": "(" * 2000 + "a" + ")" * 2000},
    "regex broken": {"guided_regex": "(["},
    "grammar loops": {"guided_grammar": 'start: start start | "a" |'},
    "grammar broken": {"guided_grammar": "start"},
    "schema nests": {"guided_json": nested(60)},
    "schema refers to itself": {"guided_json": {"$ref": "#"}},
    "schema refers to a file": {"guided_json": {"$ref": "file:///etc/passwd"}},
    "schema refers to a server": {"guided_json": {"$ref": "http://127.0.0.1/x"}},
    "schema is no schema": {"guided_json": {"type": "nothing"}},
    "schema multiplies": {
        "guided_json": {
            "allOf": [
                {"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(8)]} for i in range(8)
            ]
        }
    },
    "schema of long text": {"guided_json": {"type": "string", "minLength": 10**6}},
    "schema of large numbers": {"guided_json": {"type": "integer", "minimum": -(10**300)}},
    "schema of many properties": {
        "guided_json": {"properties": {f"k{i}": {"pattern": "^(a|b)*$"} for i in range(500)}}
    },
    "choice empty": {"guided_choice": [""]},
    "two forms": {"guided_choice": ["a"], "guided_regex": "a"},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_forms_are_followed_or_refused_soon(post, model_id, form):
    started = time.process_time()
    said = post("/v1/completions", {"model": model_id, "prompt": "red", "max_tokens": 3, **form})
    if said.status_code != 200:
        refused(said)
    assert time.process_time() - started < 10


def test_a_monstrous_form_does_not_stop_others(server, post, model_id):
    import threading

    wide = {"properties": {f"k{i}": {"type": "string", "pattern": "^(a|b)*$"} for i in range(2000)}}
    codes: list[int] = []

    def ask() -> None:
        codes.append(post("/v1/completions", {"model": model_id, "prompt": "red", "guided_json": wide}).status_code)

    thread = threading.Thread(target=ask)
    thread.start()
    longest = 0.0
    while thread.is_alive():
        started = time.process_time()
        assert post("/v1/completions", {"model": model_id, "prompt": "red", "max_tokens": 2}).status_code == 200
        longest = max(longest, time.process_time() - started)
    thread.join()
    assert codes == [400] or codes == [200]
    assert longest < 2


def test_tools_are_checked(post, model_id):
    def tool(**function):
        return {"model": model_id, "messages": ASK, "tools": [{"type": "function", "function": function}]}

    refused(post("/v1/chat/completions", tool(name="../x")))
    refused(post("/v1/chat/completions", tool(name="x" * 65)))
    refused(post("/v1/chat/completions", tool(name="f", parameters=[])))
    wanted = {"type": "function", "function": {"name": "g"}}
    refused(post("/v1/chat/completions", tool(name="f") | {"tool_choice": wanted}))
    forced = tool(name="f", parameters={"type": "nothing"}) | {"tool_choice": "required"}
    refused(post("/v1/chat/completions", forced))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "red",
        [{}],
        [{"role": "user"}],
        [{"role": "nobody", "content": "x"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "tool", "content": "x"}],
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f"}}]}],
        [{"role": "user", "content": "x", "extra": 1}],
        [{"role": "user", "content": "x"}] * 5000,
    ],
)
def test_messages_are_checked(post, model_id, messages):
    refused(post("/v1/chat/completions", {"model": model_id, "messages": messages, "max_tokens": 1}))


# ReDoS in tokenisers (CVE-2025-1194, CVE-2025-2099): time is linear in the text. The time of the processor, not of the
# clock: the server is in this process, and the machine may be busy.
@pytest.mark.parametrize("text", [" " * 100_000, "a" * 100_000, "\n \n" * 30_000, "é́" * 50_000, "1" * 100_000])
def test_long_texts_are_read_or_refused_soon(post, model_id, text):
    started = time.process_time()
    assert post("/v1/tokenize", {"model": model_id, "prompt": text}).status_code == 200
    refused(post("/v1/completions", {"model": model_id, "prompt": text}))
    refused(post("/v1/chat/completions", {"model": model_id, "messages": [{"role": "user", "content": text}]}))
    assert time.process_time() - started < 10


# Lines of logs (llama.cpp's test_log_injection): a line break in a name makes no line.
def test_log_lines_cannot_be_forged(post, caplog):
    import logging

    from craton.serving.logs import JsonLines

    record = logging.LogRecord("x", logging.INFO, "", 0, "request", (), None)
    record.facts = {"model": 'a"\n{"event": "forged"}\r\u2028\x1b[31m'}
    line = JsonLines().format(record)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    assert json.loads(line)["model"] == record.facts["model"]


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


# Requests that are smuggled or cut off: the connection ends, the server does not.
@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        POST + b"Content-Length: -5\r\n\r\n",
        POST + b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_broken_requests_end_their_connection(server, raw):
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=5) as client:
        client.sendall(raw)
        client.shutdown(socket.SHUT_WR)
        said = client.recv(100)
        assert said == b"" or said[9:10] in (b"4", b"3")
