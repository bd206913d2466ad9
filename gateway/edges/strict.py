"""The operators' connection: uvicorn's own protocol, with the same strictness about request heads as the clients' has.

Without it uvicorn would take chunks in HTTP/1.0, a request line without a version, and codings besides `chunked`: heads
that a proxy in front may read in another way.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.config import Server
from gateway.edges.guards import head_problem
from gateway.errors import GatewayError, InvalidRequest


class _Refused(Exception):
    """Stops the parser from inside a callback; the reason is in `StrictProtocol._problem`."""


class StrictProtocol(HttpToolsProtocol):
    """One connection to the admin listener."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = Server()
        """Of sizes; these have no setting of their own here."""
        self._problem: GatewayError | None = None

    def on_headers_complete(self) -> None:
        self._problem = head_problem(self.parser.get_http_version(), self.url, self.headers, self._limits)
        if self._problem is None and self.parser.should_upgrade():
            self._problem = InvalidRequest("Protocol upgrades are not served here.", code="upgrade_refused")
        if self._problem is not None:
            raise _Refused
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer in the API's own shape, and close."""
        problem = self._problem or InvalidRequest("This is not a valid HTTP/1.1 request.", code="invalid_http")
        body = problem.body()
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[problem.status], len(body), body)
        )
        self.transport.close()
