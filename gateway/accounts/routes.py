"""Accounts: limits and what is left of them, and what was used and cost, as routes of the admin listener."""

from __future__ import annotations

from gateway.accounts.cost_routes import CostRoutes
from gateway.accounts.limit_routes import LimitRoutes
from gateway.admin.desk import Desk
from gateway.policy import GuardedRoute


def routes(desk: Desk) -> list[GuardedRoute]:
    """The routes of this area, and its live topic."""
    return [*LimitRoutes(desk).routes(), *CostRoutes(desk).routes()]
