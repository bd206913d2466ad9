"""`GET /admin/cost`: tokens and dollars by tenant, model or backend, as JSON or as CSV."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import Response

from gateway.accounts.asked import name_of, one_of, whole
from gateway.accounts.cost_store import COLUMNS, WINDOWS
from gateway.accounts.cost_table import csv_of
from gateway.admin.desk import Desk
from gateway.operations import json_response
from gateway.policy import About, GuardedRoute, Who

MAX_NAMES = 2000


class CostRoutes:
    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def routes(self) -> list[GuardedRoute]:
        query = {
            "by": f"What to add up by: {', '.join(COLUMNS)}. Left out: tenant.",
            "window": f"How far back: {', '.join(WINDOWS)}. Left out: day.",
            **{name: f"Only of this {name}." for name in COLUMNS},
            "limit": f"At most as many names, 1 to {MAX_NAMES}.",
        }
        about, as_csv = About(query=query), About(query=query, media="text/csv")
        return [
            GuardedRoute("/admin/cost", self.cost, Who.READER, methods=["GET"], about=about),
            GuardedRoute("/admin/cost.csv", self.as_csv, Who.READER, methods=["GET"], about=as_csv),
        ]

    async def cost(self, request: Request) -> Response:
        """Tokens by kind and dollars, own and rented, over a window."""
        return json_response(await self._report(request, 200))

    async def as_csv(self, request: Request) -> Response:
        """The same rows as CSV."""
        report = await self._report(request, MAX_NAMES)
        name = f"tidegate-cost-by-{report['by']}-{report['window']}.csv"
        return Response(
            csv_of(report),
            media_type="text/csv; charset=utf-8",
            headers={"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"},
        )

    async def _report(self, request: Request, names: int) -> dict[str, Any]:
        by = one_of(request, "by", COLUMNS, "tenant")
        window = one_of(request, "window", WINDOWS, "day")
        most = whole(request, "limit", names, 1, MAX_NAMES)
        only = {name: value for name in COLUMNS if (value := name_of(request, name)) is not None}
        answer, rows = await self._desk.costs.report(by, window, only, most)
        if by == "tenant":
            await asyncio.to_thread(self._add_record, rows)
        return {**answer, "rows": rows, "priced": _prices_anything(self._desk)}

    def _add_record(self, rows: list[dict[str, Any]]) -> None:
        """What is on record of each tenant for this day and this month (UTC), all gateways together. Blocks."""
        database = self._desk.database()
        if database is None:
            return
        from gateway.database.errors import DatabaseError

        today = datetime.fromtimestamp(time.time(), UTC)
        day, month = f"d{today:%Y%m%d}", f"m{today:%Y%m}"
        scopes = {row["name"]: f"{{t:{quote(row['name'], safe='/:')}}}:t" for row in rows}
        try:
            totals = database.spend.totals([(scope, period) for scope in scopes.values() for period in (day, month)])
        except DatabaseError:
            return
        for row in rows:
            scope = scopes[row["name"]]
            row["record"] = {
                "day_usd": totals.get((scope, day), 0) / 1e6,
                "month_usd": totals.get((scope, month), 0) / 1e6,
            }


def _prices_anything(desk: Desk) -> bool:
    """Whether the tokens of any model have a price, here or where its requests are sent when it is late."""
    return any(model.price or model.spill for model in desk.settings.models.values())
