"""Reads a call into what the rest of the path needs: the request for routing, the model's route, the body to send.

Only what Tidegate must know is looked at. Everything else in the body is the model server's business and is passed on
as it came.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from backends.dialects import protocol
from gateway.body import Body, parse
from gateway.bounds import asked_choices, asked_output
from gateway.errors import InvalidRequest, ModelNotFound
from gateway.fleet import Fleet, ModelRoute
from gateway.keys.principal import Principal, allowed_regions, authorise, may_use
from gateway.keys.records import KeyRecord
from gateway.limits.classes import band_of, urgency, waits_long
from gateway.prompt import session_of
from gateway.store.places import Band
from routing.types import InferenceRequest

if TYPE_CHECKING:
    from gateway.inspection.trial import Trial

CHAT, COMPLETIONS, EMBEDDINGS = protocol.CHAT, protocol.COMPLETIONS, protocol.EMBEDDINGS
INFERENCE_PATHS = (CHAT, COMPLETIONS, EMBEDDINGS)

MAX_REGIONS = 100
"""That one request may name."""
_SELDOM = frozenset({"n", "best_of", "prompt", "service_tier"})
"""Fields of which most requests have none: those of `asked_choices`, and the one that changes the class."""
PASSED_ON = frozenset({b"traceparent", b"tracestate"})
"""The client headers that reach an upstream. Anything else, credentials above all, does not."""
_HEADERS = PASSED_ON | {
    b"x-tidegate-region",
    b"x-tidegate-deadline-ms",
    b"x-tidegate-class",
    b"x-stainless-read-timeout",
}
"""Those, and the ones that `read_order` understands."""


class Call(msgspec.Struct, frozen=True, gc=False):
    """One HTTP request for inference, read whole, as an edge hands it over. Header names are lower case."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes
    received_at: float
    """When its first byte came, in `time.monotonic()` seconds."""
    client: tuple[str, int] | None = None
    """Address and port it came from; None: a Unix socket."""
    trial: Trial | None = None
    """What the gateway's own playground asks of it; None: it is a client's."""


class Order(msgspec.Struct, frozen=True, gc=False):
    """What was asked for, understood."""

    path: str
    request: InferenceRequest
    route: ModelRoute
    body: Body
    expected_choices: int
    hide_usage: bool
    """The caller did not ask for the usage chunk that the gateway asks for."""
    total_s: float
    passed_on: list[tuple[bytes, bytes]]
    band: Band
    """Priority class: the caller's, or a lower one that the request asks for."""
    urgency: int | None
    """The class as engines are told it; None: nobody has a class, nothing is said."""
    flexible: bool
    """It may wait as long as its deadline allows (`service_tier: flex`)."""
    read_timeout_s: float | None
    """After how many seconds without a byte OpenAI's client gives up, where it says so."""
    user: str
    """The end user, as the caller names them; empty: nobody in particular."""


def read_order(call: Call, fleet: Fleet, request_id: str, caller: Principal) -> Order:
    """Raises `InvalidRequest` and `ModelNotFound` with the parameter at fault, and `Forbidden` for what is not the
    caller's to use."""
    body = parse(call.body)
    fields = body.fields
    route = _route(fields.get("model"), fleet, caller)
    if "lora_path" in fields:
        route = _with_lora(route, fields["lora_path"], fleet, caller)
        body = parse(body.with_values({"lora_path": b"null"}))  # no name or path of a client's reaches an engine
        fields = body.fields
    route.pool.rules.check(call.path, body)
    stream = "stream" in fields and _flag(fields, "stream") and call.path != EMBEDDINGS
    regions: tuple[str, ...] = ()
    key = caller.key
    total_s = route.timing.total_s
    if key is not None and key.deadline_ms is not None:
        total_s = min(total_s, key.deadline_ms / 1000)
    asked_class: bytes | None = None
    read_timeout_s: float | None = None
    passed_on: list[tuple[bytes, bytes]] = []
    for name, value in call.headers:
        if name not in _HEADERS:
            continue
        if name in PASSED_ON:
            passed_on.append((name, value))
        elif name == b"x-tidegate-region":
            if regions:  # a proxy's and the client's: nobody can say which of them is to hold
                raise _bad_regions("must come once; name several regions in it, separated by commas")
            regions = _regions(value)
        elif name == b"x-tidegate-deadline-ms":
            total_s = min(route.timing.total_s, _deadline_s(value))
        elif name == b"x-tidegate-class":
            asked_class = value
        elif name == b"x-stainless-read-timeout":
            read_timeout_s = _read_timeout_s(value)
    if key is not None and key.regions:
        regions = allowed_regions(caller, regions)
    plain = _SELDOM.isdisjoint(fields)
    tier = None if plain else fields.get("service_tier")
    max_output_tokens = _max_tokens(call.path, fields, key)
    request = InferenceRequest(
        id=request_id,
        model=route.name,
        adapter=route.adapter,
        stream=stream,
        prompt_bytes=len(call.body),
        max_output_tokens=max_output_tokens,
        regions=regions,
    )
    band = Band.STANDARD
    if key is not None or tier is not None or asked_class is not None:
        band = band_of(None if key is None else key.priority_class, tier, asked_class)
    request.priority = band
    request.ms_per_usd = route.ms_per_usd[band]
    if route.router.wants_prefix:
        request.session = session_of(fields, call.headers, caller.tenant.name)
    hide_usage = False
    if stream:
        options = fields.get("stream_options")
        hide_usage = not (isinstance(options, dict) and options.get("include_usage") is True)
    return Order(
        call.path,
        request,
        route,
        body,
        1 if plain else asked_choices(call.path, fields),
        hide_usage,
        total_s,
        passed_on,
        band,
        None if key is None and band is Band.STANDARD else urgency(band),
        tier is not None and waits_long(tier),
        read_timeout_s,
        _user(fields),
    )


def _route(model: Any, fleet: Fleet, caller: Principal) -> ModelRoute:
    if not isinstance(model, str) or not model:
        raise InvalidRequest("You must name a model, as a string.", param="model", code="missing_model")
    route = fleet.route(model) or _of_several(model, fleet, caller)
    if caller.key is not None:
        if route is None:
            authorise(caller, model)
        else:
            authorise(caller, route.model, route.asked_adapter)
    if route is None:
        raise ModelNotFound(f"The model {model[:200]!r} does not exist here; GET /v1/models lists them.", param="model")
    return route


def _of_several(adapter: str, fleet: Fleet, caller: Principal) -> ModelRoute | None:
    """The route for the name of an adapter that several models have, if the caller may use it with one of them only.

    None when none has it. Raises `InvalidRequest` when it could mean several.
    """
    found = fleet.with_adapter(adapter)
    usable = [route for route in found if may_use(caller, route.model, route.adapter)]
    if len(usable) > 1:
        names = ", ".join(route.name for route in usable[:5])
        raise InvalidRequest(
            f"Several models have a LoRA adapter {adapter[:200]!r}; ask for one of: {names}.",
            param="model",
            code="ambiguous_model",
        )
    return usable[0] if usable else next(iter(found), None)


def _with_lora(route: ModelRoute, asked: Any, fleet: Fleet, caller: Principal) -> ModelRoute:
    """The route with the adapter that `lora_path` names: SGLang's field, in which a path could stand as well.

    Raises `InvalidRequest` for anything but the name of an adapter that the model has, and for another one than the
    model's name asks for. Null asks for nothing.
    """
    if asked is None or (isinstance(asked, str) and asked == route.adapter):
        return route
    if isinstance(asked, str) and asked and route.adapter is None:
        authorise(caller, route.model, asked)  # before it is looked for, so that nobody can find out others' names
        found = fleet.adapted(route, asked)
        if found is not None:
            return found
    why = "names no LoRA adapter of this model"
    if not isinstance(asked, str):
        why = "must be a string"
    elif route.adapter is not None:
        why = "names another LoRA adapter than the model does"
    raise InvalidRequest(
        f"'lora_path' {why}; give the name of one that GET /v1/models lists, never a path.",
        param="lora_path",
        code="unknown_adapter",
    )


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise InvalidRequest(f"{name!r} must be true or false.", param=name, code="invalid_type")


def _regions(value: bytes) -> tuple[str, ...]:
    regions = tuple(dict.fromkeys(part.strip() for part in value.decode("latin-1").split(",") if part.strip()))
    if not regions:
        raise _bad_regions("must name a region, or several separated by commas")
    if len(regions) > MAX_REGIONS:  # each is compared with each replica's, at each choice
        raise _bad_regions(f"may name {MAX_REGIONS} regions at most")
    return regions


def _bad_regions(why: str) -> InvalidRequest:
    return InvalidRequest(f"The header x-tidegate-region {why}.", param="x-tidegate-region", code="invalid_header")


def _deadline_s(value: bytes) -> float:
    # The length comes first: int() itself refuses thousands of digits.
    if len(value) > 16 or not value.isdigit() or not 0 < int(value) <= 86_400_000:
        raise InvalidRequest(
            "The header x-tidegate-deadline-ms must be a whole number of milliseconds, from 1 to 86400000.",
            param="x-tidegate-deadline-ms",
            code="invalid_header",
        )
    return int(value) / 1000


def _read_timeout_s(value: bytes) -> float | None:
    """Seconds, as OpenAI's client writes them; nonsense is nobody's deadline."""
    try:
        seconds = float(value[:20])
    except ValueError:
        return None
    return seconds if 0 < seconds < 1e6 else None


def _user(fields: Mapping[str, Any]) -> str:
    """`safety_identifier`, which has taken the place of `user`, or that."""
    for name in ("safety_identifier", "user"):
        value = fields.get(name)
        if value and isinstance(value, str):
            return value
    return ""


def _max_tokens(path: str, fields: Mapping[str, Any], key: KeyRecord | None) -> int | None:
    """The output that is asked for. Raises `InvalidRequest` when it is more than the caller's key allows."""
    asked = asked_output(path, fields)
    if key is not None and key.max_output_tokens is not None and asked is not None and asked > key.max_output_tokens:
        raise InvalidRequest(
            f"With this API key at most {key.max_output_tokens} tokens of output may be asked for, not {asked}.",
            param="max_tokens",
            code="max_tokens_too_large",
        )
    return asked
