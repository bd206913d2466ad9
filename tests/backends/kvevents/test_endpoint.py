from __future__ import annotations

import pytest

from backends.kvevents.endpoint import EndpointRefused, resolve


@pytest.mark.parametrize(
    ("endpoint", "host", "rank", "expected"),
    [
        ("tcp://*:5557", "10.0.0.1", 0, "tcp://10.0.0.1:5557"),
        ("tcp://0.0.0.0:5557", "gpu-1", 3, "tcp://gpu-1:5560"),
        ("tcp://[::]:5557", "fd00::1", 0, "tcp://[fd00::1]:5557"),
        ("tcp://:::5557", "::1", 1, "tcp://[::1]:5558"),
        ("tcp://*:5557", None, 0, "tcp://127.0.0.1:5557"),
        ("tcp://GPU-1.example.:5557", "gpu-1.example", 0, "tcp://GPU-1.example.:5557"),
        ("tcp://[FD00::1]:5557", "fd00::1", 0, "tcp://[FD00::1]:5557"),
        ("ipc:///run/kv", None, 0, "ipc:///run/kv"),
        ("ipc:///run/kv", "127.0.0.9", 0, "ipc:///run/kv"),
        ("ipc:///run/kv", "::1", 0, "ipc:///run/kv"),
        ("ipc:///run/kv", "localhost", 0, "ipc:///run/kv"),
    ],
)
def test_own_host_is_followed(endpoint: str, host: str | None, rank: int, expected: str) -> None:
    assert resolve(endpoint, host, rank) == expected


@pytest.mark.parametrize("endpoint", ["tcp://10.0.0.2:5557", "tcp://169.254.169.254:80", "ipc:///run/kv"])
def test_other_places_are_for_the_operator_to_name(endpoint: str) -> None:
    with pytest.raises(EndpointRefused):
        resolve(endpoint, "10.0.0.1")
    assert resolve(endpoint, "10.0.0.1", configured=True) == endpoint


@pytest.mark.parametrize(
    ("endpoint", "rank"),
    [
        ("", 0), ("tcp://*", 0), ("tcp://*:0", 0), ("tcp://*:65536", 0), ("tcp://*:65535", 1), ("tcp://*:x", 0),
        ("inproc://x", 0), ("pgm://x:1", 0), ("tcp://a;b:1", 0), ("tcp://u@h:1", 0), ("tcp://h:1\n", 0),
        ("tcp://::1:5557", 0), ("ipc://", 0), ("ipc://a\0b", 0), ("ipc://" + "x" * 108, 0), ("ipc:///run/kv", 1),
    ],
)  # fmt: skip
def test_malformed_endpoints_are_refused(endpoint: str, rank: int) -> None:
    with pytest.raises(EndpointRefused):
        resolve(endpoint, None, rank, configured=True)
