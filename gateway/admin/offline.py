"""The admin API's description without a gateway that runs."""

from __future__ import annotations

from typing import Any

from pydantic import SecretStr
from starlette.applications import Starlette

from gateway.admin.app import admin_app
from gateway.admin.desk import Desk
from gateway.admin.guard import Guard
from gateway.admin.openapi import document
from gateway.config import Settings
from gateway.key_routes import key_routes
from gateway.policy import GuardedRoute


def offline_document() -> dict[str, Any]:
    """As `GET /admin/openapi.json` gives it."""

    async def nothing() -> None: ...

    async def reload() -> Settings:
        return Settings()

    desk = Desk([], Settings, reload=reload, database=lambda: None, state_dir=None)
    keys = key_routes(lambda: None, None, nothing)
    guard = admin_app([], host="127.0.0.1", token=SecretStr("-" * 16), routes=keys, desk=desk)
    assert isinstance(guard, Guard)
    assert isinstance(guard.app, Starlette)
    return document([route for route in guard.app.routes if isinstance(route, GuardedRoute)])
