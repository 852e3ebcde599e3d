"""Many clients at once, some of whom leave or send nonsense: right answers, and nothing left behind."""

from __future__ import annotations

import asyncio
import random

import httpx

CLIENTS, REQUESTS = 64, 256
WORDS = ["red", "blue", "what is a class", "the code of green is", "zim zam zum", "word " * 30]


def test_the_same_seed_says_the_same_alone_and_among_many(server, model_id):
    def body(number: int) -> dict:
        sampling = {"temperature": 1.0, "seed": number, "max_tokens": 4 + number % 13}
        return {"model": model_id, "prompt": WORDS[number % len(WORDS)], **sampling}

    alone = {}
    for number in range(48):
        alone[number] = server.http.post("/v1/completions", json=body(number)).json()["choices"][0]["text"]
    chance = random.Random(7)
    wrong: list[int] = []
    codes: dict[int, int] = {}

    async def ask(client: httpx.AsyncClient, number: int) -> None:
        kind = chance.random()
        if kind < 0.15:  # leaves in the middle
            request = body(number) | {"stream": True, "max_tokens": 300, "guided_regex": "[a-z]{2000}"}
            async with client.stream("POST", "/v1/completions", json=request) as said:
                async for _ in said.aiter_lines():
                    if chance.random() < 0.3:
                        break
        elif kind < 0.25:  # leaves before anything comes
            task = asyncio.create_task(client.post("/v1/completions", json=body(number) | {"max_tokens": 300}))
            await asyncio.sleep(chance.random() * 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        elif kind < 0.35:  # sends nonsense
            broken = chance.choice([b"{", b"[]", b'{"model": 3}', b"\xff", b'{"model": "x", "prompt": "y"}'])
            said = await client.post("/v1/completions", content=broken, headers={"content-type": "application/json"})
            codes[said.status_code] = codes.get(said.status_code, 0) + 1
        else:
            said = await client.post("/v1/completions", json=body(number))
            codes[said.status_code] = codes.get(said.status_code, 0) + 1
            if said.json()["choices"][0]["text"] != alone[number]:
                wrong.append(number)

    async def work(numbers: list[int]) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            for number in numbers:
                await ask(client, number % 48)

    async def soak() -> None:
        await asyncio.gather(*(work(list(range(first, REQUESTS, CLIENTS))) for first in range(CLIENTS)))

    asyncio.run(soak())
    assert wrong == []
    assert set(codes) <= {200, 400, 404}, codes
    assert codes[200] > REQUESTS // 2
    assert server.settled(2.0), "something still runs"
    engine = server.state.shelf._places[model_id].served.engine()
    asked = server.http.post("/v1/completions", json=body(0))
    assert asked.json()["choices"][0]["text"] == alone[0]
    assert server.settled(2.0)
    engine.check()  # whatever it holds, somebody accounts for
