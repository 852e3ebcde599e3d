"""Models that come and go in a running server: an admin key's loading and unloading, and a budget of memory."""

from __future__ import annotations

import asyncio
import threading
import time

import httpx
import pytest

from craton.errors import UsageError
from craton.serving.errors import ApiError
from craton.serving.keys import KeyFile
from craton.serving.models import Shelf
from craton.store import pull


@pytest.fixture(scope="module")
def home(tiny_model, tmp_path_factory):
    """A store with three models of the same weights."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATON_HOME", str(folder))
        for name in ("one", "two", "three"):
            pull(str(tiny_model), name=name)
        yield folder


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    keys = KeyFile(tmp_path_factory.mktemp("keys") / "keys.json")
    return keys, keys.add("ops", admin=True), keys.add("alice")


@pytest.fixture(scope="module")
def guarded(home, serving, keys):
    with serving(["one"], api_key_file=keys[0].path) as running:
        yield running


def post(running, key: str, path: str, body: object) -> httpx.Response:
    return httpx.post(f"{running.url}{path}", json=body, headers={"x-api-key": key}, timeout=300)


def ask(running, key: str, model: str, **fields) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "red"}], "max_tokens": 2, **fields}
    return post(running, key, "/v1/chat/completions", body)


def test_an_admin_loads_a_model_and_takes_it_away(guarded, keys):
    _, admin, alice = keys
    assert ask(guarded, alice, "two").status_code == 404
    said = post(guarded, admin, "/v1/models/load", {"model": "two"})
    assert (said.status_code, said.json()) == (200, {"id": "two", "object": "model", "loaded": True})
    assert ask(guarded, alice, "two").status_code == 200
    again = post(guarded, admin, "/v1/models/load", {"model": "two"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "model_loaded")
    said = post(guarded, admin, "/v1/models/unload", {"model": "two"})
    assert (said.status_code, said.json()["loaded"]) == (200, False)
    assert ask(guarded, alice, "two").status_code == 404
    assert post(guarded, admin, "/v1/models/unload", {"model": "two"}).status_code == 404
    assert ask(guarded, alice, "one").status_code == 200


@pytest.mark.parametrize("path", ["/v1/models/load", "/v1/models/unload"])
def test_only_an_admin_may(guarded, keys, server, model_id, path):
    said = post(guarded, keys[2], path, {"model": "one"})
    assert (said.status_code, said.json()["error"]["code"]) == (403, "admin_only")
    assert post(guarded, "wrong", path, {"model": "one"}).status_code == 401
    # A server without keys has no admin.
    assert server.http.post(path, json={"model": model_id}).status_code == 403
    assert ask(guarded, keys[2], "one").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"model": "tow"}, 404, "model"),
        ({"model": "../one"}, 404, "model"),
        ({"model": "/etc/passwd"}, 404, "model"),
        ({"model": "hf:org/name"}, 404, "model"),
        ({"model": "PATH"}, 404, "model"),
        ({"model": "one@v9"}, 404, "model"),
        ({"model": ""}, 400, "model"),
        ({"model": 3}, 400, "model"),
        ({"model": "x" * 300}, 400, "model"),
        ({"model": "two", "path": "/tmp"}, 400, "path"),
        ({}, 400, "model"),
    ],
)
def test_only_names_of_the_store_lead_anywhere(guarded, keys, tiny_model, body, status, field):
    body = {**body, "model": str(tiny_model)} if body.get("model") == "PATH" else body
    said = post(guarded, keys[1], "/v1/models/load", body)
    assert said.status_code == status
    assert field in (said.json()["error"]["param"] or said.json()["error"]["message"])
    listed = httpx.get(f"{guarded.url}/v1/models", headers={"x-api-key": keys[1]}).json()["data"]
    assert [entry["id"] for entry in listed] == ["one"]


def test_a_model_that_writes_is_unloaded_when_its_answer_is_written(guarded, keys, slow_engine):
    slow_engine(0.01)
    _, admin, alice = keys
    assert post(guarded, admin, "/v1/models/load", {"model": "three"}).status_code == 200
    ended: list[str] = []

    def write() -> None:
        said = ask(guarded, alice, "three", max_tokens=300, guided_regex="[a-z]{2000}")
        ended.append("answer" if said.json()["usage"]["completion_tokens"] == 300 else said.text)

    def unload() -> None:
        said = post(guarded, admin, "/v1/models/unload", {"model": "three"})
        ended.append("unloaded" if said.status_code == 200 else said.text)

    place = guarded.state.shelf._places["three"]
    writer, unloader = threading.Thread(target=write), threading.Thread(target=unload)
    writer.start()
    while guarded.state.worker.running == 0:
        time.sleep(0.002)
    unloader.start()
    while "three" in guarded.state.shelf._places:
        time.sleep(0.002)
    assert ask(guarded, alice, "three").status_code == 404
    assert post(guarded, admin, "/v1/models/load", {"model": "three"}).status_code == 409
    assert place.served is not None
    writer.join()
    unloader.join()
    assert sorted(ended) == ["answer", "unloaded"]  # both were sent at once: who hears first is not the server's doing
    assert place.served is None


def test_the_model_that_was_used_longest_ago_makes_room(home, serving):
    with serving(["one", "two", "three"], load="use", memory="1GB") as running:
        shelf = running.state.shelf

        def use(name: str) -> list[str]:
            assert ask(running, "", name).status_code == 200
            return [name for name, _, loaded in shelf.listing if loaded]

        use("one")
        held = shelf._places["one"].nbytes
        shelf._memory = 3 * held - 1  # two of them, with what they have read
        assert use("two") == ["one", "two"]
        use("one")
        assert use("three") == ["one", "three"]
        assert use("two") == ["two", "three"]
        assert running.http.get("/ready").status_code == 200


def test_a_model_in_use_is_never_unloaded_and_numbers_say_why_there_is_no_room(home, serving):
    with serving(["one", "two"], load="use", memory="1GB") as running:
        shelf = running.state.shelf
        place = shelf._places["one"]
        assert ask(running, "", "one").status_code == 200
        shelf._memory = place.nbytes + place.nbytes // 2
        place.users += 1
        said = ask(running, "", "two")
        assert (said.status_code, said.json()["error"]["code"]) == (503, "memory_full")
        assert "GB" in said.json()["error"]["message"]
        assert int(said.headers["retry-after"]) > 0
        assert place.served is not None
        place.users -= 1
        assert ask(running, "", "two").status_code == 200
        assert place.served is None
        shelf._memory = 1000
        said = ask(running, "", "one")
        assert (said.status_code, said.json()["error"]["code"]) == (503, "model_too_large")
        assert "1e-06 GB" in said.json()["error"]["message"]


def test_what_has_no_room_at_the_start_waits_for_its_first_use(home, serving):
    with serving(["one"]) as running:
        held = running.state.shelf._places["one"].nbytes
    with serving(["one", "two"], memory=f"{held * 3 // 2}B") as running:
        assert [loaded for _, _, loaded in running.state.shelf.listing] == [True, False]
        assert running.state.ready
        assert ask(running, "", "two").status_code == 200
        assert [loaded for _, _, loaded in running.state.shelf.listing] == [False, True]
    with pytest.raises(UsageError, match=r"takes .* GB"), serving(["one"], memory="1KB"):
        pass


class Worker:
    """Does everything at once, and loads as slowly as a test wants."""

    async def call(self, function):
        await asyncio.sleep(0.01)
        return function()


def test_a_caller_who_leaves_while_a_model_is_loaded_leaves_it_to_the_others(home, monkeypatch):
    loads: list[str] = []

    def load(shelf, place):
        loads.append(place.id)
        return object(), 5

    monkeypatch.setattr(Shelf, "_load", load)

    async def body() -> None:
        shelf = Shelf(["one"], Worker())
        first = asyncio.create_task(shelf.borrow("one"))
        second = asyncio.create_task(shelf.borrow("one"))
        await asyncio.sleep(0)
        first.cancel()
        place = await second
        assert (loads, place.users) == (["one"], 1)
        shelf.give_back(place)
        with pytest.raises(ApiError, match="no model"):
            await shelf.borrow("two")

    asyncio.run(body())
