"""How each engine differs from plain OpenAI, one module per engine. `protocol` says what a dialect is."""

from __future__ import annotations

from collections.abc import Mapping

from backends.dialects import (
    anthropic,
    azure,
    baseten,
    deepseek,
    llamacpp,
    lmdeploy,
    openai,
    openrouter,
    sglang,
    trtllm,
    vllm,
)
from backends.dialects.protocol import Dialect

_ALL: tuple[Dialect, ...] = (
    sglang.SGLang(),
    vllm.VLLM(),
    trtllm.TrtLlm(),
    lmdeploy.LmDeploy(),
    llamacpp.LlamaCpp(),
    openai.OpenAI(),
    azure.Azure(),
    deepseek.DeepSeek(),
    openrouter.OpenRouter(),
    baseten.Baseten(),
    anthropic.Anthropic(),
)
DIALECTS: Mapping[str, Dialect] = {dialect.name: dialect for dialect in _ALL}
"""By the `engine` of the configuration."""

__all__ = ["DIALECTS", "Dialect"]
