"""llama.cpp's server. Stops generating within half a second of a closed connection; has no abort endpoint."""

from __future__ import annotations

from backends.dialects.openai import OpenAI


class LlamaCpp(OpenAI):
    """Plain OpenAI for what is used so far."""

    name = "llamacpp"
