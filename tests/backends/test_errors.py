from __future__ import annotations

import errno
import inspect
import socket
import ssl

import pytest

from backends import errors
from backends.errors import ConnectFailed, ConnectTimeout, Disconnected, HeadTimeout, UpstreamError, reason_of


def test_module_docstring_draws_every_error() -> None:
    assert errors.__doc__ is not None
    classes = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, UpstreamError)]
    assert len(classes) > 5
    for c in classes:
        assert c.__name__ in errors.__doc__
        assert c.fault in ("upstream", "gateway")


@pytest.mark.parametrize(
    ("sent", "reused", "got_bytes", "safe"),
    [
        (False, False, False, True),
        (True, False, False, False),
        (True, True, False, True),
        (True, True, True, False),
    ],
)
def test_disconnect_may_be_retried_only_when_nothing_can_have_happened(
    sent: bool, reused: bool, got_bytes: bool, safe: bool
) -> None:
    error = Disconnected("h:1", "head", "closed", sent=sent, reused=reused, got_bytes=got_bytes)
    assert error.retry_safe is safe


def test_timeout_of_a_sent_request_may_not_be_retried() -> None:
    assert not HeadTimeout("h:1", "head", "silence", sent=True, reused=True).retry_safe
    assert ConnectTimeout("h:1", "connect", "silence").retry_safe
    assert issubclass(ConnectTimeout, ConnectFailed)


def test_message_names_address_reason_and_phase() -> None:
    error = ConnectFailed("127.0.0.1:30000", "connect", "connection refused")
    assert str(error) == "127.0.0.1:30000: connection refused (connect)"
    assert (error.address, error.phase, error.reason) == ("127.0.0.1:30000", "connect", "connection refused")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"),
            "connection refused",
        ),
        (ConnectionResetError(errno.ECONNRESET, "x"), "connection reset by peer"),
        (ConnectionResetError("SSL connection is closed"), "ssl connection is closed"),
        (OSError(), "OSError"),
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "name not resolved: name or service not known",
        ),
        (
            ssl.SSLError(1, "[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1)"),
            "TLS failed: sslerror",
        ),
        (UnicodeError("label too long"), "label too long"),
    ],
)
def test_reason_is_short(error: BaseException, reason: str) -> None:
    assert reason_of(error) == reason
