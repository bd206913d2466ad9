"""How many pods a workload should have, said through its scale subresource, as `kubectl scale` and an HPA do.

It does not decide: `routing.scaling` does. A workload that an HPA or KEDA scales as well has two masters; use one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from random import Random
from typing import Any, Final, Literal, NamedTuple, TypeVar

import msgspec

from backends.kubernetes.client import Access, Cluster, Resource, connect
from backends.kubernetes.errors import ApiAnswered, ApiAway, Conflict, KubernetesError, NotThere
from backends.kubernetes.threads import blocking

T = TypeVar("T")
Kind = Literal["Deployment", "StatefulSet", "LeaderWorkerSet"]

RESOURCES: Final[Mapping[Kind, Resource]] = {
    "Deployment": Resource("apps", "v1", "deployments"),
    "StatefulSet": Resource("apps", "v1", "statefulsets"),
    "LeaderWorkerSet": Resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets"),
}
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""Of pods of a ReplicaSet, those with the lowest go first; without it a pod has 0.
https://kubernetes.io/docs/concepts/workloads/controllers/replicaset/#pod-deletion-cost"""
CHEAP = "-100"
RESTARTED_AT = "kubectl.kubernetes.io/restartedAt"
"""What `kubectl rollout restart` changes, so that the pod template is a new one."""
CONFLICT_TRIES = 4


class Count(NamedTuple):
    """Replicas of a workload; of a LeaderWorkerSet, groups of pods."""

    spec: int
    """That it should have."""
    status: int
    """That there are, ready or not."""


class _Spec(msgspec.Struct):
    replicas: int = 0
    """Zero is left out by Go's `omitempty`."""


class _Scale(msgspec.Struct):
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Spec = msgspec.field(default_factory=_Spec)


class KubernetesScaler:
    """One workload's replicas. One event loop's; does one thing at a time, in at most one thread.

    Everything raises `KubernetesError`, whose message names the object, and the right where one is missing.
    """

    def __init__(
        self,
        access: Access,
        kind: Kind,
        name: str,
        *,
        timeout_s: float = 10.0,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: Random | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.kind: Kind = kind
        self.name = name
        self._access = access
        self._environ = environ
        self._resource = RESOURCES[kind]
        self._timeout_s = timeout_s
        self._now = now
        self._rng = rng or Random()
        self._cluster: Cluster | None = None
        self._one_at_a_time = asyncio.Lock()
        self._cheap: frozenset[str] = frozenset()

    async def current(self) -> Count:
        """How many there should be, and are."""
        return _count(await self._call(lambda cluster: cluster.scale(self._resource, self.name, self._timeout_s)))

    async def scale(self, count: int) -> Count:
        """Have `count` replicas, 0 or more. Returns as soon as it is accepted; that there are so many takes longer."""
        if count < 0:
            raise ValueError(f"{count} replicas of {self.kind} {self.name}: use 0 or more")
        body = {"spec": {"replicas": count}}
        return _count(
            await self._call(lambda cluster: cluster.patch_scale(self._resource, self.name, body, self._timeout_s))
        )

    async def prefer_to_remove(self, pod_names: Collection[str]) -> bool:
        """Have these pods go first when there are to be fewer, and no others that were named before.

        False: this kind of workload does not let anybody choose (`leaving` says which ones go). Pods that are gone
        already are passed over.
        """
        if self.kind != "Deployment":
            return False
        wanted = frozenset(pod_names)
        for name in sorted(wanted | self._cheap):
            await self._mark(name, CHEAP if name in wanted else None)
            self._cheap = self._cheap | {name} if name in wanted else self._cheap - {name}
        return True

    async def restart(self) -> None:
        """Replace all pods, a few at a time as the workload's strategy says, as `kubectl rollout restart` does."""
        annotations = {"metadata": {"annotations": {RESTARTED_AT: self._now().isoformat(timespec="seconds")}}}
        spec: dict[str, Any] = {"template": annotations}
        if self.kind == "LeaderWorkerSet":  # which kubectl has no restart for; a new worker template replaces groups
            spec = {"leaderWorkerTemplate": {"workerTemplate": annotations}}
        body = {"spec": spec}
        await self._call(lambda cluster: cluster.patch_workload(self._resource, self.name, body, self._timeout_s))

    async def close(self) -> None:
        """Close the connections. What is under way ends with `ApiAway`; the scaler may be used again."""
        self._forget()

    async def _mark(self, pod: str, cost: str | None) -> None:
        body = {"metadata": {"annotations": {DELETION_COST: cost}}}  # null takes an annotation away
        try:
            await self._call(lambda cluster: cluster.patch_pod(pod, body, self._timeout_s))
        except NotThere:
            return

    async def _call(self, work: Callable[[Cluster], T]) -> T:
        """Do it, once more after a conflict, within the time limit for all of it."""
        async with self._one_at_a_time:
            for tries_left in reversed(range(CONFLICT_TRIES)):
                try:
                    return await self._once(work)
                except Conflict:
                    if not tries_left:
                        raise
                await asyncio.sleep(self._rng.uniform(0.02, 0.1) * (CONFLICT_TRIES - tries_left))
            raise AssertionError("unreachable: the last try returns or raises")

    async def _once(self, work: Callable[[Cluster], T]) -> T:
        try:
            return await blocking(lambda: work(self._connected()), self._forget, self._timeout_s)
        except TimeoutError:
            where = f"namespace {self._access.namespace}" if self._access.namespace else "its namespace"
            raise ApiAway(
                f"{self.kind} {self.name} in {where}: the API server did not answer within {self._timeout_s:g} s"
            ) from None
        except KubernetesError as error:
            if not isinstance(error, ApiAnswered) or error.status == 401:
                self._forget()  # the token, the authority or the address may be others by now
            raise

    def _connected(self) -> Cluster:
        cluster = self._cluster
        if cluster is None:
            cluster = self._cluster = connect(self._access, self._environ)
        return cluster

    def _forget(self) -> None:
        cluster, self._cluster = self._cluster, None
        if cluster is not None:
            cluster.close()


def leaving(kind: Kind, pod_names: Sequence[str], count: int) -> tuple[str, ...] | None:
    """Which of these pods go when there are to be `count`: of a StatefulSet and of a LeaderWorkerSet's leaders, those
    with the highest numbers. None: nobody can know, as with a Deployment (`prefer_to_remove` sees to it there).

    >>> leaving("StatefulSet", ["sglang-0", "sglang-10", "sglang-2"], 2)
    ('sglang-10',)
    """
    if kind == "Deployment":
        return None
    numbered = sorted(pod_names, key=_ordinal)
    return tuple(reversed(numbered[count:]))


def _ordinal(pod_name: str) -> tuple[int, str]:
    number = pod_name.rpartition("-")[2]
    return (int(number) if number.isdecimal() else -1, pod_name)


def _count(data: bytes) -> Count:
    try:
        scale = msgspec.json.decode(data, type=_Scale)
    except msgspec.MsgspecError as error:
        raise ApiAway(f"what the API server sent is no Scale: {error}") from error
    return Count(scale.spec.replicas, scale.status.replicas)
