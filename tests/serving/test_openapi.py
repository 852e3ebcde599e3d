"""The served OpenAPI document, and what schemathesis makes of it."""

from __future__ import annotations

import pytest


def test_the_document_describes_every_endpoint(server):
    from craton.serving.app import ENDPOINTS

    document = server.http.get("/openapi.json").json()
    assert set(ENDPOINTS) <= set(document["paths"])
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert chat["required"] == ["model", "messages"]
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert server.http.get(path).status_code == 200
        assert "get" in document["paths"][path]


def test_paths_and_methods_that_there_are_not_get_an_error_of_the_same_shape(server):
    for method, path, status in (("GET", "/v1/chat/completions", 405), ("POST", "/v1/models", 405), ("GET", "/x", 404)):
        said = server.http.request(method, path)
        assert said.status_code == status
        assert said.json()["error"]["message"]


@pytest.mark.slow
def test_schemathesis_finds_no_fault(server, model_id):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, given, settings

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    codes: dict[int, int] = {}
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def run(case):
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = model_id  # behind the name lies everything else
            response = case.call(timeout=300)
            codes[response.status_code] = codes.get(response.status_code, 0) + 1
            assert response.status_code < 500, (case.path, case.body, response.text)

        run()
    assert codes.get(200, 0) > 20, codes
    assert server.settled(10)
