"""How each engine's wire format differs from plain OpenAI, one module per engine.

A dialect says which top-level values of the body to set (they are spliced into the caller's bytes) and how a running
request is aborted. Health, load and adapters join this protocol with the issue that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from backends.dialects import llamacpp, openai, sglang, vllm


class Dialect(Protocol):
    """One engine's way of speaking."""

    name: str

    def body_values(self, path: str, fields: Mapping[str, Any], request_id: str) -> dict[str, bytes]:
        """Top-level values to set, as JSON text. `fields` is the caller's body, not to be changed."""
        ...

    def abort_request(self, request_id: str) -> tuple[str, bytes] | None:
        """Path and JSON body of the POST that stops a running request; None when closing the connection must do."""
        ...


DIALECTS: Mapping[str, Dialect] = {
    dialect.name: dialect for dialect in (openai.OpenAI(), sglang.SGLang(), vllm.VLLM(), llamacpp.LlamaCpp())
}
"""By the `engine` of the configuration."""
