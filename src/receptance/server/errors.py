"""`ApiError`: what a client is told when its request cannot be answered."""

from __future__ import annotations

from typing import Any

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer with an error status; the message is for the client and holds nothing private."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        allow: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.allow = retry_after, allow

    @property
    def kind(self) -> str:
        """The type of the error, as both interfaces call it."""
        return _TYPES.get(self.status, "invalid_request_error")

    @property
    def openai(self) -> dict[str, Any]:
        """The body that OpenAI's clients read."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def anthropic(self) -> dict[str, Any]:
        """The body that Anthropic's clients read."""
        kind = "api_error" if self.status == 500 else self.kind
        return {"type": "error", "error": {"type": kind, "message": self.message}}


def refusal(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message, param=param, code=code)
