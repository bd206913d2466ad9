"""llama.cpp's server with the model that the other engines serve, and the same adapters."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.engines.environment import SetupError
from tests.engines.install import MODEL
from tests.engines.replica import ADAPTERS, LATER, NAME, RUNNING_LIMIT, Counts, Metrics

SLOT_TOKENS = 8192
# Their numbers are their places.
HELD = (*ADAPTERS, LATER)


class LlamaCpp:
    """llama.cpp's HTTP server, from the wheel `xllamacpp`."""

    engine = "llamacpp"
    memory_bytes = 200_000_000
    start_limit_s = 30.0
    stop_limit_s = 40.0
    """It keeps streams that were cut off alive with pings for half a minute."""

    def __init__(self, prompt_cache_mib: int = 0) -> None:
        """`prompt_cache_mib`: memory for the caches of finished prompts, which mixes up adapters (`test_native.py`).

        llama.cpp's own default is 8192.
        """
        self._prompt_cache_mib = prompt_cache_mib

    def command(self, port: int, sockets: Path) -> list[str]:
        model = MODEL / "model.gguf"
        if not model.exists():
            raise SetupError("the model is not made; `make test-engines` does it")
        command = [sys.executable, "-m", "tests.engines.llamacpp.serve", "--model", str(model), "--alias", NAME]
        command += ["--port", str(port), "--slots", str(RUNNING_LIMIT), "--ctx", str(RUNNING_LIMIT * SLOT_TOKENS)]
        command += ["--prompt-cache-mib", str(self._prompt_cache_mib)]
        for name in HELD:
            command += ["--lora", str(MODEL / f"{name}.gguf")]
        return command

    def environment(self) -> dict[str, str]:
        return dict(os.environ)

    def addressed(self, adapter: str | None) -> dict[str, Any]:
        """All scales are given: it would else answer from the cache of a request with another adapter."""
        scales = [{"id": place, "scale": float(name == adapter)} for place, name in enumerate(HELD)]
        return {"model": NAME, "lora": scales}

    def counts(self, url: str) -> Counts:
        metrics = Metrics.of(url)
        return Counts(
            running=metrics.total("llamacpp:requests_processing"),
            waiting=metrics.total("llamacpp:requests_deferred"),
            prompt_tokens=metrics.total("llamacpp:prompt_tokens_total"),
            generated_tokens=metrics.total("llamacpp:tokens_predicted_total"),
            cached_tokens=metrics.total("llamacpp:prompt_tokens_cached_total"),
            aborted=None,
        )
