"""Whole adaptations behind a name: their prompt, their passages, and the passages in the answer."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from craton.compare.application import APPLICATION_NAME, PROMPT_NAME, ApplicationSettings, open_application
from craton.compare.study import INDEX_NAME
from craton.prompting.prompt import Prompt, prompt_toml
from craton.retrieval.collection import CollectionSettings
from craton.retrieval.index import create_index, index_path
from craton.store.artifacts import publish_model


def publish(name: str, model: Path, folder: Path, **prompt) -> None:
    """An application with an index: what `craton compare --apply` publishes."""
    docs = folder / "docs"
    docs.mkdir(exist_ok=True)
    for colour in ("red", "blue", "green"):
        (docs / f"{colour}.txt").write_text(f"the code of {colour} is zim")
    with create_index(name, CollectionSettings(encoder=str(model)), 1) as index:
        index.sync([docs], prune=False)
    settings = ApplicationSettings(
        task="codes", way="retrieve", model=str(model), encoder=str(model), passages=2, measured="in a test"
    )

    def build(target: Path) -> None:
        (target / APPLICATION_NAME).write_text(settings.model_dump_json())
        (target / PROMPT_NAME).write_text(prompt_toml(Prompt(**prompt)))
        (target / "README.md").write_text("# test")
        with sqlite3.connect(index_path(name)) as one, sqlite3.connect(target / INDEX_NAME) as other:
            one.backup(other)

    publish_model(name, build, source="file:test", parents=(), licence=None)


@pytest.fixture(scope="module")
def answering(tiny_model, serving, tmp_path_factory):
    folder = tmp_path_factory.mktemp("applications")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRATON_HOME", str(folder / "home"))
        template = "{{ context }}\n{{ input }}"
        publish("codes", tiny_model, folder, template=template, answer={"max_tokens": 6, "stop": ["\n"]})
        publish(
            "colours",
            tiny_model,
            folder,
            template=template,
            answer={"choices": ["red", "blue"], "scoring": "likelihood"},
        )
        with serving(["codes", "colours"]) as running:
            yield running


ASK = [{"role": "user", "content": "what is the code of blue"}]


def test_an_application_answers_as_it_does_in_process_and_names_its_sources(answering):
    said = answering.http.post("/v1/chat/completions", json={"model": "codes", "messages": ASK}).json()
    expected = open_application("codes", threads=1).answer("what is the code of blue")
    assert said["choices"][0]["message"]["content"].strip() == expected.text
    assert [source["name"] for source in said["sources"]] == list(expected.passages)
    assert len(said["sources"]) == 2
    assert all(source["text"].startswith("the code of") for source in said["sources"])


def test_a_stream_brings_the_sources_first(answering):
    body = {"model": "codes", "messages": ASK, "stream": True}
    lines = answering.http.post("/v1/chat/completions", json=body).text.split("\n\n")
    assert len(json.loads(lines[0].removeprefix("data: "))["sources"]) == 2
    message = answering.http.post("/v1/messages", json={"model": "codes", "messages": ASK, "max_tokens": 4}).json()
    assert len(message["sources"]) == 2


def test_a_scored_answer_comes_in_the_same_shapes(answering):
    body = {"model": "colours", "messages": ASK}
    said = answering.http.post("/v1/chat/completions", json=body).json()
    expected = open_application("colours", threads=1).answer("what is the code of blue").text
    assert said["choices"][0]["message"]["content"] == expected
    lines = answering.http.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert f'"content": "{expected}"' in lines


@pytest.mark.parametrize(
    "fields",
    [{"stop": "x"}, {"n": 2}, {"guided_regex": "a"}, {"messages": [{"role": "system", "content": "x"}, *ASK]}],
)
def test_what_was_measured_cannot_be_changed(answering, fields):
    said = answering.http.post("/v1/chat/completions", json={"model": "codes", "messages": ASK, **fields})
    assert said.status_code == 400


def test_an_application_continues_and_embeds_nothing(answering):
    assert answering.http.post("/v1/completions", json={"model": "codes", "prompt": "red"}).status_code == 400
    assert answering.http.post("/v1/embeddings", json={"model": "codes", "input": "red"}).status_code == 400
