"""The API as an OpenAPI 3.1 document: what Tidegate itself promises of its listener for clients.

Request bodies name only the fields that Tidegate looks at; every other one is the model server's business, and so is
what is inside an answer. The document is served as `GET /openapi.json` and printed by `tidegate openapi`; tests compare
its paths with the routes, its error codes with the table in docs/request-path.md, and a running gateway with the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from gateway.version import tidegate_version

Json = dict[str, Any]
Errors = Mapping[int, tuple[str, ...]]

_CONNECTION: Errors = {
    400: (
        "invalid_http",
        "unsupported_version",
        "invalid_host",
        "invalid_framing",
        "duplicate_authorization",
        "upgrade_refused",
        "too_many_requests",
    ),
    403: ("foreign_origin",),
    405: ("method_not_allowed",),
    408: ("request_timeout",),
    413: ("request_too_large",),
    415: ("unsupported_encoding",),
    421: ("invalid_host",),
    431: ("headers_too_large", "too_many_headers"),
    500: ("internal_error",),
    503: (
        "overloaded",
        "overloaded_memory",
        "overloaded_event_loop",
        "overloaded_descriptors",
        "overloaded_bytes",
    ),
}
"""What any request can meet, whatever it asks for."""
_CALLER: Errors = {401: ("invalid_api_key",), 429: ("too_many_failed_keys",), 503: ("keys_unavailable",)}
_INFERENCE: Errors = {
    400: (
        "invalid_json",
        "too_many_keys",
        "duplicate_key",
        "missing_model",
        "invalid_type",
        "invalid_header",
        "reserved_parameter",
        "unsupported_parameter",
        "max_tokens_too_large",
        "ambiguous_model",
        "unknown_adapter",
        "value_out_of_range",
        "invalid_media_url",
        "remote_media_refused",
    ),
    403: ("model_without_price", "model_not_allowed", "adapter_not_allowed", "data_residency_mismatch"),
    404: ("model_not_found",),
    429: ("rate_limit_exceeded", "insufficient_quota", "queue_full"),
    502: (
        "upstream_unreachable",
        "upstream_compressed",
        "upstream_disconnected",
        "upstream_truncated",
        "upstream_auth_failed",
        "upstream_no_funds",
        "upstream_error",
        "upstream_failed",
        "upstream_invalid",
    ),
    503: (
        "queue_timeout",
        "budget_unknown",
        "upstream_overloaded",
        "adapter_unavailable",
        "no_replica_available",
        "model_starting",
        "gateway_draining",
        "ended_by_operator",
    ),
    504: ("first_token_timeout", "upstream_timeout"),
}
UNKNOWN_ROUTE = "unknown_url"
"""The code of the 404 for what is no route, and so in no operation below."""

_TITLES = {
    400: "The request cannot be used.",
    401: "No API key, or none that is valid.",
    403: "This may not be done: by this API key, or from this web page.",
    404: "There is no such model.",
    405: "The route exists, the method does not.",
    408: "The request came too slowly.",
    413: "The body is larger than `server.max_body_bytes`.",
    415: "The body is compressed.",
    421: "The Host is not this listener's.",
    429: "A limit of the caller, or of the model server, is reached.",
    431: "The head is larger than the limits allow.",
    500: "A defect of Tidegate.",
    502: "No usable answer came from a model server.",
    503: "Nothing can serve the request now.",
    504: "No answer came in time.",
}
_TEXT: Json = {"type": "string"}
_COUNT: Json = {"type": "integer", "minimum": 0}
_OF_ANSWERS: dict[str, tuple[str, Json]] = {
    "x-tidegate-replica": ("The replica that was tried last.", _TEXT),
    "x-tidegate-region": ("Its region, where the configuration gives it one.", _TEXT),
    "x-tidegate-model": ("The model that answered, where it is a fallback of the one asked for.", _TEXT),
    "x-tidegate-attempts": ("Attempts made.", _COUNT),
    "x-tidegate-possible-duplicate-charge": ("`true`: an attempt before may have been billed as well.", _TEXT),
    "x-tidegate-route-reason": ("Why this replica.", _TEXT),
    "x-tidegate-predicted-cached-tokens": ("Prompt tokens that it was believed to have cached.", _COUNT),
    "x-tidegate-queue-ms": ("Milliseconds in line.", _COUNT),
    "x-tidegate-queue-position": ("Place in line at the beginning of a wait.", _COUNT),
    "x-tidegate-predicted-wait-ms": ("The wait that was predicted then.", _COUNT),
    "x-tidegate-store": ("What decided about limits: `memory`, `redis` or `local`.", _TEXT),
    "x-tidegate-max-tokens": ("The bound that was put on the output.", _COUNT),
    **{
        f"x-ratelimit-{what}-{of}": (f"Of the tightest limit of {of}: {what}.", _TEXT if what == "reset" else _COUNT)
        for of in ("requests", "tokens")
        for what in ("limit", "remaining", "reset")
    },
}
_HINTS: dict[str, tuple[str, Json]] = {
    "retry-after": ("Seconds after which to come back.", _COUNT),
    "retry-after-ms": ("The same in milliseconds.", _COUNT),
    "x-should-retry": ("`false`: coming back is pointless.", {"type": "string", "enum": ["true", "false"]}),
}
_ALWAYS = ("x-request-id",)
_HEADERS: dict[str, tuple[str, Json]] = {
    "x-request-id": ("The id in the logs and in the usage record.", _TEXT),
    "www-authenticate": ("How to authenticate.", {"const": "Bearer"}),
    "allow": ("The methods that exist.", _TEXT),
    **_HINTS,
    **_OF_ANSWERS,
}
_ASKING: dict[str, tuple[str, Json]] = {
    "x-tidegate-deadline-ms": (
        "Milliseconds for the whole request.",
        {"type": "integer", "minimum": 1, "maximum": 86_400_000},
    ),
    "x-tidegate-region": ("Regions that may serve it, separated by commas.", _TEXT),
    "x-tidegate-class": ("A lower priority class than the key's.", _TEXT),
    "x-tidegate-session": ("What belongs together, for routing.", _TEXT),
    "traceparent": ("Passed on (W3C Trace Context).", _TEXT),
    "tracestate": ("Passed on (W3C Trace Context).", _TEXT),
}

_OUTPUT: Json = {"type": ["integer", "null"], "description": "Most tokens of output; negative: no bound."}
_CHOICES: Json = {"type": ["integer", "null"], "minimum": 1}
_ANY_REQUEST: Json = {
    "model": {"type": "string", "minLength": 1, "description": "A name that `GET /v1/models` lists."},
    "user": {"description": "The end user, for limits, where it is a string."},
    "safety_identifier": {"description": "Goes before `user`."},
    "service_tier": {"description": "`flex` waits longer in line."},
    "lora_path": {"type": ["string", "null"], "description": "The name of a LoRA adapter of the model; never a path."},
}
_GENERATING: Json = {
    **_ANY_REQUEST,
    "stream": {"type": ["boolean", "null"]},
    "stream_options": {"description": "With `include_usage: true` the stream's usage chunk is passed on."},
    "n": _CHOICES,
    "best_of": _CHOICES,
    "max_tokens": _OUTPUT,
    "n_predict": _OUTPUT,
    "prompt_cache_key": {"description": "What belongs together, for routing, where it is a string."},
}
_CHAT: Json = {**_GENERATING, "max_completion_tokens": _OUTPUT, "messages": {"description": "For the model server."}}
_COMPLETION: Json = {**_GENERATING, "prompt": {"description": "A text, tokens, or a list of either."}}
_EMBEDDING: Json = {**_ANY_REQUEST, "input": {"description": "A text, tokens, or a list of either."}}

_MODEL: Json = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {
        "id": _TEXT,
        "object": {"const": "model"},
        "created": {"type": "integer"},
        "owned_by": {"type": "string", "description": "The pool that serves it."},
    },
}
_ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}


def document() -> Json:
    """The whole document, as plain data for any JSON encoder."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tidegate",
            "version": tidegate_version(),
            "description": "OpenAI's API in front of your model servers. A stream that fails after content went out "
            'ends with `data: {"error": {...}}` and no `[DONE]`. What is no route is answered with 404 '
            f"`{UNKNOWN_ROUTE}`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/chat/completions": {"post": _inference("createChatCompletion", "The next message of a chat.", _CHAT)},
            "/v1/completions": {"post": _inference("createCompletion", "The continuation of a text.", _COMPLETION)},
            "/v1/embeddings": {"post": _inference("createEmbedding", "Vectors of texts.", _EMBEDDING)},
            "/v1/models": {"get": _plain("listModels", "The models that the caller may use.", _models(), _CALLER)},
            "/v1/models/{model}": {
                "get": {
                    **_plain("retrieveModel", "One model.", _ref("Model"), _CALLER, {404: ("model_not_found",)}),
                    "parameters": [
                        {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
                    ],
                }
            },
            "/livez": {"get": _public("live", "The process answers.", _status("ok"))},
            "/readyz": {"get": _readiness()},
            "/openapi.json": {"get": _public("describe", "This document.", {"type": "object"})},
        },
        "components": {
            "schemas": {"Error": _ERROR, "Model": _MODEL},
            "headers": {
                name: {"description": text, "schema": schema, "required": name in _ALWAYS}
                for name, (text, schema) in _HEADERS.items()
            },
            "responses": _refusals(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "api-key": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
        # The empty one: a gateway with `auth: insecure` asks for no key.
        "security": [{"bearer": []}, {"x-api-key": []}, {"api-key": []}, {}],
    }


def _inference(operation: str, summary: str, properties: Json) -> Json:
    streams = "stream" in properties
    answer: Json = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        answer["text/event-stream"] = {}  # chunks; version 3.1 has no words for what is in a stream of events
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [
            {"name": name, "in": "header", "description": text, "schema": schema}
            for name, (text, schema) in _ASKING.items()
        ],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["model"],
                        "properties": properties,
                        "additionalProperties": True,
                    }
                }
            },
        },
        "responses": {
            "200": {"description": "The answer.", "headers": _headers(_OF_ANSWERS), "content": answer},
            **{status: {"$ref": f"#/components/responses/{status}"} for status in _refusals()},
        },
    }


def _refusals() -> Json:
    """What the three inference routes can answer instead, by status."""
    return {
        **_errors(_OF_ANSWERS, _CONNECTION, _CALLER, _INFERENCE),
        "4XX": {
            "description": "The model server refused the request; its status and message are passed on.",
            "headers": _headers((*_HINTS, *_OF_ANSWERS)),
            "content": _json(_ref("Error")),
        },
    }


def _plain(operation: str, summary: str, answer: Json, *errors: Errors) -> Json:
    """A route that answers from the gateway itself."""
    return {
        "operationId": operation,
        "summary": summary,
        "responses": {
            "200": {"description": summary, "headers": _headers(()), "content": _json(answer)},
            **_errors((), _CONNECTION, *errors),
        },
    }


def _public(operation: str, summary: str, answer: Json) -> Json:
    """The same, for anybody."""
    return {**_plain(operation, summary, answer), "security": []}


def _readiness() -> Json:
    found = _public("ready", "New traffic may come here.", _status("ready"))
    found["responses"]["503"] = {
        "description": "It should go elsewhere.",
        "headers": _headers(_HINTS),
        "content": _json(
            {"anyOf": [_status("draining", "keys_unavailable", "no_replica_available"), _ref("Error")]},
        ),
    }
    return found


def _models() -> Json:
    return {
        "type": "object",
        "required": ["object", "data"],
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": _ref("Model")}},
    }


def _status(*words: str) -> Json:
    return {
        "type": "object",
        "required": ["status"],
        "properties": {
            "status": {"enum": list(words)},
            "pools_without_replica": {"type": "array", "items": _TEXT},
        },
    }


def _errors(headers: Iterable[str], *groups: Errors) -> Json:
    """Responses by status, the codes of all groups together."""
    codes: dict[int, list[str]] = {}
    for group in groups:
        for status, more in group.items():
            codes.setdefault(status, []).extend(more)
    return {
        str(status): {
            "description": f"{_TITLES[status]} `code`: {', '.join(f'`{code}`' for code in codes[status])}.",
            "headers": _headers((*_extra(status), *headers)),
            "content": _json(_ref("Error")),
            "x-tidegate-codes": codes[status],
        }
        for status in sorted(codes)
    }


def _extra(status: int) -> Iterable[str]:
    """Headers that come with this status."""
    match status:
        case 401:
            return ("www-authenticate",)
        case 405:
            return ("allow",)
        case 429 | 502 | 503 | 504:
            return _HINTS
        case _:
            return ()


def _headers(names: Iterable[str]) -> Json:
    """`x-request-id`, which every response has, and these, which come where they say something."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*_ALWAYS, *names)}


def _json(schema: Json) -> Json:
    return {"application/json": {"schema": schema}}


def _ref(name: Literal["Error", "Model"]) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}
