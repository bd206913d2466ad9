"""Reads a call into what the rest of the path needs: the request for routing, the model's route, the body to send.

Only what Tidegate must know is looked at. Everything else in the body is the model server's business and is passed on
as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.body import Body, parse
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.fleet import Fleet, ModelRoute
from routing.types import InferenceRequest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
INFERENCE_PATHS = (CHAT, COMPLETIONS, EMBEDDINGS)

PASSED_ON = frozenset({b"traceparent", b"tracestate"})
"""The client headers that reach an upstream. Anything else, credentials above all, does not."""


class Call(msgspec.Struct, frozen=True):
    """One HTTP request for inference, read whole, as an edge hands it over. Header names are lower case."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    received_at: float
    """When its first byte came, in `time.monotonic()` seconds."""


class Order(msgspec.Struct, frozen=True):
    """What was asked for, understood."""

    request: InferenceRequest
    route: ModelRoute
    body: Body
    expected_choices: int
    hide_usage: bool
    """The caller did not ask for the usage chunk that the gateway asks for."""
    total_s: float
    passed_on: list[tuple[bytes, bytes]]


def read_order(call: Call, fleet: Fleet, request_id: str) -> Order:
    """Raises `InvalidRequest` and `ModelNotFound` with the parameter at fault."""
    body = parse(call.body)
    fields = body.fields
    route = _route(fields.get("model"), fleet)
    if not route.pool.reserved.isdisjoint(fields):
        _refuse_reserved(route.pool.reserved, fields)
    stream = _flag(fields, "stream") and call.path != EMBEDDINGS
    regions: tuple[str, ...] = ()
    total_s = route.timing.total_s
    passed_on: list[tuple[bytes, bytes]] = []
    for name, value in call.headers:
        if name in PASSED_ON:
            passed_on.append((name, value))
        elif name == b"x-tidegate-region":
            regions = _regions(value)
        elif name == b"x-tidegate-deadline-ms":
            total_s = min(total_s, _deadline_s(value))
    request = InferenceRequest(
        id=request_id,
        model=route.name,
        adapter=route.adapter,
        stream=stream,
        prompt_bytes=len(call.body),
        max_output_tokens=_max_tokens(fields),
        regions=regions,
    )
    options = fields.get("stream_options")
    hide_usage = stream and not (isinstance(options, dict) and options.get("include_usage") is True)
    return Order(request, route, body, _expected_choices(call.path, fields), hide_usage, total_s, passed_on)


def _route(model: Any, fleet: Fleet) -> ModelRoute:
    if not isinstance(model, str) or not model:
        raise InvalidRequest("You must name a model, as a string.", param="model", code="missing_model")
    route = fleet.route(model)
    if route is None:
        raise ModelNotFound(f"The model {model[:200]!r} does not exist here; GET /v1/models lists them.", param="model")
    return route


def _refuse_reserved(reserved: frozenset[str], fields: Mapping[str, Any]) -> None:
    name = next(name for name in fields if name in reserved)
    raise InvalidRequest(
        f"{name!r} steers the model server itself; the gateway sets it, and clients may not.",
        param=name,
        code="reserved_parameter",
    )


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{name!r} must be true or false.", param=name, code="invalid_type")


def _regions(value: bytes) -> tuple[str, ...]:
    regions = tuple(part.strip() for part in value.decode("latin-1").split(",") if part.strip())
    if not regions:
        raise InvalidRequest(
            "The header x-tidegate-region must name a region, or several separated by commas.",
            param="x-tidegate-region",
            code="invalid_header",
        )
    return regions


def _deadline_s(value: bytes) -> float:
    # The length comes first: int() itself refuses thousands of digits.
    if len(value) > 16 or not value.isdigit() or not 0 < int(value) <= 86_400_000:
        raise InvalidRequest(
            "The header x-tidegate-deadline-ms must be a whole number of milliseconds, from 1 to 86400000.",
            param="x-tidegate-deadline-ms",
            code="invalid_header",
        )
    return int(value) / 1000


def _max_tokens(fields: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        value = fields.get(name)
        if type(value) is int:
            return value
    return None


def _expected_choices(path: str, fields: Mapping[str, Any]) -> int:
    """How many choices must finish: `n` for each prompt. Nonsense counts as one and is the engine's to refuse.

    Engines that validate leniently read `2.0` and `"2"` as 2; believing them means not taking half an answer for all.
    """
    n = fields.get("n")
    if (isinstance(n, float) and n.is_integer()) or (isinstance(n, str) and n.isascii() and n.isdigit() and len(n) < 6):
        n = int(n)
    choices = n if type(n) is int and n > 0 else 1
    prompt = fields.get("prompt")
    if path == COMPLETIONS and isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        choices *= len(prompt)
    return choices
