"""The ASGI application: routes, behind the guard."""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from craton.serving.errors import ApiError
from craton.serving.guard import Guard
from craton.serving.http import Endpoint, FormEndpoint
from craton.serving.openapi import openapi_document
from craton.serving.routes.audio import transcriptions, translations
from craton.serving.routes.chat import chat_completions
from craton.serving.routes.completions import completions
from craton.serving.routes.messages import count_tokens, messages
from craton.serving.routes.models import load_model, unload_model
from craton.serving.routes.operations import Operations, not_found, refused
from craton.serving.routes.responses import responses
from craton.serving.routes.tokens import detokenize, tokenize
from craton.serving.routes.vectors import embeddings, rerank
from craton.serving.schemas.audio import TranscriptionRequest, TranslationRequest
from craton.serving.schemas.chat import ChatRequest
from craton.serving.schemas.completions import CompletionRequest
from craton.serving.schemas.messages import CountTokensRequest, MessagesRequest
from craton.serving.schemas.models import LoadRequest, UnloadRequest
from craton.serving.schemas.responses import ResponsesRequest
from craton.serving.schemas.tokens import DetokenizeRequest, TokenizeRequest
from craton.serving.schemas.vectors import EmbeddingRequest, RerankRequest
from craton.serving.state import ServerState

# path -> endpoint of all that takes a body
ENDPOINTS: dict[str, Endpoint[Any]] = {
    "/v1/chat/completions": Endpoint(ChatRequest, chat_completions),
    "/v1/completions": Endpoint(CompletionRequest, completions),
    "/v1/responses": Endpoint(ResponsesRequest, responses),
    "/v1/messages": Endpoint(MessagesRequest, messages),
    "/v1/messages/count_tokens": Endpoint(CountTokensRequest, count_tokens),
    "/v1/embeddings": Endpoint(EmbeddingRequest, embeddings),
    "/v1/rerank": Endpoint(RerankRequest, rerank),
    "/v1/audio/transcriptions": FormEndpoint(TranscriptionRequest, transcriptions),
    "/v1/audio/translations": FormEndpoint(TranslationRequest, translations),
    "/v1/tokenize": Endpoint(TokenizeRequest, tokenize, queued=False),
    "/v1/detokenize": Endpoint(DetokenizeRequest, detokenize, queued=False),
    "/v1/models/load": Endpoint(LoadRequest, load_model, queued=False),
    "/v1/models/unload": Endpoint(UnloadRequest, unload_model, queued=False),
}


def make_app(state: ServerState) -> ASGIApp:
    """The application of one server."""
    operations = Operations(state, openapi_document(ENDPOINTS))
    routes = [Route(path, endpoint, methods=["POST"]) for path, endpoint in ENDPOINTS.items()]
    routes += [
        Route("/health", operations.health),
        Route("/ready", operations.ready),
        Route("/metrics", operations.metrics),
        Route("/openapi.json", operations.openapi),
        Route("/v1/models", operations.models),
        Route("/v1/models/{model:path}", operations.model),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: not_found, ApiError: refused})
    app.router.redirect_slashes = False
    return Guard(app, state)
