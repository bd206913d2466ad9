"""The areas of the admin side: each has a module with the routes that it answers."""

from __future__ import annotations

from gateway.accounts import routes as accounts
from gateway.admin import audit, login, pages
from gateway.admin.desk import Desk
from gateway.fleet_view import routes as fleet_view
from gateway.inspection import routes as inspection
from gateway.members import routes as members
from gateway.policy import GuardedRoute
from gateway.rollups import routes as rollups
from gateway.scaling import routes as scaling
from gateway.steering import routes as steering

AREAS = (pages, login, audit, rollups, fleet_view, inspection, accounts, steering, members, scaling)


def area_routes(desk: Desk) -> list[GuardedRoute]:
    """Every area's routes; all of them work with the same desk."""
    return [route for area in AREAS for route in area.routes(desk)]
