"""The forty experiments: what is done to a running gateway, and what must hold. `tests.faults.report` reports on each.

A test whose name begins with `test_N_` belongs to experiment N; it says what it found through the `report` fixture.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is said of one that did not run. Those that ran say it more exactly themselves."""

    name: str
    fault: str
    bound: str
    not_run: str = ""
    """Why there is no test of it."""


EXPERIMENTS: dict[int, Experiment] = {
    1: Experiment(
        "replica killed, streams open",
        "kill -9 of a replica with 200 open streams",
        "an error event within a second, or the stream goes on elsewhere; other streams untouched",
    ),
    2: Experiment(
        "replica killed before the first byte",
        "kill -9 of a replica with 200 waiting requests",
        "no client sees an error; sends bounded",
    ),
    3: Experiment(
        "replica frozen",
        "SIGSTOP, later SIGCONT",
        "streams end at the idle timeout; ejected; half-open, then slow start",
    ),
    4: Experiment("stream reset", "RST in the middle of a stream", "the exact prefix, then an error event"),
    5: Experiment("stream cut short", "a clean close in the middle", "not taken for whole"),
    6: Experiment(
        "200, then no answer", "an error, nothing, or only a role after status 200", "another replica; unseen"
    ),
    7: Experiment(
        "429 storm", "429 with every kind of Retry-After", "sends bounded; a named time is kept, at most 300 s"
    ),
    8: Experiment(
        "all replicas down",
        "2,000 clients, then one replica returns",
        "its capacity never exceeded; 80 % of its peak within 30 s; nothing sent too late",
    ),
    9: Experiment(
        "bad requests", "1,000 requests that replicas refuse", "no change of health; good traffic unaffected"
    ),
    10: Experiment("Redis killed", "kill -9 under load, empty restart", "no request fails; over-admission bounded"),
    11: Experiment("Redis frozen", "SIGSTOP for 30 s", "50 ms for the calls under way, then 1 ms; back within 2 s"),
    12: Experiment("Sentinel failover", "the primary killed", "over-admission bounded; no lease stuck"),
    13: Experiment("scripts flushed or refused", "SCRIPT FLUSH at 100 Hz; SCRIPT refused", "no admission fails"),
    14: Experiment("maxclients", "Redis takes no connection", "local shares, then back"),
    15: Experiment("races for requests and places", "8 processes x 32 tasks on one key", "the limit exactly"),
    16: Experiment(
        "races for tokens", "the same with answers of unknown length", "hard: the limit; soft: its stated bound"
    ),
    17: Experiment("reply of Redis lost", "replies dropped after the decision", "the same answer again; charged once"),
    18: Experiment("wrong clocks", "gateways' ± 120 s, Redis' steps", "fair shares; one burst at most"),
    19: Experiment(
        "gateway killed with leases", "kill -9 with 500 leases", "free within 30 s; what was used stays charged"
    ),
    20: Experiment(
        "gateway stopped", "SIGTERM, a second one, SIGKILL, with 200 streams", "drained, told, or cut; none lost"
    ),
    21: Experiment(
        "clients leave", "500 in each phase, RST and half-close", "replicas see it within 250 ms; all given back"
    ),
    22: Experiment("clients that never read", "500 with a full window", "closed at 30 s; 100 KB each; others unharmed"),
    23: Experiment("keep-alive race", "idle connections closed at their reuse", "no client error; nothing done twice"),
    24: Experiment("2,000 streams", "at the same time", "each is served, or refused by our own ceiling"),
    25: Experiment("descriptors exhausted", "a limit of 128, 200 connections", "refused below the limit; recovers"),
    26: Experiment("memory short", "a small memory limit under load", "classes shed in order; no OOM; critical served"),
    27: Experiment("DNS", "NXDOMAIN, delay, flapping, all gone", "last good answer kept; the loop never waits"),
    28: Experiment("elephant and mouse", "tenants of weight 1:2:4", "shares within 3 %; the light one waits little"),
    29: Experiment("slow clients", "slow heads, silence, slow bodies, slow readers", "closed at 10, 10, 30 and 30 s"),
    30: Experiment("100 MB bodies", "declared, chunked, lied about", "413 at once; memory bounded"),
    31: Experiment("hostile JSON", "depth, duplicates, numbers, encodings", "400, never 500, within 50 ms"),
    32: Experiment("framing", "CL and TE, obfuscation, bare LF, obs-fold", "400 and closed; nobody disagrees"),
    33: Experiment("headers", "CR, LF, NUL, two hosts, 100 KB, 2,000 of them", "400"),
    34: Experiment("decompression bombs", "both ways", "415 for requests; answers bounded"),
    35: Experiment(
        "hostile streams", "endless lines, a million events, single bytes", "cut at the limit; others unharmed"
    ),
    36: Experiment("SSE injection", "line ends and field names in names and errors", "as many events as were meant"),
    37: Experiment("SSRF", "addresses in bodies, headers and redirects", "no connection outside the configuration"),
    38: Experiment("key guessing", "10,000 a second, unknown, expired, revoked", "same answer, same time, no look-up"),
    39: Experiment(
        "admin in a browser",
        "cross-site requests, framing, sessions, script in names",
        "refused, and sessions end when they should",
    ),
    40: Experiment("canaries", "secrets and prompts through every path", "in no log, metric, trace or answer"),
}
