"""What Tidegate needs to be told about one kind of model server, and the types it is told in.

A dialect holds no state and no connection. What happens on the way of a request is synchronous (`prepare`,
`read_usage`, `judge_error`, `abort_request`); what is asked beside it goes through a `SideChannel`, which the caller
owns. What an engine does not offer is answered by raising `NotOffered`, never by inventing a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

import msgspec

from backends.side import SideChannel
from backends.usage import Usage

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


class Priority(StrEnum):
    """Which way an engine reads the number in its `priority` field. SGLang and vLLM disagree."""

    NONE = "none"
    """It has no such field."""
    HIGHER_FIRST = "higher_first"
    LOWER_FIRST = "lower_first"


class Readiness(StrEnum):
    """What a cheap question to the engine showed. Silence and refused connections are errors, not answers."""

    READY = "ready"
    NOT_READY = "not_ready"
    """It answered that it takes no work: still loading its model, or being stopped."""
    UNAUTHORIZED = "unauthorized"
    """It is there, and refused our credential (401 or 403), or the account behind it is out of money."""


class Fault(StrEnum):
    """Whose doing an error answer is, and so what it says about the replica that gave it."""

    REQUEST = "request"
    """The caller's: the answer is passed on as it is. The replica is well."""
    OVERLOAD = "overload"
    """Too much work just now, or a rate limit: load, no failure. Another replica may have room."""
    CREDENTIAL = "credential"
    """Ours: the key is refused or may not do this, or the account is out of money. Not the replica's, whose other
    keys may work; and nothing that waiting a second mends."""
    FAILURE = "failure"
    """The replica's own."""


class NotOffered(Exception):
    """The engine, or the version of it that runs, has no such thing; the message says what is missing."""


class AdapterRefused(Exception):
    """The engine would not load or unload an adapter; the message is its own reason, cleaned of nothing."""


class Wish(msgspec.Struct, frozen=True, gc=False):
    """One request, as a dialect is asked to prepare it for its engine."""

    path: str
    """The OpenAI path the client called: `CHAT`, `COMPLETIONS` or `EMBEDDINGS`."""
    fields: Mapping[str, Any]
    """The caller's body, parsed. Not to be changed."""
    request_id: str
    stream: bool
    model: str | None = None
    """The name to send upstream; None leaves the caller's own name in the body."""
    adapter: str | None = None
    """LoRA adapter to use; the dialect knows how its engine addresses it."""
    adapters: Sequence[Adapter] = ()
    """What the replica said it holds, for engines that address adapters by number."""
    urgency: int | None = None
    """0: like any other request. Higher is more urgent, whatever the engine's own direction is.

    It takes the place of a `priority` that the caller sent. None leaves the caller's.
    """
    priority: Priority | None = None
    """Which way this server reads priorities, as it says itself; None: the dialect's."""
    dp_rank: int | None = None
    """Data-parallel rank to run on; None lets the engine choose."""
    cache_salt: str | None = None
    """What the engine is to keep this request's cache apart by, instead of what the caller says; None: nothing."""


class Prepared(msgspec.Struct, gc=False):
    """How a wish is put to the engine."""

    path: str
    """Path to POST to, below the replica's prefix."""
    values: dict[str, bytes]
    """Top-level values to set in the caller's body, as JSON text."""
    body: bytes | None = None
    """A body of the dialect's own making, instead of the caller's with `values`."""
    translation: Translation | None = None
    """What turns the answer into OpenAI's; None when it is that already. One per attempt."""


class Translation(Protocol):
    """Reads one answer of an engine and says it in OpenAI's words. Synchronous; one per attempt."""

    def whole(self, body: bytes) -> bytes:
        """A complete JSON answer (status 200) as OpenAI's. Raises `TranslationError`."""
        ...

    def feed(self, data: bytes) -> bytes:
        """The next bytes of an event stream, as bytes of an OpenAI event stream (`data: …` and `[DONE]`).

        Raises `TranslationError`. For a caller who did not ask for a stream, returns nothing, see `assembled`.
        """
        ...

    def assembled(self) -> bytes | None:
        """After the end of a stream that was fed: the whole JSON answer for a caller who wanted one.

        None when the stream stopped before the answer was complete.
        """
        ...


class TranslationError(Exception):
    """The engine sent what cannot be translated, or an error in the stream: `error` is an OpenAI error object.

    `error["code"]`, when it is a number, is the HTTP status that fits it.
    """

    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error.get("message"))
        self.error = error


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that a replica knows."""

    name: str
    path: str | None = None
    id: int | None = None
    """llama.cpp addresses adapters by number."""
    resident: bool = True
    """In memory and usable now."""


@dataclass(frozen=True, slots=True)
class KvEventsEndpoint:
    """Where an engine publishes what its KV cache stores and drops (ZeroMQ)."""

    endpoint: str
    """`tcp://host:port` or `ipc://path`; port of rank 0, rank r is at port + r."""
    replay_endpoint: str | None = None
    topic: str = ""
    block_size: int | None = None
    dp_size: int = 1


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine is. None means that it does not say."""

    version: str | None = None
    models: tuple[str, ...] = ()
    """Names it serves, adapters excluded where they can be told apart."""
    epoch: str | None = None
    """Changes whenever the engine has restarted or changed its weights, so that its cache is empty."""
    context_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    max_running: int | None = None
    """Requests that it runs at once at most, all ranks together; its memory may hold fewer."""
    priority: Priority | None = None
    """Which way it reads the `priority` of requests; None where it does not say whether it does."""
    block_size: int | None = None
    """Tokens in a page of the KV cache."""
    dp_size: int = 1
    role: str | None = None
    """`prefill` or `decode` in a disaggregated deployment; None for both."""
    kv_events: KvEventsEndpoint | None = None
    trims_text: bool = False
    """Its chat template takes white space off the end of a text that it is to go on from (`Dialect.continuation`)."""
    lacks: tuple[tuple[str, str], ...] = ()
    """Signals that this server is known to be without, each with the reason: ("cached_tokens", "start it with …")."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """One report of an engine about itself. Totals are cumulative since it started; None: it does not say."""

    running: int | None = None
    max_running: int | None = None
    """Requests that it runs at once at most."""
    waiting: int | None = None
    waiting_uncached_tokens: int | None = None
    kv_use: float | None = None
    kv_used_tokens: int | None = None
    kv_capacity_tokens: int | None = None
    prefill_tokens_total: int | None = None
    """Uncached prompt tokens processed."""
    prefill_busy_s_total: float | None = None
    """Seconds spent on them."""
    generated_tokens_total: int | None = None
    adapter_slots: int | None = None
    adapter_slots_used: int | None = None
    resident_adapters: tuple[str, ...] | None = None


class Dialect(Protocol):
    """One kind of model server."""

    name: str
    """The `engine` of the configuration."""
    hosted: bool
    """Rented: asked seldom, and never asked twice for what may have been billed."""
    priority: Priority
    reserved: frozenset[str]
    """Body fields that steer the engine itself (ranks, files, other hosts): the gateway sets them, clients may not."""
    risky: frozenset[str]
    """Body fields that are code, or that have stopped engines: clients may set those that the operator allows."""
    must_know_adapters: bool
    """Requests have to name every adapter that it holds, those for the base model too."""
    adapters_by_path: bool
    """It lists no adapters, and takes one with each request, by a path that it can read."""
    loads_adapters: bool
    """It can be told to load and unload adapters while it serves, if it was started so that it may."""
    strands_requests: bool
    """After SIGTERM it keeps connections open without ever answering: what has no content yet is better moved."""

    # On the way of a request.

    def head_fields(self, api_key: str | None) -> Sequence[tuple[str, str]]:
        """Headers that go with every request to the engine, the credential among them."""
        ...

    def prepare(self, wish: Wish) -> Prepared:
        """How to put this request to the engine. Raises `Untranslatable` for what it cannot be asked."""
        ...

    def read_usage(self, tree: Mapping[str, Any]) -> Usage | None:
        """Tokens used, from a whole answer or from the chunk of a stream that carries them; None when it has none."""
        ...

    def judge_error(self, status: int, error: Mapping[str, Any]) -> Fault:
        """Whose doing an error answer is. `error`: its error object, or the whole body where it has none.

        For an error in a stream, `status` is the one that its code stands for, 500 where it stands for none.
        """
        ...

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        """Path and JSON body of the POST that stops a running request; None when closing the connection must do."""
        ...

    def continuation(self, path: str, fields: Mapping[str, Any], text: str) -> dict[str, Any]:
        """The top-level fields to set so that the engine goes on from `text`, which is the beginning of its answer.

        `fields`: the body that was answered so far; `text` is not empty. What the engine then sends is what comes
        after `text`, without it. Raises `NotOffered` where its published API has no such thing.
        """
        ...

    def counting(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The top-level fields that have every chunk of a stream tell its tokens so far, in `usage` or `timings`.

        Empty where the engine cannot, and where `fields`, the caller's, ask for it already.
        """
        ...

    # Beside it. All may raise `SideChannelError`; those marked so also `NotOffered`.

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """Ask whether the engine takes work, without a generation. `model`: the name that is sent upstream.

        Raises `NotOffered` where any question costs money.
        """
        ...

    async def info(self, side: SideChannel) -> EngineInfo:
        """What the engine is. What it does not say stays None. Raises `NotOffered` where any question costs money."""
        ...

    async def load(self, side: SideChannel, dp_rank: int | None) -> EngineLoad:
        """How busy it is; of one data-parallel rank, or of all together. Raises `NotOffered`."""
        ...

    async def adapters(self, side: SideChannel) -> tuple[Adapter, ...]:
        """The adapters it knows. Raises `NotOffered`."""
        ...

    async def load_adapter(self, side: SideChannel, name: str, path: str) -> None:
        """Load one from a path that the engine can read. Raises `NotOffered` and `AdapterRefused`."""
        ...

    async def unload_adapter(self, side: SideChannel, name: str) -> None:
        """Drop one. Raises `NotOffered` and `AdapterRefused`."""
        ...


class Untranslatable(Exception):
    """The request asks for something that this engine has no words for; `param` names it."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param
