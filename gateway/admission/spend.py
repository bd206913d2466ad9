"""Money spent, from the settlement of a request to the database and back into the budgets.

What requests cost is added up here, by holder and calendar period, and written to the database once a second, in
batches that count once however often they are sent. What the database then holds, other gateways' batches included,
is noted in the `SpendBook`, from which every admission takes the least that its store's own count can be. So a store
that has lost its memory, or a gateway that starts, goes on from the spend of record. A gateway that is killed loses
at most what it had not written yet: about a second's worth.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from gateway.admission.records import Records
from gateway.errors import GatewayError
from gateway.limits.plan import Plan, SpendBook
from gateway.record import Outcome
from gateway.store.limits import Scope

if TYPE_CHECKING:  # a gateway without a database does not load SQLAlchemy
    from gateway.database.spend import Spend

logger = logging.getLogger(__name__)

FLUSH_EVERY_S = 1.0
REFRESH_EVERY_S = 15.0
"""How often budgets in use are read again though nothing was spent here: others spend, too."""
LEARN_WITHIN_S = 2.0
MAX_HOLDERS = 100_000
"""Sums that wait for a database that is away. Beyond it new holders' spend is lost, and counted as such."""

SpendKey = tuple[str, str]


class BudgetUnknown(GatewayError):
    """Nobody can say what was spent already, so nothing more is."""

    status = 503
    code = "budget_unknown"
    outcome = Outcome.UNAVAILABLE


class SpendKeeper:
    """One worker's. Without a database (`records` is None) money is only counted by the store."""

    def __init__(self, records: Records | None, book: SpendBook, gateway: str) -> None:
        self.book = book
        self.failing = False
        self.lost_micros = 0
        self._records = records
        self._gateway = gateway
        self._number = 0
        self._sums: dict[SpendKey, int] = {}
        self._sending: tuple[str, dict[SpendKey, int]] | None = None
        """The batch that is under way, or whose outcome is unknown."""
        self._refused: dict[SpendKey, int] = {}
        """What the database would not have of it, ever."""
        self._refusal_told = False
        self._watched: dict[SpendKey, float] = {}
        """Budgets in use, and when they were last read."""
        self._stopping = False
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._day = ("", "", 0.0)

    @property
    def recording(self) -> bool:
        """Whether what is spent is put on record."""
        return self._records is not None

    @property
    def waiting_micros(self) -> int:
        """Spend that is not on record yet."""
        sending = {} if self._sending is None else self._sending[1]
        return sum(self._sums.values()) + sum(sending.values())

    def start(self) -> None:
        if self._records is not None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="spend")

    async def aclose(self) -> None:
        """Write what is left, if the database lets us."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
        if self._records is None:
            return
        for _ in range(2):  # a batch that was under way, and what came after it
            await self._flush()
        if self.waiting_micros:
            logger.error("spend: %.6f USD could not be written to the database", self.waiting_micros / 1e6)

    def spent(self, plan: Plan, micros: int, now_unix_s: float) -> None:
        """Note what a request has cost: for its key, its tenant, and every other holder of a budget that it is in."""
        if self._records is None:
            return
        day, month = self._periods(now_unix_s)
        sums = self._sums
        for scope in plan.billed:
            for period in (day, month):
                place = (scope, period)
                if place in sums or len(sums) < MAX_HOLDERS:
                    sums[place] = sums.get(place, 0) + micros
                else:
                    self.lost_micros += micros

    async def learn(self, scopes: Iterable[Scope]) -> None:
        """Find out what was spent in these scopes' budgets. Raises `BudgetUnknown` when nobody can say."""
        wanted = self.book.unknown(scopes)
        if not wanted:
            return
        if self._records is None:
            self.book.note(dict.fromkeys(wanted, 0))
            return
        try:
            async with asyncio.timeout(LEARN_WITHIN_S):
                totals = await asyncio.to_thread(self._read, wanted)
        except Exception as error:  # of whatever kind: nothing is known
            self._note_failure(error)
            raise BudgetUnknown(
                "What was spent of the budget cannot be read at the moment.", retry_after_s=1.0
            ) from error
        self.book.note(totals)
        self._watched.update(dict.fromkeys(wanted, time.monotonic()))

    def read_again(self) -> None:
        """Read all budgets in use, now: the store was away, and may have lost what others have spent."""
        self._watched = dict.fromkeys(self._watched, -math.inf)
        self._wake.set()

    def _periods(self, now_unix_s: float) -> tuple[str, str]:
        day, month, until = self._day
        if not until - 86_400 <= now_unix_s < until:
            today = datetime.fromtimestamp(now_unix_s, UTC)
            day, month = f"d{today:%Y%m%d}", f"m{today:%Y%m}"
            until = now_unix_s - now_unix_s % 86_400 + 86_400
            self._day = (day, month, until)
        return day, month

    async def _run(self) -> None:
        while not self._stopping:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), FLUSH_EVERY_S)
            self._wake.clear()
            await self._flush()

    async def _flush(self) -> None:
        if self._sending is None and self._sums:
            self._number += 1
            self._sending = (f"{self._gateway}-{self._number}", self._sums)
            self._sums = {}
        now = time.monotonic()
        current = self._periods(time.time())
        self._watched = {place: read_at for place, read_at in self._watched.items() if place[1] in current}
        stale = [place for place, read_at in self._watched.items() if now - read_at >= REFRESH_EVERY_S]
        if self._sending is None and not stale:
            return
        try:
            totals = await asyncio.to_thread(self._write, stale)
        except Exception as error:  # whatever it was, the batch is kept
            self._note_failure(error)
            return
        self._sending = None
        if self._refused:
            self._note_refusal()
        if self.failing:
            logger.info("spend: the database takes it again")
            self.failing = False
        self.book.note({place: micros for place, micros in totals.items() if place in self._watched})
        if not self._wake.is_set():  # else they are to be read again already
            self._watched.update({place: now for place in totals if place in self._watched})
        while len(self._watched) > MAX_HOLDERS:
            del self._watched[next(iter(self._watched))]

    def _note_failure(self, error: Exception) -> None:
        if not self.failing:
            logger.warning("spend: %s; it is kept here until the database takes it", error)
        self.failing = True

    def _note_refusal(self) -> None:
        micros = sum(amount for amount in self._refused.values() if type(amount) is int)
        self.lost_micros += micros
        if not self._refusal_told:
            self._refusal_told = True
            place = next(iter(self._refused))
            logger.error(
                "spend: the database refuses an amount as invalid, e.g. for %r; %.6f USD is dropped, and so is what it "
                "will refuse from now on, see tidegate_spend_lost_usd",
                place,
                micros / 1e6,
            )
        self._refused = {}

    # In threads.

    def _read(self, places: list[SpendKey]) -> dict[SpendKey, int]:
        assert self._records is not None
        return self._records.database().spend.totals(places)

    def _write(self, stale: list[SpendKey]) -> dict[SpendKey, int]:
        assert self._records is not None
        spend = self._records.database().spend
        places = set(stale)
        if self._sending is not None:
            batch_id, deltas = self._sending
            self._refused = {}
            self._add(spend, batch_id, deltas)
            places |= deltas.keys() & self._watched.keys()
        return spend.totals(places)

    def _add(self, spend: Spend, batch_id: str, deltas: dict[SpendKey, int]) -> None:
        """Put a batch on record without what is invalid in it, which is noted in `_refused`.

        Nothing of a batch is written before all of it was found to be valid, and it is halved the same way each time:
        the parts have ids of their own, so that each counts once, too.
        """
        from gateway.database.errors import InvalidValue

        try:
            spend.add(batch_id, deltas)
        except InvalidValue:
            if len(deltas) == 1:
                self._refused |= deltas
                return
            places = list(deltas)
            half = len(places) // 2
            for name, part in (("a", places[:half]), ("b", places[half:])):
                self._add(spend, f"{batch_id}{name}", {place: deltas[place] for place in part})
