"""Which agent (`tidegate fleet up`) launches how many: what they report, and what each is told. Pure.

Several agents share a pool's count: it is filled up in the order of their names, each up to the most it can. When there
are to be fewer, those that have more than their share lose some, by name, once they are drained. An agent is never told
to have fewer than it has without being told which ones go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from gateway.scaling.notes import read_note

RENEW_S = 2.0
"""An agent reports so often."""
LOST_AFTER_S = 3 * RENEW_S
"""One that is not heard of for so long is left out."""


class PoolReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent has of a pool."""

    launched: int = 0
    """Servers that it has started and not stopped, whatever they are at."""
    ready: int = 0
    max: int = 1
    """The most it can have."""
    roll: int = 0
    """The last order to restart them one by one that it has carried out."""


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an agent says of itself."""

    pools: dict[str, PoolReport] = {}


class PoolOrder(msgspec.Struct, frozen=True):
    """What it is told of a pool."""

    count: int
    leave: list[str] = []
    """Names of replicas that are drained and go."""
    roll: int = 0


class Orders(msgspec.Struct, frozen=True):
    """What it is told."""

    renew_in_s: float
    pools: dict[str, PoolOrder]


def shares(count: int, reports: Mapping[str, PoolReport]) -> dict[str, int]:
    """How many of `count` each agent has, in the order of their names, each up to its most.

    >>> shares(5, {"b": PoolReport(max=4), "a": PoolReport(max=3)})
    {'a': 3, 'b': 2}
    """
    found: dict[str, int] = {}
    for name in sorted(reports):
        found[name] = max(0, min(count, reports[name].max))
        count -= found[name]
    return found


def excess(
    count: int, reports: Mapping[str, PoolReport], replicas: Mapping[str, str], leaving: Iterable[str]
) -> dict[str, int]:
    """How many more each agent has than its share, those that leave already not counted. `replicas`: agents by the
    names of their replicas."""
    going: dict[str, int] = {}
    for name in leaving:
        agent = replicas.get(name, "")
        going[agent] = going.get(agent, 0) + 1
    found: dict[str, int] = {}
    for agent, share in shares(count, reports).items():
        over = reports[agent].launched - share - going.get(agent, 0)
        if over > 0:
            found[agent] = over
    return found


def told(count: int, agent: str, reports: Mapping[str, PoolReport], leaving: Iterable[str], roll: int) -> PoolOrder:
    """What an agent is told of a pool of which there are to be `count`. `leaving`: its replicas that are empty, and
    go now."""
    leave = sorted(leaving)
    has = reports[agent].launched - len(leave)
    return PoolOrder(max(shares(count, reports)[agent], has), leave, roll)


def roll_for(agent: str, ordered: int, reports: Mapping[str, PoolReport]) -> int:
    """The rolling restart that an agent is told of. They carry one out one after the other, by name: of agents with one
    server each, all servers would go at once otherwise. Nor does the next one begin where one has given up.

    `ordered` is lost with a store that is memory; agents know what they have carried out.

    >>> reports = {"a": PoolReport(roll=1), "b": PoolReport(roll=1), "c": PoolReport(roll=1)}
    >>> [roll_for(each, 2, reports) for each in reports]
    [2, 1, 1]
    """
    number = max(ordered, *(each.roll for each in reports.values()))
    waits = any(each.roll < number for name, each in reports.items() if name < agent)
    return reports[agent].roll if waits else number


def decoded(notices: Mapping[str, bytes]) -> dict[str, Report]:
    """The notices `agent/<name>` that can be read, by agent."""
    found: dict[str, Report] = {}
    for key, value in notices.items():
        report = read_note(value, Report)
        if report is not None:
            found[key.partition("/")[2]] = report
    return found
