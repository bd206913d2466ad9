"""What would become of a request: which replica would get it, why, and why not the others.

The request is read as it is on its way (`gateway.order`, `gateway.reading.read_prompt`), so that region locks,
permissions, classes, sessions and adapters count; but it is neither admitted nor sent, no limit is touched, and nothing
is learned from it. The answer (`routing.explain`) has none of its text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from math import isfinite
from random import getrandbits
from time import monotonic, time
from typing import Any

import msgspec

from gateway.answers import none_left
from gateway.body import parse
from gateway.errors import InternalError, InvalidRequest
from gateway.fleet import ModelRoute
from gateway.keys.principal import ANONYMOUS, Principal
from gateway.keys.records import PRIORITY_CLASSES
from gateway.order import CHAT, INFERENCE_PATHS, Call, Order, read_order
from gateway.reading import read_prompt
from gateway.record import Exchange
from gateway.runtime import Runtime
from routing.explain import UNDECIDED, explain, rehearsed
from routing.router import Router
from routing.types import Decision, Exclusion

REQUEST_ID = "explained"
_CREDENTIALS = frozenset({"authorization", "x-api-key", "api-key"})
_FIELDS = frozenset({"path", "body", "headers", "key", "tenant"})


class UnknownCaller(InvalidRequest):
    status = 404

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message, param=param, code="unknown_tenant" if param == "tenant" else "unknown_key")


class Question(msgspec.Struct, frozen=True):
    """A request to explain, and who sends it."""

    body: msgspec.Raw
    """As it would be sent, byte for byte."""
    path: str = CHAT
    headers: dict[str, str] = {}
    key: str | None = None
    """The id of an API key."""
    tenant: str | None = None
    """Instead: somebody of this tenant whose key forbids nothing."""


def read_question(raw: bytes) -> Question:
    """A body as it would be sent to `/v1/chat/completions`, or `{"body", "path", "headers", "key", "tenant"}`.

    What has a `body` and no `model` is the second. Raises `InvalidRequest`.
    """
    fields = parse(raw).fields
    if "body" not in fields or "model" in fields:
        return Question(msgspec.Raw(raw))
    for name in fields:
        if name not in _FIELDS:
            raise _invalid(f"{name[:100]!r} is not known beside a body; there are {', '.join(sorted(_FIELDS))}.", name)
    for name in ("key", "tenant"):
        if not isinstance(fields.get(name), str | None):
            raise _invalid(f"{name} must be a string.", name)
    if fields.get("path", CHAT) not in INFERENCE_PATHS:
        raise _invalid(f"path must be one of {', '.join(INFERENCE_PATHS)}.", "path")
    if fields.get("key") is not None and fields.get("tenant") is not None:
        raise _invalid("A key has its tenant; only one of key and tenant can be given.", "tenant")
    _check_headers(fields.get("headers", {}))
    return msgspec.json.decode(raw, type=Question)


def _check_headers(headers: Any) -> None:
    if not isinstance(headers, dict):
        raise _invalid("headers must be an object of names and values.", "headers")
    for name, value in headers.items():
        if not isinstance(value, str) or not name.isascii() or not (value.isprintable() and _is_latin(value)):
            raise _invalid(f"The header {name[:100]!r} must have one line of text.", "headers")
        if name.lower() in _CREDENTIALS:
            raise _invalid(f"No key belongs into {name.lower()} here: its id does, as key.", "headers")


def _is_latin(text: str) -> bool:
    return all(ord(character) < 256 for character in text)


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, param=param, code="invalid_type")


async def explanation(runtime: Runtime, raw: bytes) -> dict[str, Any]:
    """The answer to a question (`read_question`) at this moment.

    Raises what the request would meet on its way: `InvalidRequest`, `ModelNotFound`, `Forbidden`; and `UnknownCaller`.
    """
    question = read_question(raw)
    caller = _caller(runtime, question)
    headers = [(name.lower().encode(), value.encode("latin-1")) for name, value in question.headers.items()]
    call = Call(question.path, headers, bytes(question.body), monotonic())
    order = read_order(call, runtime.fleet, REQUEST_ID, caller)
    exchange = Exchange(REQUEST_ID, order.path, call.received_at, 0.0, tenant=caller.tenant.name)
    if order.route.reader.takes_long(order.request):
        await asyncio.to_thread(read_prompt, order, exchange)
    else:
        read_prompt(order, exchange)
    now, seed = monotonic(), getrandbits(53)
    told = _told(order.route, order, now, seed)
    return {
        "path": order.path,
        "pool": order.route.pool.name,
        "tenant": caller.tenant.name,
        "key": caller.key_id or None,
        "class": PRIORITY_CLASSES[order.band],
        "refusal": _refusal(told, order),
        "spill": _spill(runtime, order, caller, now, seed),
        "fallbacks": runtime.fallbacks.prospects(order, caller),
        **told,
    }


def _caller(runtime: Runtime, question: Question) -> Principal:
    directory = runtime.gate.directory
    if question.key is not None:
        principal = None if directory is None else directory.principal(question.key, time())
        if principal is None:
            raise UnknownCaller("There is no valid API key of this id.", "key")
        return principal
    nobody = runtime.gate.identify([]) if directory is None else Principal(None, ANONYMOUS)
    if question.tenant is None or question.tenant == nobody.tenant.name:
        return nobody
    if directory is None or not directory.knows_tenant(question.tenant):
        raise UnknownCaller("There is no tenant of this name.", "tenant")
    return Principal(None, directory.tenant(question.tenant))


def _told(route: ModelRoute, order: Order, now: float, seed: int) -> dict[str, Any]:
    return explain(_router(route), order.request, route.pool.replicas, now, seed=seed)


def _router(route: ModelRoute) -> Router:
    if not isinstance(route.router, Router):
        raise InternalError("This gateway's policy is of a kind that cannot be explained.")
    return route.router


def _refusal(told: Mapping[str, Any], order: Order) -> dict[str, Any] | None:
    """What the client would get when no replica may have it; with a queue, and replicas that are full, only if none
    becomes free in time."""
    if told["replica"] is not None or told["reason"] == UNDECIDED:
        return None
    by_name = {replica.name: replica for replica in order.route.pool.replicas}
    excluded = [Exclusion(by_name[each["replica"]], each["reason"]) for each in told["excluded"]]
    error = none_left(Decision(None, told["reason"], excluded), order.request.model, monotonic())
    return {"status": error.status, "code": error.code, "message": error.message}


def _spill(runtime: Runtime, order: Order, caller: Principal, now: float, seed: int) -> dict[str, Any] | None:
    """Whether it would leave for rented replicas, and for which; None where the model has no spill."""

    def again(route: ModelRoute) -> ModelRoute:
        return replace(route, router=rehearsed(_router(route), seed))

    prospect = runtime.overflow.would(order, caller, now, again)
    if prospect is None:
        return None
    own_ms, hosted = prospect.own_ms, prospect.hosted
    return {
        "leaves": hosted is not None,
        "reason": prospect.reason,
        "ttft_target_ms": prospect.target_ms,
        "own_ttft_ms": None if own_ms is None or not isfinite(own_ms) else round(own_ms, 3),
        "hosted_ttft_ms": None if prospect.hosted_ms is None else round(prospect.hosted_ms, 3),
        "most_usd": prospect.most_usd,
        "explanation": None if hosted is None else {"pool": hosted.pool.name, **_told(hosted, order, now, seed)},
    }
