"""The admin API as an OpenAPI 3.1 document, made from its routes: nobody writes it, and so nothing is forgotten.

A route says what it is in its endpoint's docstring, and more, where there is more, in its `About`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.errors import GatewayError
from gateway.operations import json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.version import tidegate_version

Json = dict[str, Any]

DESCRIPTION_PATH = "/admin/openapi.json"
_REF = "#/components/schemas/{name}"
_SAFE = ("GET", "HEAD")
_TITLES = {
    400: "The request cannot be used.",
    401: "You are nobody this gateway knows.",
    403: "You may not do this.",
    404: "There is no such thing.",
    409: "It is not in a state for this.",
    412: "It has changed since you looked.",
    413: "The body is too large.",
    421: "The Host is not this listener's.",
    428: "Say which version you change.",
    429: "Too often.",
    500: "A defect of Tidegate.",
    503: "It cannot be done now.",
}
_ANY: Mapping[int, tuple[str, ...]] = {421: ("invalid_host",), 500: ("internal_error",)}
_ROLES: Mapping[int, tuple[str, ...]] = {401: ("invalid_token",), 403: ("role_required", "cross_site_request")}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def described(routes: Sequence[GuardedRoute]) -> list[GuardedRoute]:
    """The route that answers with the description of these, and of itself."""

    async def openapi(request: Request) -> Response:
        """This document."""
        return json_response(document([*routes, *mine]))

    mine = [GuardedRoute(DESCRIPTION_PATH, openapi, Who.READER, methods=["GET"])]
    return mine


def document(routes: Iterable[GuardedRoute]) -> Json:
    """The whole document, as plain data for any JSON encoder."""
    found = list(routes)
    types = [each for route in found for each in (route.about.body, route.about.answer) if each is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    by_type = dict(zip(map(id, types), schemas, strict=True))
    paths: dict[str, Json] = {}
    for route in found:
        operations = paths.setdefault(route.path_format, {})
        for method in sorted((route.methods or set()) - {"HEAD"}):
            operations[method.lower()] = _operation(route, method, by_type)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tidegate's admin API",
            "version": tidegate_version(),
            "description": "What operators see and steer, on a listener of its own. Each operation names the least "
            "role that may use it in `x-tidegate-role`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {"Error": _ERROR, **components},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "session": {
                    "type": "apiKey",
                    "in": "cookie",
                    "name": "__Host-tidegate",
                    "description": "From `POST /admin/session`. Unsafe methods also need `x-tidegate-csrf: 1`, and to "
                    "come from a page of this listener.",
                },
            },
        },
        "security": [{"bearer": []}, {"session": []}],
    }


def _operation(route: GuardedRoute, method: str, schemas: Mapping[int, Json]) -> Json:
    about = route.about
    summary, _, rest = (about.summary or route.endpoint.__doc__ or "").strip().partition("\n")
    found: Json = {
        "operationId": _operation_id(method, route.path_format),
        "summary": summary,
        "x-tidegate-role": route.who.value,
        "responses": {
            str(about.status): _answer(about, schemas),
            **_refusals(route),
        },
    }
    if description := " ".join(rest.split()):
        found["description"] = description
    if parameters := [*_in_path(route), *_in_query(about)]:
        found["parameters"] = parameters
    if about.body is not None and method not in _SAFE:
        content = {"application/json": {"schema": schemas[id(about.body)]}}
        found["requestBody"] = {"required": True, "content": content}
    if not route.who.is_role:
        found["security"] = []
    return found


def _answer(about: About, schemas: Mapping[int, Json]) -> Json:
    found: Json = {"description": "The answer."}
    if about.status in (204, 302, 303, 308):
        return found
    schema = {"type": "object"} if about.answer is None else schemas[id(about.answer)]
    json = about.media == "application/json"
    found["content"] = {about.media.partition(";")[0]: {"schema": schema} if json else {}}
    return found


def _refusals(route: GuardedRoute) -> Json:
    codes: dict[int, list[str]] = {}
    groups = [_ANY, _ROLES] if route.who.is_role or route.who is Who.LOCAL else [_ANY]
    for group in groups:
        for status, names in group.items():
            codes.setdefault(status, []).extend(names)
    for error in route.about.errors:
        codes.setdefault(error.status, []).append(_code(error))
    return {
        str(status): {
            "description": f"{_TITLES.get(status, 'It failed.')} `code`: {', '.join(f'`{code}`' for code in names)}.",
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
            "x-tidegate-codes": names,
        }
        for status, names in sorted(codes.items())
    } | {"default": {"description": "Another error.", "content": _error_content()}}


def _error_content() -> Json:
    return {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}


def _code(error: type[GatewayError]) -> str:
    return error.code or error.type


def _in_path(route: GuardedRoute) -> list[Json]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in route.param_convertors
    ]


def _in_query(about: About) -> list[Json]:
    return [
        {"name": name, "in": "query", "description": text, "schema": {"type": "string"}}
        for name, text in about.query.items()
    ]


def _operation_id(method: str, path: str) -> str:
    """A name that stays, since it is made of what the route is called.

    >>> _operation_id("POST", "/admin/keys/{id}/rotate")
    'post_keys_id_rotate'
    """
    words = re.findall(r"[A-Za-z0-9]+", path.removeprefix("/admin")) or (["page"] if path.endswith("/") else ["root"])
    return "_".join([method.lower(), *words])
