"""Refusals over HTTP: one exception with a status, and its body in OpenAI's and in Anthropic's shape."""

from __future__ import annotations

from typing import Any

from craton.errors import ContextOverflow, CratonError, DeadlineExceeded, TemplateError, UsageError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "invalid_request_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """What is answered instead of a result. param: the field that was wrong. code: stable, for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after
        super().__init__(message)

    @property
    def kind(self) -> str:
        """OpenAI's and Anthropic's name for this sort of error."""
        return _KINDS.get(self.status, "api_error")

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        headers = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON body, as the clients of `path` read it."""
        if path.startswith("/v1/messages"):
            named = self.param is None or self.param in self.message
            message = self.message if named else f"{self.param}: {self.message}"
            return {"type": "error", "error": {"type": self.kind, "message": message}}
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


class ClientGone(Exception):
    """The client has left: there is nobody to answer."""


def from_craton(error: CratonError) -> ApiError:
    """The HTTP form of one of Craton's refusals. What a user can mend is a 400; the rest is ours."""
    message = error.what if error.remedy is None else f"{error.what} ({error.remedy})"
    if isinstance(error, ContextOverflow):
        return ApiError(400, message, code="context_length_exceeded")
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, message, code="timeout")
    if isinstance(error, UsageError | TemplateError):
        return ApiError(400, message, param=error.where, code=error.code)
    return ApiError(503, message, code=error.code)


def from_any(error: Exception) -> ApiError:
    """The HTTP form of any exception. What it was, the log says; a client learns nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, CratonError):
        return from_craton(error)
    return ApiError(500, "a fault of the server's", code="internal_error")
