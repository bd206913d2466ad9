"""What can go wrong between the gateway and a model server.

    UpstreamError
    ├── ConnectFailed            no connection: refused, unreachable, name unknown, TLS refused
    │   └── ConnectTimeout       ... or not within the connect time-out
    ├── OutOfSockets             no connection: this process has no descriptor left for one
    ├── PoolTimeout              every allowed connection stayed busy for too long
    ├── PoolClosed               the pool is being drained, or was closed under the request
    ├── HeadTimeout              the request went out, no response head came back in time
    ├── IdleTimeout              the response began and then fell silent
    ├── Disconnected             reset, or end of stream before the message was complete
    ├── ProtocolViolation        bytes that are not a well-framed HTTP/1.1 response
    └── ConsumerFailed           our own callback raised; the exchange was given up

Foreign exceptions (`OSError`, `ssl`, `TimeoutError`, httptools) are translated where they enter, in `pool.py`
and `http1.py`, and stay reachable as `__cause__`. Messages name the address, the reason and the phase, never
a byte of a request or a response: they end up in logs.
"""

from __future__ import annotations

import errno
import os
import ssl
from socket import gaierror
from typing import ClassVar, Literal

Phase = Literal["pool", "connect", "head", "body"]
Fault = Literal["upstream", "gateway"]


class UpstreamError(Exception):
    """One exchange with a model server failed, in this phase and for this reason.

    `sent`: bytes of the request may have reached the server. `reused`: the connection had carried a response
    before. `got_bytes`: at least one byte of an answer to this request came back.
    """

    fault: ClassVar[Fault] = "upstream"

    def __init__(
        self,
        address: str,
        phase: Phase,
        reason: str,
        *,
        sent: bool = False,
        reused: bool = False,
        got_bytes: bool = False,
    ) -> None:
        super().__init__(f"{address}: {reason} ({phase})")
        self.address = address
        self.phase: Phase = phase
        self.reason = reason
        self.sent = sent
        self.reused = reused
        self.got_bytes = got_bytes

    @property
    def retry_safe(self) -> bool:
        """True when the server cannot have begun to work on the request: sending it again repeats nothing."""
        return not self.sent


class ConnectFailed(UpstreamError):
    """No connection could be made; nothing was sent."""


class ConnectTimeout(ConnectFailed):
    """No connection (TLS handshake included) was made in time; nothing was sent."""


class OutOfSockets(UpstreamError):
    """This process could not open a socket. Says nothing of the server; nothing was sent."""

    fault = "gateway"

    NUMBERS: ClassVar = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
    """No descriptor (of the process, of the system), no memory in the kernel."""


class PoolTimeout(UpstreamError):
    """All allowed connections were busy for longer than the caller would wait; nothing was sent."""

    fault = "gateway"


class PoolClosed(UpstreamError):
    """The pool no longer takes requests, or was closed by force while this one was under way."""

    fault = "gateway"


class HeadTimeout(UpstreamError):
    """The server did not answer in time. It may well be working on the request."""


class IdleTimeout(UpstreamError):
    """The server stopped sending in the middle of a response."""


class Disconnected(UpstreamError):
    """The connection ended before the response did."""

    @property
    def retry_safe(self) -> bool:
        """Also true for a kept-alive connection that died without a byte of answer.

        That is the keep-alive race: the server closed an idle connection while our request was on its way
        (RFC 9112 9.3.1). One more attempt is right; a second one would be guessing.
        """
        return not self.sent or (self.reused and not self.got_bytes)


class ProtocolViolation(UpstreamError):
    """What came back is not a response that can be framed safely."""


class ConsumerFailed(UpstreamError):
    """A callback of our own raised. The traceback is in the log; the connection is closed."""

    fault = "gateway"


def reason_of(error: BaseException) -> str:
    """Say in a few words, free of request content, why the network refused.

    >>> reason_of(ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"))
    'connection refused'
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate verify failed: {getattr(error, 'verify_message', 'no reason given')}"
    if isinstance(error, ssl.SSLError):
        # Only OpenSSL's own errors have a reason; asyncio and uvloop raise some without.
        return f"TLS failed: {(getattr(error, 'reason', None) or type(error).__name__).lower()}"
    if isinstance(error, gaierror):
        return f"name not resolved: {error.strerror}".lower()
    if isinstance(error, OSError) and error.errno is not None:
        # Not error.strerror: asyncio writes "Connect call failed ('127.0.0.1', 1)" into it.
        return os.strerror(error.errno).lower()
    return str(error).lower() or type(error).__name__
