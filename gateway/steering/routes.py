"""Steering: overrides of the configuration, policies and reloads, as routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.admin.desk import Desk
from gateway.admin.guard import operator_of
from gateway.errors import InvalidRequest
from gateway.operations import MAX_BODY_BYTES, Note, body_of, json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.steering import errors
from gateway.steering.compare import MAX_REQUESTS
from gateway.steering.overrides import RULES, Change, Path, shown
from gateway.steering.policies import Policies
from gateway.steering.service import Steering

LIVE_S = 2.0
"""Between two looks at the shadows, while somebody does."""

T = TypeVar("T")
_WRITES = (
    errors.VersionRequired,
    errors.VersionConflict,
    errors.BadOverride,
    errors.UnknownSetting,
    errors.NotChangeable,
    errors.ConfigUnusable,
    errors.NoStateDirectory,
)


class Setting(msgspec.Struct, forbid_unknown_fields=True):
    path: tuple[str, ...]
    value: Any


class Patch(msgspec.Struct, forbid_unknown_fields=True):
    """Overrides to set and to take back; all of it, or nothing."""

    set: tuple[Setting, ...] = ()
    drop: tuple[tuple[str, ...], ...] = ()


class Restore(msgspec.Struct, forbid_unknown_fields=True):
    version: int


class Weight(msgspec.Struct, forbid_unknown_fields=True):
    weight: float


class ModelPrice(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """US dollars per million tokens."""

    input: float | msgspec.UnsetType = msgspec.UNSET
    cached_input: float | msgspec.UnsetType = msgspec.UNSET
    cache_write: float | msgspec.UnsetType = msgspec.UNSET
    output: float | msgspec.UnsetType = msgspec.UNSET


class ModelPolicy(msgspec.Struct, forbid_unknown_fields=True):
    policy: str


class ModelShadow(msgspec.Struct, forbid_unknown_fields=True):
    policy: str | None
    """Null: none, whatever the file says."""
    per_s: float | msgspec.UnsetType = msgspec.UNSET


class Compare(msgspec.Struct, forbid_unknown_fields=True):
    model: str
    policies: tuple[str, ...] = ()
    """None: the one in force, least_outstanding and round_robin."""
    requests: int = 1000
    """How many of the last ones."""


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area."""
    steering = Steering(desk)
    policies = Policies(desk, steering)
    desk.at_end.append(policies.aclose)
    desk.hub.topic("policies", LIVE_S, policies.shown)
    changes, looks = _Changes(steering), _Looks(steering, policies, desk.audit.note)
    weight = "/admin/replicas/{pool}/{replica}/weight"
    price, policy, shadow = (f"/admin/models/{{model:path}}/{name}" for name in ("price", "policy", "shadow"))
    compare = "/admin/policies/compare"

    def write(path: str, endpoint: Any, who: Who, method: str, body: Any = None) -> GuardedRoute:
        return GuardedRoute(path, endpoint, who, methods=[method], about=About(body=body, errors=_WRITES))

    return [
        GuardedRoute("/admin/settings", looks.settings, Who.READER, methods=["GET"]),
        GuardedRoute("/admin/overrides", looks.overrides, Who.READER, methods=["GET"]),
        write("/admin/overrides", changes.patch, Who.OPERATOR, "PATCH", Patch),
        write("/admin/overrides", changes.drop_all, Who.OPERATOR, "DELETE"),
        write("/admin/overrides/restore", changes.restore, Who.OPERATOR, "POST", Restore),
        write(weight, changes.weight, Who.OPERATOR, "PUT", Weight),
        write(weight, changes.no_weight, Who.OPERATOR, "DELETE"),
        write(price, changes.price, Who.OWNER, "PUT", ModelPrice),
        write(price, changes.no_price, Who.OWNER, "DELETE"),
        write(policy, changes.policy, Who.OPERATOR, "PUT", ModelPolicy),
        write(policy, changes.no_policy, Who.OPERATOR, "DELETE"),
        write(shadow, changes.shadow, Who.OPERATOR, "PUT", ModelShadow),
        write(shadow, changes.no_shadow, Who.OPERATOR, "DELETE"),
        GuardedRoute(
            "/admin/reload",
            changes.reload,
            Who.OPERATOR,
            methods=["POST"],
            about=About(errors=(errors.ConfigUnusable, errors.NoStateDirectory)),
        ),
        GuardedRoute("/admin/policies", looks.policies, Who.READER, methods=["GET"]),
        GuardedRoute(
            compare, looks.comparison, Who.READER, methods=["GET"], about=About(errors=(errors.UnknownComparison,))
        ),
        GuardedRoute(
            compare,
            looks.compare,
            Who.OPERATOR,
            methods=["POST"],
            about=About(body=Compare, status=202, errors=(errors.ComparisonRunning, errors.NotChangeable)),
        ),
        GuardedRoute(
            compare, looks.cancel, Who.OPERATOR, methods=["DELETE"], about=About(errors=(errors.UnknownComparison,))
        ),
    ]


class _Looks:
    def __init__(self, steering: Steering, policies: Policies, note: Note) -> None:
        self._steering = steering
        self._policies = policies
        self._note = note

    async def settings(self, request: Request) -> Response:
        """Show the configuration in force, and where each value comes from; secrets are left out."""
        headers = {"cache-control": "no-store", "etag": f'"{self._steering.version}"'}
        return Response(await self._steering.origins(), media_type="application/json", headers=headers)

    async def overrides(self, request: Request) -> Response:
        """Show what operators have changed over file and environment, and the versions that can be restored."""
        book = self._steering.book()
        content = {
            "version": book.version,
            "overrides": self._steering.listed(),
            "history": [
                {
                    "version": each.version,
                    "overrides": len(each.overrides),
                    "ended_by": each.by,
                    "ended_unix_s": round(each.at_unix_s, 3),
                    "change": each.what,
                }
                for each in book.history
            ],
            "changeable": [
                {"path": ".".join(rule.pattern), "what": rule.what, "owner_only": rule.owner} for rule in RULES
            ],
        }
        return _versioned(content, book.version)

    async def policies(self, request: Request) -> Response:
        """Show by which policies models choose replicas, what their shadows would do, and the last comparison."""
        return _result(await self._policies.shown())

    async def compare(self, request: Request) -> Response:
        """Compare policies on recent requests, by simulation; the answer is the job, to be asked for again."""
        order = await _decoded(request, Compare)
        if not 1 <= order.requests <= MAX_REQUESTS:
            raise InvalidRequest(f"requests must be a whole number from 1 to {MAX_REQUESTS}.", param="requests")
        job = self._policies.compare(order.model, order.policies, order.requests, operator_of(request).name)
        await self._note(request, "policy.compare", order.model, {"policies": job.policies, "requests": order.requests})
        return json_response(job.shown(), 202)

    async def comparison(self, request: Request) -> Response:
        """Show the last comparison of policies: how far it is, or its result."""
        return json_response(self._policies.comparison().shown())

    async def cancel(self, request: Request) -> Response:
        """End the comparison that is running."""
        job = await self._policies.cancel()
        await self._note(request, "policy.compare_end", job.model, {})
        return json_response(job.shown())


class _Changes:
    def __init__(self, steering: Steering) -> None:
        self._steering = steering

    async def patch(self, request: Request) -> Response:
        """Set and take back several overrides at once; all of it, or nothing."""
        patch = await _decoded(request, Patch)
        change = Change({each.path: each.value for each in patch.set}, frozenset(patch.drop))
        if not change.paths:
            raise InvalidRequest("There is nothing to change: give set or drop.")
        if len(change.set) < len(patch.set) or change.drop & frozenset(change.set):
            raise InvalidRequest("A setting is named twice.", param="set")
        return await self._changed(request, change, _summary(change))

    async def drop_all(self, request: Request) -> Response:
        """Take back every override: file and environment alone are in force again."""
        drop = frozenset(each.path for each in self._steering.book().overrides)
        return await self._changed(request, Change({}, drop), "take back all overrides")

    async def restore(self, request: Request) -> Response:
        """Put the overrides of a former version into force again."""
        order = await _decoded(request, Restore)
        return _result(await self._steering.restore(request, order.version))

    async def weight(self, request: Request) -> Response:
        """Give a replica another share of the load than the configuration does."""
        return await self._set(request, _replica(request, "weight"), (await _decoded(request, Weight)).weight)

    async def no_weight(self, request: Request) -> Response:
        """Give a replica the share of the load that file and environment say."""
        return await self._drop(request, _replica(request, "weight"))

    async def price(self, request: Request) -> Response:
        """Say what a model's tokens cost."""
        return await self._set(request, _model(request, "price"), _given(await _decoded(request, ModelPrice)))

    async def no_price(self, request: Request) -> Response:
        """Have a model's tokens cost what file and environment say."""
        return await self._drop(request, _model(request, "price"))

    async def policy(self, request: Request) -> Response:
        """Switch the policy by which a model's replicas are chosen."""
        return await self._set(request, _model(request, "policy"), (await _decoded(request, ModelPolicy)).policy)

    async def no_policy(self, request: Request) -> Response:
        """Choose a model's replicas by the policy that file and environment say."""
        return await self._drop(request, _model(request, "policy"))

    async def shadow(self, request: Request) -> Response:
        """Have a second policy decide beside a model's own, without sending anything."""
        order = await _decoded(request, ModelShadow)
        value = None if order.policy is None else _given(order)
        return await self._set(request, _model(request, "shadow"), value)

    async def no_shadow(self, request: Request) -> Response:
        """Have the shadow that file and environment say, or none."""
        return await self._drop(request, _model(request, "shadow"))

    async def reload(self, request: Request) -> Response:
        """Read the configuration file again, now; the answer says what has changed and what needs a restart."""
        return json_response(await self._steering.reload(request))

    async def _set(self, request: Request, path: Path, value: Any) -> Response:
        return await self._changed(request, Change({path: value}), f"set {shown(path)}")

    async def _drop(self, request: Request, path: Path) -> Response:
        return await self._changed(request, Change({}, frozenset((path,))), f"take back {shown(path)}")

    async def _changed(self, request: Request, change: Change, what: str) -> Response:
        return _result(await self._steering.change(request, change, what))


def _summary(change: Change) -> str:
    parts = [f"set {shown(path)}" for path in sorted(change.set)]
    parts += [f"take back {shown(path)}" for path in sorted(change.drop)]
    return ", ".join(parts[:5]) + (f" and {len(parts) - 5} more" if len(parts) > 5 else "")


def _replica(request: Request, name: str) -> Path:
    return ("backends", request.path_params["pool"], "replicas", request.path_params["replica"], name)


def _model(request: Request, name: str) -> Path:
    return ("models", request.path_params["model"], name)


def _given(order: msgspec.Struct) -> dict[str, Any]:
    """The fields that were sent."""
    found: dict[str, Any] = msgspec.to_builtins(order)
    return found


def _result(told: Mapping[str, Any]) -> Response:
    return _versioned(dict(told), told["version"])


def _versioned(content: dict[str, Any], version: int) -> Response:
    response = json_response(content)
    response.headers["etag"] = f'"{version}"'
    return response


async def _decoded(request: Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await body_of(request, MAX_BODY_BYTES), type=kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body cannot be used: {error}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json") from None
