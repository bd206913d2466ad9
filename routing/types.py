"""The vocabulary of routing: what is asked, who could answer, and what was decided.

`Replica` is the one mutable type. A worker's event loop is its only writer, so choosing a replica and reserving
it must happen without an `await` in between; then no two requests can see the same free place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random
from typing import Protocol

from routing.adapters import Shelf
from routing.capacity import Meter
from routing.chooser import Chooser as Chooser
from routing.credential import Credentials
from routing.health import Cooldown, Health
from routing.load import Load
from routing.pause import Pauses
from routing.prefix import Prefix
from routing.speed import Speed
from routing.work import Work


@dataclass(slots=True)
class InferenceRequest:
    """One inference call, reduced to what a routing decision may depend on. Nobody changes one after it was made.

    Nor does anybody a `Decision` or an `Exclusion`. They are not frozen because that makes them three times as dear.
    """

    id: str
    model: str
    """The name the caller's model resolved to (an alias is resolved before)."""
    stream: bool
    prompt_bytes: int
    """Size of the request body, the cheapest stand-in for prompt length."""
    max_output_tokens: int | None = None
    regions: tuple[str, ...] = ()
    """The only regions the request may be served in; empty means any."""
    adapter: str | None = None
    """LoRA adapter that must be in memory where the request goes, or be loaded there before."""
    prompt_tokens: int = 0
    """Length of the prompt, estimated unless a tokeniser counted it."""
    prefix: Prefix | None = None
    """None where nobody needs to know what is cached."""
    session: str | None = None
    """What the caller says belongs together (`prompt_cache_key`, a session header): a hint, never a lock. Namespaced by
    tenant."""
    priority: int = 1
    """Priority class, 0 the first to be served (`gateway.store.places.Band`)."""
    ms_per_usd: float = 0.0
    """What a dollar is worth to this class of requests, in milliseconds; 0: price does not matter."""


@dataclass(slots=True, eq=False)
class Replica:
    """One model server as the router sees it: what it is, how busy it is, whether it may be used."""

    name: str
    pool: str
    url: str
    engine: str
    region: str | None = None
    weight: float = 1.0
    """Share of work relative to the other replicas of its pool, above 0."""
    max_in_flight: int | None = None
    ceiling: int | None = None
    """Requests of this worker beyond which others are preferred; None where no queue keeps the engine's own short."""
    in_flight: int = 0
    in_flight_bytes: int = 0
    streams: int = 0
    """Those of the requests in flight that are streamed."""
    health: Health = field(default_factory=Health)
    credential: Credentials | None = None
    """The keys it is called with, shared with the other replicas that are called with the same ones."""
    limits: Pauses = field(default_factory=Pauses)
    """Models that it has asked not to be asked for just now, whatever the key."""
    paused_until: float = 0.0
    """No pause, of its own or of its keys, ends later: what a request looks at first."""
    load: Load | None = None
    """The engine's last report about itself; None before the first, or where it makes none."""
    meter: Meter = field(default_factory=Meter)
    """What is known of how much it takes at once."""
    draining: bool = False
    """An operator has asked for no new work to be sent here."""
    adapters: frozenset[str] | None = None
    """LoRA adapters in memory and usable now; None when it is not known which."""
    dp_rank: int | None = None
    """Data-parallel rank of the engine that this replica stands for; None leaves the choice to the engine."""
    epoch: str | None = None
    """Changes when the engine has restarted or changed its weights, so that its cache is empty."""
    work: Work = field(default_factory=Work)
    """What it has to do, all gateways together."""
    speed: Speed = field(default_factory=Speed)
    """How long things take there; learned."""
    context_tokens: int | None = None
    """Longest prompt and output together; None when it is not known."""
    hosted: bool = False
    input_usd_per_million: float = 0.0
    cached_usd_per_million: float = 0.0
    output_usd_per_million: float = 0.0
    adapter_slots: int | None = None
    """LoRA adapters that can be in memory at once; None when it is not known."""
    loadable: frozenset[str] = frozenset()
    """Adapters that could be loaded there when a request wants one."""
    loading: frozenset[str] = frozenset()
    """Those being loaded now."""
    adapter_use: dict[str, int] = field(default_factory=dict)
    """Requests in flight by adapter, this worker's own: an adapter that is in use is not unloaded."""
    shelf: Shelf = field(default_factory=Shelf)
    """When its adapters came and were last wanted."""
    retired: bool = False
    """It has left its pool for good: requests under way may still end there, and nothing is learned from them."""

    def __deepcopy__(self, memo: object) -> Replica:
        """Itself: there is one of each, and a copied policy (`routing.explain`) chooses among the same ones."""
        return self

    @property
    def identity(self) -> str:
        """Digest of address and rank, the same for one engine under any name or position."""
        return blake2b(f"{self.url} {self.dp_rank}".encode(), digest_size=8).hexdigest()

    @property
    def cooldown(self) -> Cooldown:
        return self.health.cooldown

    @property
    def cordoned(self) -> bool:
        """An operator has asked for no new prompts to be sent here: only those that it holds."""
        return self.health.cordoned

    def unavailable_reason(self, now: float) -> str | None:
        """Why no request may go here at `now` (seconds, any monotonic clock); None when one may."""
        # What binds comes before what is only suspected: a policy may ignore a mark of ill health when nothing else
        # is left (`routing.filters.SOFT`), never a drain, a limit or a refused key.
        if self.draining:
            return "draining"
        if self.max_in_flight is not None and self.in_flight >= self.max_in_flight:
            return "full"
        if self.credential is not None and now < self.credential.until:
            return "credential_refused"
        health = self.health
        # What its question would answer first, without the call: this runs for every replica and request.
        reason = None if health.calm and now >= health.cooldown.until else health.unavailable_reason(now)
        if reason is None and self.ceiling is not None and self.in_flight >= self.ceiling:
            return "full"
        return reason

    def limited_until(self, model: str, now: float) -> float:
        """When it may be asked for this model again; 0.0 when it may be now, as far as rate limits go."""
        if now >= self.paused_until:
            return 0.0
        ends = self.limits.until(model, now)
        return ends if self.credential is None else max(ends, self.credential.limited_until(model, now))

    @property
    def at_limit(self) -> bool:
        """Whether it may have no more requests at all, rather than should have none."""
        return self.max_in_flight is not None and self.in_flight >= self.max_in_flight

    def available(self, now: float) -> bool:
        return self.unavailable_reason(now) is None

    def reserve(self, request: InferenceRequest) -> Reservation:
        """Hold one place for the length of a `with` block; released on every way out."""
        return Reservation(self, request.prompt_bytes, request.stream)


class Reservation:
    """One place at a replica. A class, since a generator-based context manager costs three times as much."""

    __slots__ = ("_prompt_bytes", "_replica", "_stream", "_trial")

    def __init__(self, replica: Replica, prompt_bytes: int, stream: bool) -> None:
        self._replica = replica
        self._stream = stream
        self._prompt_bytes = prompt_bytes
        self._trial = 0

    def __enter__(self) -> None:
        replica = self._replica
        replica.in_flight += 1
        replica.in_flight_bytes += self._prompt_bytes
        replica.streams += self._stream
        health = replica.health
        if not health.calm:
            self._trial = health.enter_trial()

    def __exit__(self, *_: object) -> None:
        replica = self._replica
        replica.in_flight -= 1
        replica.in_flight_bytes -= self._prompt_bytes
        replica.streams -= self._stream
        if self._trial:
            replica.health.leave_trial(self._trial)


@dataclass(slots=True)
class Exclusion:
    """A replica that was not considered, and the low-cardinality reason why."""

    replica: Replica
    reason: str


@dataclass(slots=True)
class Decision:
    """What a policy answered: the replica, or None when every candidate was excluded."""

    replica: Replica | None
    reason: str
    """Why this replica, for the `x-tidegate-route-reason` header; low cardinality."""
    excluded: Sequence[Exclusion] = ()
    cached_tokens: int = 0
    """Prompt tokens that the replica is believed to hold."""
    predicted_ttft_ms: float | None = None
    """From dispatch to first token, as far as the policy predicts it."""
    output_tokens: float | None = None
    """Tokens that the answer is expected to have; None where nobody has asked."""


@dataclass(slots=True)
class View:
    """What a policy may look at besides the request and the replicas; it leaves its reason here."""

    now: float
    """Seconds of the router's clock."""
    rng: Random
    matches: Mapping[Replica, int]
    """Prompt tokens that each replica is believed to hold; one that is missing holds none."""
    output_tokens: float
    """Tokens that the answer is expected to have."""
    session: Replica | None = None
    """Where the last request of the same session went; a hint for what `matches` does not know."""
    reason: str = ""
    """Why the chosen one, low cardinality; the policy's name where it says nothing."""
    predicted_ttft_ms: float | None = None


class Policy(Protocol):
    """Chooses a replica, and is told what became of it. Synchronous, without I/O, and free of clocks: `now` is an
    argument, in seconds of any one monotonic clock.

    `decide` changes nothing. What was decided and done is told by the four events, in this order: `dispatched` when
    the request is sent; `first_token` when its first content comes (a whole answer may leave that out); then either
    `finished` or `failed`. A request that is tried again elsewhere begins anew with `dispatched`. Events about a
    request that was never dispatched are ignored.

    `wants_prefix` says whether requests need their `prefix`.

    `tried` holds replicas that already failed this request; a policy never returns one of them, nor one that is at its
    limit, draining or without a valid key. One that is at its ceiling only, or seems unwell, is returned when nothing
    else is left, in this order.
    """

    @property
    def wants_prefix(self) -> bool: ...

    def decide(
        self,
        request: InferenceRequest,
        replicas: Sequence[Replica],
        now: float,
        tried: Sequence[Replica] = (),
    ) -> Decision: ...

    def fits(
        self, request: InferenceRequest, replicas: Sequence[Replica], now: float, tried: Sequence[Replica] = ()
    ) -> bool:
        """Whether `decide` would find a replica now."""
        ...

    def dispatched(
        self, request: InferenceRequest, replica: Replica, now: float, decision: Decision | None = None
    ) -> None:
        """`decision`: the one that is acted on, where it is at hand: it saves looking up what is cached once more."""
        ...

    def first_token(self, request: InferenceRequest, replica: Replica, now: float) -> None: ...

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
        """The counts are the engine's own, None where it does not say."""
        ...

    def failed(self, request: InferenceRequest, replica: Replica, now: float, *, blamed: bool = True) -> None:
        """No answer came, or not the whole of it. `blamed`: it was the replica's fault, and not the request's."""
        ...
