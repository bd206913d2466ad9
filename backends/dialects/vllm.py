"""vLLM. Stops generating within half a second of a closed connection; has no abort endpoint on its OpenAI server."""

from __future__ import annotations

from backends.dialects.openai import OpenAI


class VLLM(OpenAI):
    """Plain OpenAI for what is used so far."""

    name = "vllm"
