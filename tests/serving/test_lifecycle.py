"""Clients that leave, queues that fill, time that runs out, and servers that stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from craton.errors import DeadlineExceeded
from craton.serving.admission import Gate
from craton.serving.errors import from_craton
from craton.serving.keys import KeyFile

# Long enough that no test waits for its end, and of a form that never ends by itself.
LONG = {"max_tokens": 450, "guided_regex": "[a-z]{2000}"}


def chat(model_id: str, **fields) -> dict:
    return {"model": model_id, "messages": [{"role": "user", "content": "red"}], **fields}


def endless(model_id: str, **fields) -> dict:
    return chat(model_id, **LONG, **fields)


def test_a_client_that_leaves_a_stream_frees_its_slot(server, model_id, slow_engine):
    slow_engine(0.02)
    before = server.metric("craton_disconnects_total")
    with server.http.stream("POST", "/v1/chat/completions", json=endless(model_id, stream=True)) as said:
        next(said.iter_lines())
        assert server.state.worker.running == 1
    assert server.settled(5.0)  # the whole answer would take longer
    assert server.metric("craton_disconnects_total") == before + 1


def test_a_client_that_leaves_before_its_answer_frees_its_slot(server, model_id, slow_engine):
    slow_engine(0.02)
    with pytest.raises(httpx.TimeoutException):
        httpx.post(f"{server.url}/v1/chat/completions", json=endless(model_id), timeout=httpx.Timeout(10, read=0.1))
    assert server.settled(5.0)


def test_a_slow_reader_is_cut_off_and_blocks_nobody(tiny_model, model_id, serving):
    with serving([tiny_model], send_buffer=16) as running:
        # Nothing is read of this stream, and the kernel holds little of it.
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        body = json.dumps(endless(model_id, stream=True, n=16, logprobs=True, top_logprobs=20)).encode()
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", "", ""]
        client.sendall("\r\n".join(lines).encode() + body)
        deadline = time.monotonic() + 30
        while running.state.worker.running == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        said = running.http.post("/v1/chat/completions", json=chat(model_id, max_tokens=4))
        assert said.status_code == 200
        assert running.settled(30), "the server still waits for a client that does not read"
        client.close()


def test_a_full_queue_refuses_with_a_time_to_wait(tiny_model, model_id, serving):
    with serving([tiny_model], concurrency=1, queue=1) as running:
        codes: list[int] = []

        def ask() -> None:
            codes.append(
                httpx.post(
                    f"{running.url}/v1/chat/completions", json=chat(model_id, **LONG | {"max_tokens": 150}), timeout=300
                ).status_code
            )

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        while running.state.gate.waiting < 1:
            time.sleep(0.005)
        said = running.http.post("/v1/chat/completions", json=chat(model_id))
        assert said.status_code == 429
        assert 1 <= int(said.headers["retry-after"]) <= 60
        assert said.json()["error"]["type"] == "rate_limit_error"
        assert running.http.post("/v1/tokenize", json={"model": model_id, "prompt": "red"}).status_code == 200
        for thread in threads:
            thread.join()
        assert codes == [200, 200]


def test_a_batch_does_not_keep_others_waiting(server, model_id, slow_engine):
    slow_engine(0.01)
    batch = {"model": model_id, "prompt": ["red"] * 40, "max_tokens": 40, "guided_regex": "[a-z]{2000}"}
    done: list[str] = []

    def ask_batch() -> None:
        assert server.http.post("/v1/completions", json=batch).status_code == 200
        done.append("batch")

    thread = threading.Thread(target=ask_batch)
    thread.start()
    while server.state.worker.running < 40:
        time.sleep(0.002)
    said = server.http.post("/v1/completions", json={"model": model_id, "prompt": "red", "max_tokens": 4, "n": 2})
    done.append("single")
    thread.join()
    assert done == ["single", "batch"]
    usage = said.json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]


def test_time_runs_out_with_an_error_in_both_forms(tiny_model, model_id, serving, slow_engine):
    slow_engine(0.02)
    with serving([tiny_model], request_timeout=0.05) as running:
        said = running.http.post("/v1/chat/completions", json=endless(model_id))
        assert said.status_code == 504
        assert said.json()["error"]["code"] == "timeout"
        streamed = running.http.post("/v1/chat/completions", json=endless(model_id, stream=True))
        assert '"code": "timeout"' in streamed.text or streamed.status_code == 504
        assert running.settled(5.0)


def test_the_engine_is_told_by_when_who_and_for_whom(tiny_model, model_id, serving, tmp_path, monkeypatch):
    keys = KeyFile(tmp_path / "keys.json")
    text = keys.add("alice", priority=7)
    with serving([tiny_model], api_key_file=keys.path, request_timeout=50) as running:
        engine = running.state.shelf._places[model_id].served.engine()
        seen, submit = [], engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: seen.append(request) or submit(request))
        said = running.http.post("/v1/chat/completions", json=chat(model_id), headers={"x-api-key": text})
        assert said.status_code == 200
    [request] = seen
    assert request.priority == 7
    assert request.salt == keys.keys()[0].hash
    assert 0 < request.deadline - time.monotonic() < 50


def test_an_answer_that_the_engine_ends_at_its_deadline_is_a_504():
    said = from_craton(DeadlineExceeded("the request's deadline has passed"))
    assert (said.status, said.code, said.kind) == (504, "timeout", "timeout_error")


def test_a_higher_priority_goes_before_keys_that_wait():
    async def body() -> list[str]:
        gate, order = Gate(1, 10), []

        async def enter(key: str, priority: int) -> None:
            async with gate.turn(key, priority):
                order.append(key)
                await asyncio.sleep(0.001)

        await asyncio.gather(
            enter("a", 0), enter("b", 0), enter("b", 0), enter("low", -1), enter("c", 0), enter("up", 1)
        )
        return order

    assert asyncio.run(body()) == ["a", "up", "b", "c", "b", "low"]


def test_keys_take_turns(tiny_model, model_id, serving, tmp_path, slow_engine):
    slow_engine(0.005)
    keys = KeyFile(tmp_path / "keys.json")
    greedy, modest = keys.add("greedy"), keys.add("modest")
    with serving([tiny_model], api_key_file=keys.path, concurrency=1) as running:
        done: list[str] = []

        def ask(name: str, key: str) -> None:
            body = chat(model_id, max_tokens=60, guided_regex="[a-z]{2000}")
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=headers, timeout=300).is_success
            done.append(name)

        threads = [threading.Thread(target=ask, args=("greedy", greedy)) for _ in range(5)]
        for thread in threads:
            thread.start()
        while running.state.gate.waiting < 4:
            time.sleep(0.002)
        last = threading.Thread(target=ask, args=("modest", modest))
        last.start()
        for thread in [*threads, last]:
            thread.join()
        assert done.index("modest") <= 3, done


def test_models_may_be_loaded_on_first_use(tiny_model, model_id, serving):
    with serving([tiny_model], load="use") as running:
        assert running.http.get("/ready").json() == {"ready": True, "models": {model_id: False}}
        assert running.http.post("/v1/chat/completions", json=chat(model_id, max_tokens=1)).status_code == 200
        assert running.http.get("/ready").json()["models"] == {model_id: True}


def test_a_fault_of_the_engine_fails_its_answers_and_no_more(server, model_id, monkeypatch):
    engine = server.state.shelf._places[model_id].served.engine()
    step = type(engine).step

    def broken(self):
        raise RuntimeError("secret of ours")

    monkeypatch.setattr(type(engine), "step", broken)
    said = server.http.post("/v1/chat/completions", json=chat(model_id, max_tokens=4))
    assert said.status_code == 500
    assert "secret" not in said.text
    monkeypatch.setattr(type(engine), "step", step)
    assert server.http.post("/v1/chat/completions", json=chat(model_id, max_tokens=4)).status_code == 200
    assert server.settled(1.0)


class Process:
    """`craton serve` in a process of its own."""

    def __init__(self, *words: object) -> None:
        code = "import sys; from craton.cli.serve import serve; serve(sys.argv[1:])"
        command = [sys.executable, "-c", code, *map(str, words), "--port", "0", "--threads", "1"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.events: list[dict] = []
        self.url = self.wait_for("listening")["url"]
        self.wait_for("ready")

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))

    def read_rest(self) -> None:
        assert self.process.stderr is not None
        self.rest = [json.loads(line) for line in self.process.stderr]
        self.process.stderr.close()

    def wait_for(self, name: str) -> dict:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == name:
                return self.events[-1]
        raise AssertionError(f"no {name}: {self.events}")


def wait_in_vain(url: str, body: dict) -> None:
    with contextlib.suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)


@pytest.fixture(scope="module")
def two_streams(tiny_model, model_id):
    """A process that is told to stop while one answer needs little more time and another far too much."""
    process = Process(tiny_model, "--drain", "2.5")
    found: dict[str, list[str]] = {"short": [], "long": []}
    begun = threading.Barrier(3)

    def read(name: str, body: dict) -> None:
        with httpx.stream("POST", f"{process.url}/v1/chat/completions", json=body, timeout=300) as said:
            for number, line in enumerate(said.iter_lines()):
                if number == 0:
                    begun.wait(60)
                found[name].append(line)

    bodies = {
        "short": chat(model_id, max_tokens=100, stream=True, guided_regex="[a-z]{2000}"),
        "long": endless(model_id, stream=True, n=16),
    }
    # Many seconds of work even for a fast machine: 16 x 5 answers, 8 of them at a time.
    crowd = [threading.Thread(target=wait_in_vain, args=(process.url, endless(model_id, n=16))) for _ in range(4)]
    threads = [threading.Thread(target=read, args=one) for one in bodies.items()]
    for thread in crowd:
        thread.start()
    while process.metric("craton_requests_running") < len(crowd):
        time.sleep(0.01)
    for thread in threads:
        thread.start()
    begun.wait(60)
    process.process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    for thread in threads + crowd:
        thread.join(60)
    process.process.wait(30)
    process.read_rest()
    yield process, found, time.monotonic() - started
    process.process.kill()


def test_sigterm_lets_an_answer_finish(two_streams):
    _, found, _ = two_streams
    assert found["short"][-2] == "data: [DONE]"
    assert any('"finish_reason": "length"' in line for line in found["short"])


def test_sigterm_ends_what_takes_too_long_with_a_clean_error(two_streams):
    _, found, seconds = two_streams
    lines = [line for line in found["long"] if line]
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "overloaded_error"
    assert lines[-1] == "data: [DONE]"
    assert 2 < seconds < 60


def test_sigterm_leaves_no_process_and_exits_well(two_streams):
    process, _, _ = two_streams
    assert process.process.returncode == 0
    assert process.rest[-1]["event"] == "stopped"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{process.url}/health")


def test_logs_hold_no_prompts(two_streams):
    process, _, _ = two_streams
    requests = [event for event in process.events + process.rest if event["event"] == "request"]
    assert {event["endpoint"] for event in requests} >= {"/v1/chat/completions"}
    assert any(event["completion_tokens"] > 0 for event in requests)
    assert "guided_regex" not in json.dumps(process.events + process.rest)


@pytest.mark.slow
def test_a_server_that_was_killed_starts_again_with_what_it_had(tiny_model, model_id, tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    text = keys.add("alice")
    said: list[str] = []
    for _ in range(2):
        process = Process(tiny_model, "--api-key-file", keys.path)
        answer = httpx.post(
            f"{process.url}/v1/chat/completions",
            json=chat(model_id, max_tokens=4, temperature=0),
            headers={"x-api-key": text},
            timeout=300,
        )
        said.append(answer.json()["choices"][0]["message"]["content"])
        process.process.kill()
        process.process.wait(30)
        process.read_rest()
    assert said[0] == said[1]


def test_logs_hold_prompts_and_answers_where_asked_for(tiny_model, model_id, serving, monkeypatch):
    said: list[dict] = []
    monkeypatch.setattr("craton.serving.logs.event", lambda name, **facts: said.append({"event": name, **facts}))
    with serving([tiny_model], log_prompts=True) as running:
        answer = running.http.post("/v1/chat/completions", json=chat(model_id, max_tokens=2)).json()
    [request] = [one for one in said if one["event"] == "request"]
    assert "messages" in request["body"]
    assert request["answers"][0]["content"] == answer["choices"][0]["message"]["content"]
