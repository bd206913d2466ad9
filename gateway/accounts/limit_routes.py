"""`GET /admin/limits`: every limit in force and what is left of it, and the live topic `limits`."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts.asked import name_of, whole
from gateway.accounts.headroom_of_record import largest_spends, with_spend_of_record
from gateway.accounts.limit_rows import MAX_ROWS, MAX_SCOPES, LimitsAnswer, LimitsQuestion, merged, shown
from gateway.admin.desk import Desk
from gateway.operations import NoWorkerAnswers, json_response
from gateway.policy import About, GuardedRoute, Who
from gateway.sources import ask_all

LIVE_EVERY_S = 3.0
LIVE_ROWS = 50
"""What a page shows of those that are nearest to a limit."""


class LimitRoutes:
    """Read-only: no answer to these changes anything in the store, not even what has run out."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        desk.hub.topic("limits", LIVE_EVERY_S, self.live)

    def routes(self) -> list[GuardedRoute]:
        query = {
            "tenant": "Only limits of this tenant, its keys and its end users.",
            "key": "Everything that limits the key of this id.",
            "model": "Only limits of this model's use.",
            "limit": f"At most as many holders, 1 to {MAX_ROWS}.",
            "offset": "As many are left out before them.",
        }
        about = About(query=query, errors=(NoWorkerAnswers,))
        return [GuardedRoute("/admin/limits", self.limits, Who.READER, methods=["GET"], about=about)]

    async def limits(self, request: Request) -> Response:
        """Limits in force and what is left of them, those nearest to their end first."""
        limit = whole(request, "limit", 100, 1, MAX_ROWS)
        offset = whole(request, "offset", 0, 0, MAX_SCOPES)
        question = LimitsQuestion(
            tenant=name_of(request, "tenant"),
            key=name_of(request, "key"),
            model=name_of(request, "model"),
            most=offset + limit,
        )
        answer = await self._ask(question)
        return json_response(_page(answer, offset, limit))

    async def live(self) -> dict[str, Any]:
        """Those nearest to a limit, of everybody who has been active lately."""
        return _page(await self._ask(LimitsQuestion(most=LIVE_ROWS, idle=False)), 0, LIVE_ROWS)

    async def _ask(self, question: LimitsQuestion) -> LimitsAnswer:
        sources = self._desk.sources
        spent = {} if question.key else await asyncio.to_thread(largest_spends, self._desk.database, time.time())
        scopes = max(1, MAX_SCOPES // max(1, len(sources)))
        each = msgspec.structs.replace(question, scopes=scopes, spent=spent)
        answers = [answer for _, answer in await ask_all(sources, lambda source: source.limits(each)) if answer]
        if not answers:
            raise NoWorkerAnswers("No worker answers; they may be starting.", retry_after_s=1.0)
        answer = merged(answers, question.most)
        await asyncio.to_thread(with_spend_of_record, answer.rows, self._desk.database)
        return answer


def _page(answer: LimitsAnswer, offset: int, limit: int) -> dict[str, Any]:
    return {
        "data": [shown(row) for row in answer.rows[offset : offset + limit]],
        "offset": offset,
        "total": answer.looked_at,
        "complete": answer.complete,
        "store": answer.store,
        "read_at_unix_s": round(time.time(), 3),
    }
