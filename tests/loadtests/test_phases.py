"""How a profile is sorted into phases, and the one cost that noise cannot move: system calls per request."""

from __future__ import annotations

import sys

import pytest

from loadtests import phases, syscalls
from loadtests.peers import PEERS

OUTER = "main (gateway/cli.py:57);Runner.run (asyncio/runners.py:118)"


@pytest.mark.parametrize(
    ("inner", "phase"),
    [
        ("", phases.LOOP),
        (";serve (gateway/exchange.py:44)", "the exchange itself"),
        (";serve (gateway/exchange.py:40);read_order (gateway/order.py:59)", "understand the order"),
        (
            ";serve (gateway/exchange.py:40);read_order (gateway/order.py:59);parse (gateway/body.py:75)",
            "parse the body",
        ),
        (
            ";Relay.attempt (gateway/relay.py:133);Wire.start (backends/http1.py:211)",
            "build and send the upstream request",
        ),
        (
            ";Order.body_for (gateway/order.py:52);Body.with_values (gateway/body.py:60)",
            "build and send the upstream request",
        ),
        (";Wire.data_received (backends/http1.py:261)", "read the upstream's answer"),
        (";Wire.data_received (backends/http1.py:268);Relay.on_data (gateway/relay.py:160)", "relay, look at events"),
        (
            ";Relay._write (gateway/relay.py:259);SocketReply.write (gateway/edges/protocol.py:106)",
            "write to the client",
        ),
        (";GatewayProtocol.data_received (gateway/edges/protocol.py:248)", "read and guard the client's request"),
        (
            ";Runtime.settle (gateway/runtime.py:99);Metrics.observe (gateway/metrics.py:80)",
            "settle: usage, metrics, record",
        ),
        (";Runtime.settle (gateway/runtime.py:99)", "settle: usage, metrics, record"),
        (
            ";serve (gateway/exchange.py:44);decide (routing/policies.py:35);f (lib/x.py:1)",
            "choose and reserve a replica",
        ),
    ],
)
def test_a_sample_counts_for_the_innermost_frame_that_is_known(inner: str, phase: str) -> None:
    assert phases.phase_of(OUTER + inner) == phase


def test_shares_leave_out_threads_that_wait() -> None:
    profile = [
        "bootstrap (threading.py:1);_worker (concurrent/futures/thread.py:81) 900",
        f"{OUTER} 3",
        f"{OUTER};parse (gateway/body.py:75) 1",
        "",
    ]
    assert phases.shares(profile) == {phases.LOOP: 0.75, "parse the body": 0.25}


def test_table_has_the_dearest_phase_first_and_the_whole_last() -> None:
    found = {"plain": {"a": 0.25, "b": 0.75}, "chunk": {"c": 1.0}}
    lines = phases.markdown({"plain": 100.0, "chunk": 30.0}, found).splitlines()
    assert lines[0] == "| phase | plain: share | µs | chunk: share | µs |"
    assert lines[2:] == [
        "| b | 75% | 75.0 | 0% | 0.0 |",
        "| a | 25% | 25.0 | 0% | 0.0 |",
        "| c | 0% | 0.0 | 100% | 30.0 |",
        "| **all** | 100% | 100.0 | 100% | 30.0 |",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
def test_a_request_costs_two_reads_and_two_writes() -> None:
    reason = syscalls.unavailable()
    if reason:
        pytest.skip(reason)
    found = syscalls.measure(PEERS["tidegate-protocol"], requests=2000)
    assert found.by_name["read"] < 2.1
    assert found.by_name["write"] < 2.1
    assert found.per_request < 4.8  # 4.3 at rest; a busy machine adds some epoll_pwait
