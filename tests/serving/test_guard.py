"""Keys, the names that a server answers to, and what is open without a key."""

from __future__ import annotations

import http.client
import json
import os

import openai
import pytest

from craton.errors import CratonError, UsageError
from craton.serving.keys import KeyFile
from craton.serving.settings import ServeSettings, check_exposure


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> KeyFile:
    return KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")


@pytest.fixture(scope="module")
def key(keys) -> str:
    return keys.add("alice")


@pytest.fixture(scope="module")
def guarded(tiny_model, serving, keys, key):
    with serving([tiny_model], api_key_file=keys.path) as running:
        yield running


def raw_status(url: str, method: str, path: str, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.putrequest(method, path, skip_host="host" in {name.lower() for name in headers})
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    return connection.getresponse().status


def test_a_key_is_kept_as_a_hash_and_forgotten_when_removed(tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    text = keys.add("bob")
    assert text not in keys.path.read_text()
    assert os.stat(keys.path).st_mode & 0o077 == 0
    assert keys.caller_of(text).name == "bob"
    assert keys.caller_of(text[:-1]) is None
    assert keys.caller_of("") is None
    with pytest.raises(UsageError, match="already"):
        keys.add("bob")
    with pytest.raises(UsageError, match="no name"):
        keys.add("../x")
    keys.remove("bob")
    assert keys.caller_of(text) is None
    keys.path.write_text("{}{")
    with pytest.raises(CratonError, match="no file of keys"):
        keys.keys()


def test_a_key_has_a_rank_and_rights_and_keys_of_older_files_have_neither(tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    plain, ops = keys.add("plain"), keys.add("ops", priority=5, admin=True)
    found = keys.caller_of(ops)
    assert (found.name, found.priority, found.admin) == ("ops", 5, True)
    older = json.loads(keys.path.read_text())
    for key in older["keys"]:
        del key["priority"], key["admin"]
    keys.path.write_text(json.dumps(older))
    assert (keys.caller_of(plain).priority, keys.caller_of(ops).admin) == (0, False)
    with pytest.raises(UsageError, match="between -100 and 100"):
        keys.add("greedy", priority=101)


def test_keys_never_share_what_a_model_has_read(guarded, key, keys, model_id):
    other = keys.add("dave")
    body = {"model": model_id, "messages": [{"role": "user", "content": "red blue " * 40}], "max_tokens": 1}

    def cached(text: str) -> int:
        said = guarded.http.post("/v1/chat/completions", json=body, headers={"x-api-key": text}).json()
        return said["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached(key) == 0
    assert cached(key) > 0
    assert cached(other) == 0
    assert cached(other) > 0


def test_another_address_needs_keys(tmp_path):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UsageError, match="no keys"):
            check_exposure(ServeSettings(host=host))
    check_exposure(ServeSettings(host="::1"))
    check_exposure(ServeSettings(host="0.0.0.0", api_key_file=tmp_path / "keys.json"))


def test_both_clients_ways_of_giving_a_key_work(guarded, key):
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=key, max_retries=0)
    assert len(client.models.list().data) == 1
    assert guarded.http.get("/v1/models", headers={"x-api-key": key}).status_code == 200
    wrong = openai.OpenAI(
        base_url=f"{guarded.url}/v1", api_key=key[:-1] + ("B" if key.endswith("A") else "A"), max_retries=0
    )
    with pytest.raises(openai.AuthenticationError) as caught:
        wrong.models.list()
    assert caught.value.response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models",
        "/metrics",
        "/openapi.json",
        "/nowhere",
        "/v1/chat/completions",
        "/v1//models",
        "//v1/models",
        "/health/../v1/models",
        "/health/",
        "/health%2f..%2fv1%2fmodels",
        "/V1/models",
        "/v1/models?x=/health",
        "/v1/models#/health",
        "/health;/v1/models",
        "/%68ealth/x",
        "/v1/tokenize",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS", "TRACE"])
def test_every_path_but_two_needs_a_key(guarded, method, path):
    host = guarded.url.removeprefix("http://")
    assert raw_status(guarded.url, method, path, {"Host": host}) == 401
    tricks = {"X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/health", "Host": "health", "X-Forwarded-Prefix": "/x"}
    assert raw_status(guarded.url, method, path, tricks) == 401


def test_health_is_open_and_says_nothing_else(guarded):
    assert guarded.http.get("/health").json() == {"status": "ok"}
    assert guarded.http.get("/ready").status_code == 200


@pytest.mark.parametrize("given", ["Bearer", "Bearer ", "bearer x", "Basic eDp5", "é", "Bearer " + "x" * 60000])
def test_odd_keys_are_refused_and_nothing_breaks(guarded, given):
    status = raw_status(guarded.url, "GET", "/v1/models", {"Authorization": given.encode().decode("latin-1")})
    assert status in (401, 400, 431)


def test_a_removed_key_is_refused_by_the_running_server(guarded, keys):
    text = keys.add("carol")
    headers = {"authorization": f"Bearer {text}"}
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200
    keys.remove("carol")
    assert guarded.http.get("/v1/models", headers=headers).status_code == 401


def test_without_keys_only_the_machines_own_names_are_answered(server):
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "10.0.0.1"):
        assert raw_status(server.url, "GET", "/v1/models", {"Host": host}) in (400, 403)
    for host in ("localhost", "localhost:9", "127.0.0.1:80", "[::1]:8000"):
        assert raw_status(server.url, "GET", "/v1/models", {"Host": host}) == 200


def test_a_web_page_cannot_post_without_asking(server, model_id):
    body = json.dumps({"model": model_id, "prompt": "red"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        said = server.http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert said.status_code == 415
        assert "access-control-allow-origin" not in said.headers


def test_the_server_names_requests_itself(server, model_id):
    said = server.http.get("/v1/models", headers={"x-request-id": "mine"})
    assert "mine" not in said.headers.values()
    body = {"model": model_id, "prompt": "red"}
    ids = [server.http.post("/v1/tokenize", json=body).headers["x-request-id"] for _ in range(2)]
    assert len(set(ids)) == 2
    assert all(one.startswith("req_") for one in ids)
