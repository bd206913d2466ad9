"""What the gateway's own playground may ask of the path of a request, and no client can: a tenant without a key,
another policy, one certain replica.

A trial comes in at the inference listener like any request, on a path of its own that shows a secret made at each start
(`gateway.inspection.trial_route`). Admission, limits, residency and records count it as what it is: a request of that
tenant. One that is pinned stays at its model's own pool: it neither spills nor falls back, and is not hedged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.errors import InvalidRequest
from gateway.keys.errors import Forbidden
from gateway.keys.principal import Principal
from gateway.keys.records import TenantRecord
from gateway.prompt import session_of
from routing.policies import POLICY_NAMES, PolicyError, make_policy
from routing.router import Router
from routing.types import Decision, Exclusion, InferenceRequest, Policy, Replica

if TYPE_CHECKING:
    from gateway.admission.gate import Gate
    from gateway.order import Call, Order

PLAYGROUND = "playground"
"""The tenant of trials that name none."""
PINNED = "pinned"
"""Why the other replicas are excluded."""


class NotThere(InvalidRequest):
    """A trial names what does not exist."""

    status = 404


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one request of the playground is to be treated."""

    tenant: str = PLAYGROUND
    policy: str | None = None
    """Instead of the model's own."""
    replica: str | None = None
    """The only one that may answer, by its name in the model's pool."""

    @property
    def stays(self) -> bool:
        """It goes to no other pool or model."""
        return self.policy is not None or self.replica is not None

    def caller(self, gate: Gate) -> Principal:
        """Who is said to send it. Raises `InvalidRequest` for an unknown tenant, `Forbidden` for a disabled one."""
        directory = gate.directory
        if directory is None:
            anonymous = gate.identify([])
            if self.tenant == anonymous.tenant.name:
                return anonymous
            known = self.tenant == PLAYGROUND
            tenant = TenantRecord(self.tenant)
        else:
            known = self.tenant == PLAYGROUND or directory.knows_tenant(self.tenant)
            tenant = directory.tenant(self.tenant)
        if not known:
            raise NotThere("There is no tenant of this name.", param="tenant", code="unknown_tenant")
        if tenant.disabled:
            raise Forbidden("This tenant is disabled.", param="tenant")
        return Principal(None, tenant)

    def steered(self, order: Order, call: Call, caller: Principal) -> Order:
        """The order under the policy, and at the replica, that are asked for. Raises `InvalidRequest`."""
        if not self.stays:
            return order
        route = order.route
        router: Policy = route.router
        if self.policy is not None and self.policy != route.policy:
            if self.policy not in POLICY_NAMES:
                raise InvalidRequest(
                    f"policy must be one of {', '.join(POLICY_NAMES)}, or the model's own.", param="policy"
                )
            router = _router(self.policy, order)
        if self.replica is not None:
            pinned = next((each for each in route.pool.replicas if each.name == self.replica), None)
            if pinned is None:
                names = ", ".join(each.name for each in route.pool.replicas[:20])
                raise NotThere(f"The pool of this model has: {names}.", param="replica", code="unknown_replica")
            router = Pinned(router, pinned)
        request = order.request
        if router.wants_prefix and not route.router.wants_prefix:
            request.session = session_of(order.body.fields, call.headers, caller.tenant.name)
        steered = replace(route, router=router, policy=self.policy or route.policy, hedges=None, continues=False)
        return msgspec.structs.replace(order, route=steered)


def _router(policy: str, order: Order) -> Router:
    """A policy at work on what is known of the order's pool. One that keeps a state of its own begins anew."""
    try:
        chooser = make_policy(policy, Random())
    except PolicyError as error:
        raise InvalidRequest(str(error), param="policy") from error
    state = order.route.pool.routing
    return Router(chooser, state, stay_where_loaded=not getattr(chooser, "weighs_adapters", False))


class Pinned:
    """A policy that may choose one replica only; hard rules hold for that one as for any."""

    def __init__(self, router: Policy, replica: Replica) -> None:
        self.router = router
        self.replica = replica

    @property
    def wants_prefix(self) -> bool:
        return self.router.wants_prefix

    def decide(
        self, request: InferenceRequest, replicas: Sequence[Replica], now: float, tried: Sequence[Replica] = ()
    ) -> Decision:
        decision = self.router.decide(request, [self.replica], now, tried)
        if isinstance(self.router, Router):  # by what it measures replicas of which little is known
            self.router.state.calibration.pool = replicas
        if decision.replica is not None:  # else the one reason that counts is why this one may not be asked
            decision.excluded = [Exclusion(each, PINNED) for each in replicas if each is not self.replica]
            decision.reason = PINNED
        return decision

    def told(self, told: dict[str, Any]) -> dict[str, Any]:
        """An explanation of a decision between all replicas, as it is of one that was pinned: the others stand there
        with what they would have cost."""
        return {**told, "pinned": self.replica.name}

    def fits(
        self, request: InferenceRequest, replicas: Sequence[Replica], now: float, tried: Sequence[Replica] = ()
    ) -> bool:
        return self.router.fits(request, [self.replica], now, tried)

    def dispatched(
        self, request: InferenceRequest, replica: Replica, now: float, decision: Decision | None = None
    ) -> None:
        self.router.dispatched(request, replica, now, decision)

    def first_token(self, request: InferenceRequest, replica: Replica, now: float) -> None:
        self.router.first_token(request, replica, now)

    def finished(
        self,
        request: InferenceRequest,
        replica: Replica,
        now: float,
        *,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        output_tokens: int | None = None,
    ) -> None:
        self.router.finished(
            request,
            replica,
            now,
            prompt_tokens=prompt_tokens,
            cached_tokens=cached_tokens,
            output_tokens=output_tokens,
        )

    def failed(self, request: InferenceRequest, replica: Replica, now: float, *, blamed: bool = True) -> None:
        self.router.failed(request, replica, now, blamed=blamed)
