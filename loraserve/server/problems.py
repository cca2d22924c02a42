"""Every failure of every route in OpenAI's shape: {"error": {"message", "type", "param", "code"}} and a status.

The one table from exception classes to status codes. Knows Flask, and nothing of models or adapters.
"""

import json
import logging
from typing import Any

from flask import Flask, Response
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import HTTPException

from loraserve.errors import (
    AdapterRefused,
    CheckpointError,
    Conflict,
    DataError,
    InvalidRequest,
    LoraserveError,
    NotFinite,
    NotFound,
    NotReady,
    QueueFull,
)

log = logging.getLogger(__name__)

STATUS: dict[type[LoraserveError], int] = {
    InvalidRequest: 400,
    NotFound: 404,
    Conflict: 409,
    AdapterRefused: 422,
    CheckpointError: 422,
    DataError: 422,
    NotFinite: 422,
    QueueFull: 429,
    NotReady: 503,
}
INTERNAL = "the server failed while answering; its log has the details"


def status_of(error: BaseException) -> int:
    """The HTTP status of an exception: its own class's or the nearest ancestor's, 500 for what no user caused."""
    if isinstance(error, HTTPException):
        return error.code or 500
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)


def problem(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Build the body of an error response."""
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def describe(error: BaseException) -> dict[str, Any]:
    """Build the body that tells a client about `error`; what is not meant for users is logged and not shown."""
    status = status_of(error)
    if isinstance(error, LoraserveError):
        body = problem(status, str(error), code=error.code, param=error.param)
        if isinstance(error, AdapterRefused):
            body["error"]["problems"] = error.problems
        return body
    if isinstance(error, HTTPException):
        return problem(status, error.description or error.name, code=error.name.lower().replace(" ", "_"))
    log.error("unexpected failure", exc_info=error)
    return problem(status, INTERNAL, code="internal_error")


def respond(error: BaseException) -> Response:
    """Turn `error` into the response of a request."""
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after)
    elif isinstance(error, NotReady):
        headers["Retry-After"] = "1"
    elif isinstance(error, HTTPException):
        headers = {k: v for k, v in error.get_headers() if k in ("Allow", "Retry-After")}
    return Response(json.dumps(describe(error), ensure_ascii=False), status_of(error), headers, "application/json")


def install(app: Flask) -> None:
    """Let every route of `app`, unknown ones included, fail in this shape."""

    def handle(error: Exception) -> ResponseReturnValue:
        if isinstance(error, HTTPException) and status_of(error) < 400:  # a redirect
            return error.get_response()
        return respond(error)

    app.register_error_handler(Exception, handle)
