"""The OpenAPI document, made from the bodies' own models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import models_json_schema

from craton import __version__

if TYPE_CHECKING:
    from craton.serving.http import Endpoint

_REFUSALS = {
    "400": "A field is wrong or not supported; the message names it",
    "401": "No valid key",
    "403": "This key may not, or this is not the machine's own name",
    "404": "No such model",
    "409": "It is so already, or is just being changed",
    "413": "The body is too large",
    "429": "The queue is full; see Retry-After",
    "503": "The server is stopping or cannot do it now",
    "504": "The request took too long",
}
_READ = {
    "/health": "Whether the process does its work",
    "/ready": "Whether requests are welcome",
    "/metrics": "Counters for Prometheus",
    "/v1/models": "The models that may be asked for",
    "/v1/models/{model}": "One model",
}


def openapi_document(endpoints: Mapping[str, Endpoint[Any]]) -> dict[str, Any]:
    """OpenAPI 3.1 of all endpoints."""
    schemas = {endpoint.schema for endpoint in endpoints.values()}
    references, definitions = models_json_schema(
        [(schema, "validation") for schema in sorted(schemas, key=lambda s: s.__name__)],
        ref_template="#/components/schemas/{model}",
    )
    error = {"application/json": {"schema": {"type": "object"}}}
    refusals = {status: {"description": said, "content": error} for status, said in _REFUSALS.items()}
    paths: dict[str, Any] = {}
    for path, endpoint in endpoints.items():
        body = {endpoint.content: {"schema": references[(endpoint.schema, "validation")]}}
        answers: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if "stream" in endpoint.schema.model_fields:
            answers["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "summary": (endpoint.schema.__doc__ or "").strip().splitlines()[0],
                "requestBody": {"required": True, "content": body},
                "responses": {"200": {"description": "The answer", "content": answers}, **refusals},
            }
        }
    for path, said in _READ.items():
        operation: dict[str, Any] = {"summary": said, "responses": {"200": {"description": said}}}
        if "{model}" in path:
            name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
            operation |= {"parameters": [name]}
            operation["responses"]["404"] = {"description": _REFUSALS["404"]}
        if path == "/ready":
            operation["responses"]["503"] = {"description": "Not yet, or no more"}
        paths[path] = {"get": operation}
    bearer = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Craton", "version": __version__, "description": "An OpenAI-compatible server."},
        "paths": paths,
        "components": {"schemas": definitions.get("$defs", {}), "securitySchemes": {"key": bearer}},
        "security": [{}, {"key": []}],
    }
