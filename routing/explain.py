"""Why a request would go where it would go: every candidate with every term of its cost, and all that it was made from.

An explanation is plain data (JSON): it holds what was decided and everything that the decision depended on, so that it
can be kept, sent to somebody, and replayed with the same or another policy (`replay`). It holds no text of the request:
of the prompt the keys only, of a session its digest.

Explaining changes nothing: a policy with state of its own (a position in a round, a tree) is asked in a rehearsal, as a
copy of itself. What is left to chance is drawn from a seed that is part of the explanation, so that a replay draws the
same. Hence, among near-ties, the request itself may go elsewhere: they are named in `near_ties`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import fields
from random import Random
from typing import Any

from routing.adapters import ELSEWHERE
from routing.filters import exclusion_reason
from routing.health import Health
from routing.load import Load
from routing.policies.cost import Cost, averages
from routing.policies.hashing import session_digest
from routing.prefix import Prefix
from routing.router import Router
from routing.speed import Speed
from routing.types import Chooser, Decision, InferenceRequest, Replica, View
from routing.work import Totals

VERSION = 1
UNDECIDED = "policy_cannot_be_rehearsed"
"""Reason of an explanation without a decision: asking the policy would change it, and it cannot be copied."""
_REQUEST = (
    "id",
    "model",
    "adapter",
    "stream",
    "prompt_bytes",
    "prompt_tokens",
    "max_output_tokens",
    "priority",
    "ms_per_usd",
)
_REPLICA = (
    "name",
    "pool",
    "url",
    "dp_rank",
    "engine",
    "region",
    "weight",
    "context_tokens",
    "hosted",
    "input_usd_per_million",
    "cached_usd_per_million",
    "output_usd_per_million",
    "adapter_slots",
    "in_flight",
)
_SPEED = tuple(each.name for each in fields(Speed))
_LOAD = tuple(each.name for each in fields(Load) if each.name != "observed_at")


def explain(
    router: Router,
    request: InferenceRequest,
    replicas: Sequence[Replica],
    now: float,
    tried: Sequence[Replica] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """What `router` would do with the request now. Times are milliseconds; lengths are tokens."""
    view = router.view(request, now)
    chooser = _Watched(rehearsal(router.chooser, seed), router.chooser)
    twin = Router(chooser, router.state, Random(seed), stay_where_loaded=router.stay_where_loaded)
    decision = twin.decide(request, replicas, now, tried)
    reasons = {each: exclusion_reason(request, each, now, tried) for each in replicas}
    undecided = decision.replica is not None and chooser.twin is None
    told = {
        "version": VERSION,
        "policy": router.name,
        "seed": seed,
        "replica": None if decision.replica is None or undecided else decision.replica.name,
        "reason": UNDECIDED if undecided else decision.reason,
        "predicted_cached_tokens": 0 if undecided else decision.cached_tokens,
        "predicted_ttft_ms": _rounded(decision.predicted_ttft_ms),
    }
    return {
        **told,
        **_table(router.chooser, request, chooser.candidates, view, reasons),
        "excluded": [
            {"replica": each.name, "region": each.region, "reason": reason or ELSEWHERE}
            for each, reason in reasons.items()
            if each not in chooser.candidates
        ],
        "request": {
            **{name: getattr(request, name) for name in _REQUEST},
            "regions": list(request.regions),
            "session": None if request.session is None else session_digest(request.session),
            "expected_output_tokens": view.output_tokens,
            "prefix": None if request.prefix is None else _prefix_shown(request.prefix),
        },
        "session_replica": None if view.session is None else view.session.name,
        "state": [_state(replica, view) for replica in replicas],
    }


def decided(
    router: Router,
    request: InferenceRequest,
    replicas: Sequence[Replica],
    now: float,
    tried: Sequence[Replica],
    decision: Decision,
) -> dict[str, Any]:
    """What a decision that was just made was made from, before anything has come of it: as `explain`, without the state
    that a replay would need, and not rounded, which would take a third of the time. The policy is not asked again."""
    chooser = _Settled(router.chooser, decision.replica)
    twin = Router(chooser, router.state, Random(0), stay_where_loaded=router.stay_where_loaded)
    twin.decide(request, replicas, now, tried)
    view = chooser.view or router.view(request, now)
    reasons = {each: exclusion_reason(request, each, now, tried) for each in replicas}
    considered = set(chooser.candidates)
    return {
        "policy": router.name,
        "replica": None if decision.replica is None else decision.replica.name,
        "reason": decision.reason,
        "predicted_cached_tokens": decision.cached_tokens,
        "predicted_ttft_ms": decision.predicted_ttft_ms,
        **_table(router.chooser, request, chooser.candidates, view, reasons, exact=True),
        "excluded": [
            {"replica": each.name, "region": each.region, "reason": reason or ELSEWHERE}
            for each, reason in reasons.items()
            if each not in considered
        ],
        "prompt_tokens": request.prompt_tokens,
        "expected_output_tokens": view.output_tokens,
        "session_replica": None if view.session is None else view.session.name,
    }


def rehearsal(chooser: Chooser, seed: int) -> Chooser | None:
    """One that chooses as this one would, once, and changes nothing by it; None where no copy can be made.

    A copy, with its own state and with chance drawn from `seed`; or what the policy's own `rehearsal()` returns, where
    it has that because a copy would be too large.
    """
    own: Callable[[], Chooser] | None = getattr(chooser, "rehearsal", None)
    try:
        twin = deepcopy(chooser) if own is None else own()
    except Exception:  # a foreign policy may hold anything: locks, files, other processes
        return None
    if isinstance(getattr(twin, "_rng", None), Random):
        twin._rng = Random(seed)  # type: ignore[attr-defined]
    return twin


def rehearsed(router: Router, seed: int) -> Router:
    """One for a single question, which leaves no trace. Where the policy cannot be rehearsed, the first candidate is
    its answer."""
    chooser = _Watched(rehearsal(router.chooser, seed), router.chooser)
    return Router(chooser, router.state, Random(seed), stay_where_loaded=router.stay_where_loaded)


class _Watched:
    """Remembers between whom a policy was to choose. Where it cannot be rehearsed, the first stands for any."""

    def __init__(self, twin: Chooser | None, chooser: Chooser) -> None:
        self.twin = twin
        self.name = chooser.name
        self.wants_prefix = chooser.wants_prefix
        self.candidates: Sequence[Replica] = ()

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        self.candidates = candidates
        return candidates[0] if self.twin is None else self.twin(request, candidates, view)


class _Settled:
    """Chooses what was chosen, and remembers between whom."""

    def __init__(self, chooser: Chooser, chosen: Replica | None) -> None:
        self.name = chooser.name
        self.wants_prefix = chooser.wants_prefix
        self.candidates: Sequence[Replica] = ()
        self.view: View | None = None
        self._chosen = chosen

    def __call__(self, request: InferenceRequest, candidates: Sequence[Replica], view: View) -> Replica:
        self.candidates, self.view = candidates, view
        return self._chosen or candidates[0]


def replay(
    record: Mapping[str, Any], make: Callable[[str, Random], Chooser], policy: str | None = None
) -> dict[str, Any]:
    """Decide again from a kept explanation; `policy`: by another one. Policies that keep state of their own (a tree, a
    position in a round) begin without it. Raises `ValueError` for what is no explanation of this version, and whatever
    `make` raises."""
    if record.get("version") != VERSION:
        raise ValueError(f"this is no explanation of version {VERSION}")
    name = policy or str(record.get("policy"))
    chooser = make(name, Random(_seed(record)))
    try:
        request = _request(record["request"])
        replicas = {state["name"]: _replica(state) for state in record["state"]}
        cached = {
            replicas[state["name"]]: int(state["cached_tokens"]) for state in record["state"] if state["cached_tokens"]
        }
        considered = {each["replica"]: each["despite"] for each in record["candidates"]}
        session = None if record["session_replica"] is None else replicas[record["session_replica"]]
        output_tokens = float(record["request"]["expected_output_tokens"])
        view = View(0.0, Random(_seed(record)), cached, output_tokens, session)
        candidates = [each for each in replicas.values() if each.name in considered]
        chosen: Replica | None = None
        if candidates:
            chosen = chooser(request, candidates, view)
        reasons = {each: considered[each.name] for each in candidates}
        return {
            **record,
            "policy": name,
            "replica": None if chosen is None else chosen.name,
            "reason": record["reason"] if chosen is None else _forced(record) or view.reason or chooser.name,
            "predicted_cached_tokens": 0 if chosen is None else cached.get(chosen, 0),
            "predicted_ttft_ms": _rounded(view.predicted_ttft_ms),
            **_table(chooser, request, candidates, view, reasons),
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise ValueError(f"this is no explanation: {type(error).__name__}: {error}") from error


def _seed(record: Mapping[str, Any]) -> int:
    seed = record.get("seed")
    if not isinstance(seed, int):
        raise ValueError("this is no explanation: it has no seed")
    return seed


def _forced(record: Mapping[str, Any]) -> str:
    """The reason of a decision for want of anybody without a mark; empty: there was somebody."""
    forced = all(each["despite"] for each in record["candidates"])
    return str(record["reason"]) if forced and record["reason"] != UNDECIDED else ""


def _table(
    chooser: Chooser,
    request: InferenceRequest,
    candidates: Sequence[Replica],
    view: View,
    reasons: Mapping[Replica, str | None],
    *,
    exact: bool = False,
) -> dict[str, Any]:
    """The candidates, the cheapest first where the policy has costs, and between which of them chance decides.
    `despite`: the reason against one, which was put aside because there was nobody without any. `exact`: not rounded.
    """
    usual = averages(candidates)
    rows = []
    for replica in candidates:
        terms = chooser.terms(request, replica, view, usual) if isinstance(chooser, Cost) else {}
        cost, ttft = terms.pop("cost", None), terms.pop("ttft", None)
        rows.append(
            {
                "replica": replica.name,
                "region": replica.region,
                "despite": reasons[replica],
                "cached_tokens": view.matches.get(replica, 0),
                "in_flight": replica.in_flight,
                "cost_ms": cost if exact else _rounded(cost),
                "ttft_ms": ttft if exact else _rounded(ttft),
                "terms_ms": terms if exact else {name: _rounded(value) for name, value in terms.items()},
            }
        )
    rows.sort(key=_cost_of)
    return {"candidates": rows, "near_ties": _near_ties(chooser, rows)}


def _cost_of(row: Mapping[str, Any]) -> float:
    return 0.0 if row["cost_ms"] is None else float(row["cost_ms"])


def _near_ties(chooser: Chooser, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not isinstance(chooser, Cost) or not rows:
        return []
    limit = rows[0]["cost_ms"] + chooser.weights.tie * rows[0]["ttft_ms"]
    near = [str(row["replica"]) for row in rows if row["cost_ms"] <= limit]
    return near if len(near) > 1 else []


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


# -- what a decision depends on, as data and back


def _state(replica: Replica, view: View) -> dict[str, Any]:
    """All that a decision about this replica depends on."""
    work, speed, load = replica.work, replica.speed, replica.load
    return {
        **{name: getattr(replica, name) for name in _REPLICA},
        "cached_tokens": view.matches.get(replica, 0),
        "kv_tokens": replica.meter.capacity.tokens,
        "share": replica.health.share(view.now),
        "adapters": _names(replica.adapters),
        "loadable": _names(replica.loadable),
        "loading": _names(replica.loading),
        "work": {
            "queued": work.queued,
            "queued_tokens": work.queued_tokens,
            "running": work.running,
            "running_tokens": work.running_tokens,
            "prefill_for_ms": (view.now - work.since) * 1000.0 if work.queued else 0.0,
        },
        "speed": {name: getattr(speed, name) for name in _SPEED},
        "load": None
        if load is None
        else {"age_s": view.now - load.observed_at, **{name: getattr(load, name) for name in _LOAD}},
    }


def _names(names: Iterable[str] | None) -> list[str] | None:
    return None if names is None else sorted(names)


def _request(data: Mapping[str, Any]) -> InferenceRequest:
    prefix = data["prefix"]
    return InferenceRequest(
        **{name: data[name] for name in _REQUEST},
        regions=tuple(data["regions"]),
        session=data["session"],
        prefix=None if prefix is None else _prefix(prefix),
    )


def _prefix_shown(prefix: Prefix) -> dict[str, Any]:
    # Digests as text: they have 64 bits, and most readers of JSON keep 53.
    return {
        "digests": [f"{digest:016x}" for digest in prefix.digests],
        "ends": prefix.ends,
        "total": prefix.total,
        "tails": [[f"{digest:016x}", end] for digest, end in prefix.tails],
        "unit_tokens": prefix.unit_tokens,
    }


def _prefix(data: Mapping[str, Any]) -> Prefix:
    return Prefix(
        [int(digest, 16) for digest in data["digests"]],
        [int(end) for end in data["ends"]],
        int(data["total"]),
        [(int(digest, 16), int(end)) for digest, end in data["tails"]],
        float(data["unit_tokens"]),
    )


def _replica(state: Mapping[str, Any]) -> Replica:
    replica = Replica(**{name: state[name] for name in _REPLICA})
    for name in _SPEED:
        setattr(replica.speed, name, state["speed"][name])
    replica.adapters = None if state["adapters"] is None else frozenset(state["adapters"])
    replica.loadable, replica.loading = frozenset(state["loadable"]), frozenset(state["loading"])
    replica.meter.configure(None, state["kv_tokens"])
    work, load = state["work"], state["load"]
    replica.work.peer(
        "replayed", Totals(work["queued"], work["queued_tokens"], work["running"], work["running_tokens"]), 0.0
    )
    replica.work.since = -work["prefill_for_ms"] / 1000.0
    if load is not None:
        replica.load = Load(-load["age_s"], **{name: load[name] for name in _LOAD})
    if state["share"] < 1.0:
        replica.health = Health(replica.health.rules)
        rules = replica.health.rules
        through = (state["share"] - rules.slow_start_floor) / (1.0 - rules.slow_start_floor)
        replica.health.warm_from = -max(0.0, through) * rules.slow_start_s
    return replica
