"""One pool's replicas from what several sources have found: each once, and none that could not be one.

Where two sources tell of one address and rank, the first counts, in the order of `ORDER`: who registers knows best what
it is; what is written down in the configuration comes before all (`gateway.config.found`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import msgspec
from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from backends.discovery.member import Member
from backends.discovery.naming import name_of as name_from_address
from backends.discovery.records import MAX_MEMBERS
from gateway.config.checks import literal_secrets
from gateway.config.discovery import MemberDefaults
from gateway.config.replicas import Replica
from gateway.config.translate import findings_of
from gateway.config.urls import parse_address
from gateway.config.values import REPLICA_NAME

REGISTRATION, KUBERNETES, FILE, DNS = "registration", "kubernetes", "file", "dns"
ORDER = (REGISTRATION, KUBERNETES, FILE, DNS)

Place = tuple[str, int | None]
"""Normal address and data-parallel rank: what makes two members one replica."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A member and what becomes of it."""

    member: Member
    source: str
    name: str
    entry: Mapping[str, Any] | None
    """As under `replicas`; None where it does not become one, or not yet."""
    refused: str = ""
    """Why it never will."""

    @property
    def place(self) -> Place | None:
        return None if self.entry is None else (str(self.entry["url"]), self.entry.get("dp_rank"))


Known = dict[tuple[str, Member], Placed]
"""What members are that were looked at before, by source: of thousands, one changes at a time."""


def placed(
    pool: str, defaults: MemberDefaults, found: Mapping[str, Sequence[Member]], known: Known | None = None
) -> list[Placed]:
    """Every member of every source, with what becomes of it. The order is that of the sources, then by name, so that
    one set of members always makes the same configuration. `known`: of the same pool and defaults; is kept up to
    date."""
    before = {} if known is None else known.copy()
    now: Known = {} if known is None else known
    now.clear()
    taken: dict[Place, Placed] = {}
    names: dict[str, Placed] = {}
    leaving: set[Place] = set()
    result: list[Placed] = []
    for source in ORDER:
        several = sorted(found.get(source, ()), key=lambda each: (each.name, each.url, each.dp_rank or 0))
        for member in several:
            one = before.get((source, member)) or _place(pool, defaults, member, source)
            now[source, member] = one
            place = one.place
            if place is not None:
                other = taken.get(place) or names.get(one.name)
                if place in taken and member.state == "draining":
                    leaving.add(place)  # whoever knows that it goes is right
                if other is not None:
                    what = "address" if place in taken else "name"
                    one = _refused(one, f"{other.name} ({other.source}) has the same {what}")
                elif len(taken) >= MAX_MEMBERS:
                    one = _refused(one, f"a pool has {MAX_MEMBERS} replicas at most")
                else:
                    taken[place] = names[one.name] = one
            result.append(one)
    return [_leaving(one) if one.place in leaving else one for one in result]


def _leaving(one: Placed) -> Placed:
    return replace(one, member=msgspec.structs.replace(one.member, state="draining"))


def _refused(one: Placed, why: str) -> Placed:
    return Placed(one.member, one.source, one.name, None, why)


def _place(pool: str, defaults: MemberDefaults, member: Member, source: str) -> Placed:
    try:
        name = member.name or name_of(pool, member)
        entry = _entry(defaults, member, name)
        replica = Replica.model_validate(entry)
        secret = next(literal_secrets(entry), None)
        if secret is not None:
            raise ValueError(f"{secret.path[-1]}: {secret.message}")
    except ValidationError as error:
        problem = next(iter(findings_of(error)))
        return Placed(member, source, member.name, None, f"{problem.path[-1]}: {problem.message}")
    except ValueError as error:
        return Placed(member, source, member.name, None, str(error))
    if member.state == "starting":
        return Placed(member, source, name, None)
    return Placed(member, source, name, {**entry, "url": replica.url})


def _entry(defaults: MemberDefaults, member: Member, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "url": member.url}
    base = defaults.model_dump(mode="json", exclude_none=True)
    own = {
        "engine": member.engine,
        "upstream_model": member.upstream_model,
        "region": member.region,
        "weight": member.weight,
        "max_in_flight": member.max_in_flight,
        "dp_rank": member.dp_rank,
        "kv_events": None if member.kv_events is None else {"endpoint": member.kv_events},
    }
    return entry | base | {key: value for key, value in own.items() if value is not None}


def name_of(pool: str, member: Member) -> str:
    """A name made from pool, address and rank, the same for as long as these are. Raises `ValueError`.

    >>> name_of("chat", Member(url="http://10.0.0.5:30000"))
    'chat-10.0.0.5-30000'
    """
    try:
        address = parse_address(member.url)
    except PydanticCustomError as error:
        raise ValueError(error.message()) from error
    parts = urlsplit(address.origin)
    rank = "" if member.dp_rank is None else f"-dp{member.dp_rank}"
    name = name_from_address(pool, parts.hostname or "socket", parts.port or 0)[: 80 - len(rank)] + rank
    if not re.fullmatch(REPLICA_NAME, name):
        raise ValueError(f"{member.url!r} makes no name; give one")
    return name
