"""Errors of ordinary routes as OpenAI's error object; both listeners answer with these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ExceptionHandler

from gateway.errors import GatewayError, InternalError, MethodNotAllowed, RouteNotFound


def error_response(error: GatewayError) -> Response:
    """The error as OpenAI's error object."""
    response = Response(error.body(), error.status, media_type="application/json")
    for name, value in error.headers():
        response.headers[name.decode()] = value.decode()
    return response


async def _gateway_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return error_response(error)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 405:
        response = error_response(MethodNotAllowed(f"{where} is not allowed."))
        response.headers.update(error.headers or {})
        return response
    return error_response(RouteNotFound(f"There is no {where} here."))


async def _defect(request: Request, error: Exception) -> Response:
    return error_response(InternalError("Something went wrong inside the gateway."))


ERROR_HANDLERS: Mapping[Any, ExceptionHandler] = {
    HTTPException: _http_error,
    GatewayError: _gateway_error,
    Exception: _defect,
}
"""For Starlette's `exception_handlers`."""
