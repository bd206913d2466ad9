"""What one pool's scaler has learned: taken once a minute, kept over a restart, and told to other gateways.

    scaler ──take──▶ Taken ──▶ scaling.json              a gateway that starts goes on from its file
                       └─────▶ learned/<pool> ──hear──▶  and any other one, where that was learned from more

What comes from a file or the store is checked as a whole by `routing.scaling.learned`; where it is refused, the log
says why, and the scaler learns anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time

import msgspec

from gateway.config import Settings
from gateway.scaling.standing import STARTS, Change
from routing.scaling import Implausible, Learned, Scaler
from routing.scaling.learned import AHEAD_S, OLDEST_S

logger = logging.getLogger("tidegate")

EVERY_S = 60.0
"""What is learned in less is lost with a gateway that is killed."""
MAX_BYTES = 48 * 1024
"""Of what is kept or told of a pool; usually it is 5 KiB. A fact holds 64 KiB."""
LAST_CHANGES = 20
"""Told of a pool's history: what is shown where several pools are."""
MAX_WHY = 500
_PLACES = frozenset(
    {
        "count",
        "host",
        "port",
        "port_step",
        "node_rank",
        "node_address",
        "secret_env",
        "start_timeout_s",
        "stop_timeout_s",
    }
)
"""Settings of `launch` that say where and when, and nothing of what a server can do."""


class Taken(msgspec.Struct, frozen=True):
    """What was learned of a pool, at one moment."""

    by: str
    at_unix_s: float
    learned: Learned
    """Without start times."""
    starts: list[tuple[str, float]] = []
    """As in `standing.KeptPool`, which has them itself."""
    history: list[Change] = []
    """The same; the last ones."""


def kind_of(settings: Settings, pool: str) -> str:
    """One word for what the capacity of a pool's replicas depends on, by settings: models, engine, launch."""
    backend = settings.backends[pool]
    models = {each.upstream_model or name for name, each in settings.models.items() if each.backend == pool}
    launch = None if backend.launch is None else backend.launch.model_dump(mode="json", exclude=set(_PLACES))
    adapters = sorted(each.name for each in backend.adapters)
    data = msgspec.json.encode([backend.engine, sorted(models), adapters, launch], order="deterministic")
    return hashlib.sha256(data).hexdigest()[:16]


class Memory:
    """One pool's. `now` is monotonic seconds everywhere."""

    def __init__(self, pool: str, scaler: Scaler, kept: bytes) -> None:
        """`kept`: what a file has of it, as JSON."""
        self._pool = pool
        self._scaler = scaler
        self.kept = kept if len(kept) <= MAX_BYTES else b"null"
        """For the file."""
        self._began_at: float | None = None
        self._taken_at = 0.0
        self._heard = b""
        self._said: set[str] = set()
        self._untold = False

    def begin(self, now: float) -> None:
        """Go on from what was kept, once."""
        if self._began_at is not None:
            return
        self._began_at = self._taken_at = now
        taken = self._read(self.kept, "the file")
        if taken is not None:
            self._adopt(taken, now, "before it was started again", always=True)

    def hear(self, value: bytes | None, holder: str, now: float) -> Taken | None:
        """What the store has of it; it is returned where it is news and another gateway's (`holder` is this one)."""
        if value is None or value == self._heard:
            return None
        self._heard = value
        taken = self._read(value, "the store")
        if taken is None or taken.by == holder or not self._adopt(taken, now, "another gateway", always=False):
            return None
        # What is to come would stay the last of a history, for good.
        latest = time.time() + AHEAD_S
        return msgspec.structs.replace(taken, history=[each for each in taken.history if each.unix_s <= latest])

    def take(self, now: float, *, at_once: bool = False) -> None:
        """Once in `EVERY_S`, and first that long after the start; `at_once`: this gateway ends."""
        if self._began_at is None or not (at_once or now - self._taken_at >= EVERY_S):
            return
        self._taken_at, self._untold = now, True
        learned = dataclasses.replace(self._scaler.learned(now), starts=())
        self.kept = msgspec.json.encode(Taken("", round(time.time(), 3), learned))

    def to_tell(self, holder: str, starts: list[tuple[str, float]], history: list[Change]) -> bytes | None:
        """For the store; None: it was told already, or there is nothing yet."""
        taken = self._read(self.kept, "the file") if self._untold else None
        self._untold = False
        if taken is None:
            return None
        last = [msgspec.structs.replace(each, why=each.why[:MAX_WHY]) for each in history[-LAST_CHANGES:]]
        named = [(name[:200], seconds) for name, seconds in starts[-STARTS:]]
        value = msgspec.json.encode(msgspec.structs.replace(taken, by=holder, starts=named, history=last))
        return value if len(value) <= MAX_BYTES else None

    def _adopt(self, taken: Taken, now: float, whose: str, *, always: bool) -> bool:
        """Whether it can be; it is not taken over where this scaler knows more."""
        age_s = time.time() - taken.at_unix_s
        try:
            if not always and not self._scaler.knows_less(taken.learned, age_s, now):
                return True
            self._scaler.restore(taken.learned, age_s, now)
        except Implausible as error:
            self._refused(f"what {whose} had learned", str(error))
            return False
        logger.info("pool %s: scaling goes on from what %s had learned %.0f s ago", self._pool, whose, max(0.0, age_s))
        return True

    def _read(self, value: bytes, whence: str) -> Taken | None:
        try:
            if len(value) > MAX_BYTES:
                raise msgspec.ValidationError(f"more than {MAX_BYTES} bytes")
            taken = msgspec.json.decode(value, type=Taken | None)
            if taken is not None and (len(taken.starts) > STARTS or len(taken.history) > LAST_CHANGES):
                raise msgspec.ValidationError("more starts or changes than are kept")
            if taken is not None and not all(0.0 <= seconds <= OLDEST_S for _, seconds in taken.starts):
                raise msgspec.ValidationError("a start took longer than can be")
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            self._refused(f"what {whence} has of it", str(error))
            return None
        return taken

    def _refused(self, what: str, why: str) -> None:
        """Said once: it comes again every minute."""
        if what not in self._said:
            self._said.add(what)
            logger.warning("pool %s: %s is not used for scaling, which learns anew: %s", self._pool, what, why)


def merged(mine: list[Change], others: list[Change]) -> list[Change]:
    """Both histories as one: each has seen the same changes, perhaps a little later, and some that the other missed."""
    found: list[Change] = []
    for each in sorted([*mine, *others], key=lambda each: each.unix_s):
        if not found or found[-1].wanted != each.wanted:
            found.append(each)
    return found
