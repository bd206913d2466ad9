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
from gateway.edges.guards import check_head
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
        self.in_head = True
        """No head has come whole whose body is still to come."""

    @property
    def answering(self) -> bool:
        """Whether an answer is under way."""
        return bool(self.pipeline) or not getattr(self.cycle, "response_complete", True)

    def on_headers_complete(self) -> None:
        found = check_head(self.parser.get_http_version(), self.url, self.headers, self._limits)
        self._problem = found if isinstance(found, GatewayError) else None
        if self._problem is None and self.parser.should_upgrade():
            self._problem = InvalidRequest("Protocol upgrades are not served here.", code="upgrade_refused")
        if self._problem is not None:
            raise _Refused
        super().on_headers_complete()
        self.in_head = False
        self.headers = []  # trailers would be added to the head that has been checked

    def on_message_complete(self) -> None:
        self.in_head = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer in the API's own shape, and close. Without an answer where it would be taken for that of the request
        before, or for a second one."""
        of_a_head = self.in_head and not self.answering
        of_a_body = not self.in_head and not self.pipeline and not self.cycle.response_started
        if not of_a_head and not of_a_body:
            self.transport.close()
            return
        problem = self._problem or InvalidRequest("This is not a valid HTTP/1.1 request.", code="invalid_http")
        body = problem.body()
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[problem.status], len(body), body)
        )
        self.transport.close()
