"""Whether a pool without a replica will get one, as far as a worker knows: then its requests wait.

    replicas start                                   whoever found them
    `scaling` with a provider that acts              a request is enough for it to want one
    `scaling` with provider none                     where `queue.start_wait_s` says that somebody acts on the number

Nobody waits for what an operator holds at none, or for servers that no agent is there to launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from gateway.fleet import Pool
from gateway.notices import AGENT, HOLD, START, Notices
from gateway.scaling.agents import LOST_AFTER_S, decoded
from gateway.scaling.standing import Hold
from gateway.starting.note import StartNote

AGAIN_S = 5.0
"""When to come back where nobody knows how long a start takes, or where this one takes longer than most."""


class Prospect(msgspec.Struct, frozen=True):
    """What is known of the start of a pool's first replica."""

    note: StartNote
    now_unix_s: float

    @property
    def left_s(self) -> float:
        """Seconds until it is ready: what four of five starts took, less what has passed."""
        lead_s = self.note.lead_s
        if lead_s is None:
            return AGAIN_S
        left_s = lead_s - self.passed_s
        return left_s if left_s >= 1.0 else AGAIN_S

    def takes_longer(self, than_s: float) -> bool:
        """Whether four of five starts that were seen would take longer than this from now on."""
        note = self.note
        return note.learned and note.lead_s is not None and note.lead_s - self.passed_s > than_s

    @property
    def passed_s(self) -> float:
        """Seconds since it began, or was ordered."""
        since = self.note.since_unix_s
        return max(0.0, self.now_unix_s - since) if since else 0.0

    @property
    def said(self) -> str:
        """How far it is, as the end of a sentence for clients about a model that has no replica. What an engine or a
        provider said of a start that fails is for operators (`/admin/members`): it may name files, hosts or tokens."""
        note, age = self.note, f"{self.passed_s:.0f} s"
        if note.starting:
            phase = note.phase or "starting"
            part = "" if note.progress is None else f" ({note.progress:.0%})"
            text = f"one has been starting for {age}, {phase}{part}"
        elif note.since_unix_s:
            text = f"one was ordered {age} ago"
        else:
            text = "one is being ordered"
        if note.learned and note.lead_s is not None:
            text += f"; most starts take up to {note.lead_s:.0f} s"
        return text


class Starts:
    """One worker's reading of what gateways tell. Asked at most ten times a second for each pool."""

    def __init__(
        self,
        notices: Notices,
        unix_s: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._notices = notices
        self._unix_s = unix_s
        self._monotonic = monotonic
        self._began_at = monotonic()

    def of(self, pool: Pool) -> Prospect | None:
        """None: nobody is known to start a replica, so that there is nothing to wait for."""
        settings = pool.settings
        wait_s, scaling = settings.queue.start_wait_s, settings.scaling
        if wait_s == 0 or (scaling is None and settings.discovery is None and settings.launch is None):
            return None
        note = self._furthest(pool.name)
        if note is None or not note.starting:
            if scaling is None or self._held_at_none(pool.name):
                return None
            if scaling.provider == "none" and wait_s is None:
                return None
            if scaling.provider == "local" and not self._launched(pool.name):
                return None
        if note is None:
            note = StartNote()
        if note.lead_s is None and scaling is not None:
            note = msgspec.structs.replace(note, lead_s=scaling.lead_time_s)
        return Prospect(note, self._unix_s())

    def _furthest(self, pool: str) -> StartNote | None:
        """Of what several gateways tell, the one that began first."""
        found: StartNote | None = None
        beginning = f"{START}/{pool}/"
        for key, value in self._notices.of(START).items():
            if not key.startswith(beginning):
                continue
            try:
                note = msgspec.json.decode(value, type=StartNote)
            except msgspec.MsgspecError:
                continue  # another version's
            if found is None or (not note.starting, note.since_unix_s) < (not found.starting, found.since_unix_s):
                found = note
        return found

    def _held_at_none(self, pool: str) -> bool:
        value = self._notices.of(HOLD).get(f"{HOLD}/{pool}")
        if value is None:
            return False
        try:
            hold = msgspec.json.decode(value, type=Hold)
        except msgspec.MsgspecError:
            return False
        return hold.count == 0 and hold.until_unix_s > self._unix_s()

    def _launched(self, pool: str) -> bool:
        """Whether an agent can have servers of it; one that a new worker has not heard of yet may."""
        if self._monotonic() - self._began_at < LOST_AFTER_S:
            return True
        reports = decoded(self._notices.of(AGENT)).values()
        return any(pool in each.pools and each.pools[pool].max > 0 for each in reports)
