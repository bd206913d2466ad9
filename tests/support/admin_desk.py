"""The whole admin side of a gateway on a real socket, with or without workers behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import SecretStr
from starlette.types import ASGIApp

from gateway.admin.app import admin_app
from gateway.admin.desk import Desk
from gateway.config import Settings
from gateway.database.database import Database
from gateway.listener import admin_listener, bind_tcp, listen
from gateway.policy import GuardedRoute
from gateway.sources import Source
from tests.support.serving import settings_for

OWNER = "tg_admin_" + "o" * 43
OPERATOR = "operator-token-0123456789"
READER = "reader-token-0123456789"
REGISTRAR = "registrar-token-0123456789"
TOKENS: dict[str, Any] = {
    "olga": {"role": "operator", "token": SecretStr(OPERATOR)},
    "rita": {"role": "reader", "token": SecretStr(READER)},
    "gpu1": {"role": "registrar", "token": SecretStr(REGISTRAR)},
}
SAME_ORIGIN = {"sec-fetch-site": "same-origin", "x-tidegate-csrf": "1"}
"""What the dashboard's own pages send."""


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@dataclass
class AdminSide:
    """A running one."""

    desk: Desk
    app: ASGIApp
    url: str
    client: httpx2.AsyncClient
    """Bears nothing, and keeps no cookies by itself: they are Secure."""

    async def login(self, token: str = OWNER, **headers: str) -> httpx2.Response:
        return await self.client.post("/admin/session", json={"token": token}, headers={**SAME_ORIGIN, **headers})

    async def logged_in(self, token: str = OWNER) -> dict[str, str]:
        """The headers of a page in which somebody has logged in."""
        answer = await self.login(token)
        assert answer.status_code == 201, answer.text
        return {**SAME_ORIGIN, "cookie": answer.headers["set-cookie"].partition(";")[0]}


def desk_of(
    settings: Settings,
    state_dir: Path | None,
    *,
    sources: Sequence[Source] = (),
    database: Database | None = None,
) -> Desk:
    async def reload() -> Settings:
        return settings

    return Desk(sources, lambda: settings, reload=reload, database=lambda: database, state_dir=state_dir)


@asynccontextmanager
async def admin_side(
    state_dir: Path | None,
    *,
    sources: Sequence[Source] = (),
    database: Database | None = None,
    routes: Sequence[GuardedRoute] = (),
    settings: Settings | None = None,
    **admin: Any,
) -> AsyncIterator[AdminSide]:
    """With tokens of every role; `admin` are further settings of that section."""
    if settings is None:
        settings = settings_for(["http://127.0.0.1:1"], admin={"tokens": TOKENS, **admin})
    desk = desk_of(settings, state_dir, sources=sources, database=database)
    app = admin_app(desk.sources, host="127.0.0.1", token=SecretStr(OWNER), routes=routes, desk=desk)
    sock = bind_tcp("127.0.0.1", 0, "admin.port")
    listen([sock])
    listener = admin_listener(app)
    task = asyncio.create_task(listener.serve([sock]))
    await listener.ready.wait()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with httpx2.AsyncClient(base_url=url, trust_env=False, timeout=20.0) as client:
            yield AdminSide(desk, app, url, client)
    finally:
        await desk.aclose()
        listener.cut()
        listener.should_exit = True
        await task
