"""Azure OpenAI in Microsoft Foundry, through its v1 route: `https://RESOURCE.openai.azure.com/openai/v1`.

The v1 route is generally available since August 2025 and takes the name of the deployment as the model; it needs no
`api-version`. `https://RESOURCE.services.ai.azure.com/openai/v1` is the same. The older route
(`/openai/deployments/NAME/…?api-version=…`) is not spoken: Microsoft's documentation of 2026 describes v1 only, and
every resource has both.
Sources: learn.microsoft.com, "Azure OpenAI in Microsoft Foundry Models v1 API" (19 March 2026), "Troubleshoot common
HTTP errors" (20 September 2026), and Azure/azure-rest-api-specs, `OpenAI.v1/azure-v1-v1-generated.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from backends.dialects.openai import OpenAI, readiness
from backends.dialects.protocol import EngineInfo, Fault, Readiness
from backends.side import SideChannel


class Azure(OpenAI):
    """OpenAI's API with the key in a header of its own, and a content filter that speaks."""

    name = "azure"
    hosted = True

    def head_fields(self, api_key: str | None) -> Sequence[tuple[str, str]]:
        """A key goes into `api-key`. A token of Microsoft Entra ID goes where the backend's `key_header` says."""
        return [] if api_key is None else [("api-key", api_key)]

    def judge_error(self, status: int, error: Mapping[str, Any]) -> Fault:
        """A prompt that the content filter refused is its sender's, also where a stream says it without a status."""
        if error.get("code") == "content_filter":
            return Fault.REQUEST
        return super().judge_error(status, error)

    async def probe(self, side: SideChannel, model: str | None) -> Readiness:
        """One read of a model, whatever is known of it.

        Models are the resource's catalogue and not its deployments: a deployment of another name answers 404, behind
        the same check of the key. Asking on for the list would bring hundreds of models and no more knowledge.
        """
        return readiness(await side.get("/v1/models" if model is None else f"/v1/models/{quote(model, safe='')}"))

    async def info(self, side: SideChannel) -> EngineInfo:
        """Nothing: the models it lists are those that could be deployed."""
        return EngineInfo()
