"""SGLang, started with everything on that Tidegate reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx2

from tests.engines.environment import SetupError
from tests.engines.install import MODEL
from tests.engines.replica import ADAPTERS, NAME, RUNNING_LIMIT, Counts, Metrics
from tests.engines.sglang.environment import SGLANG

QUEUE_LIMIT = 4
"""Requests that may wait; what comes then is refused."""
PAGE_TOKENS = 16

FLAGS = {
    "--model-path": str(MODEL / "hf"),
    "--served-model-name": NAME,
    "--device": "cpu",
    "--dtype": "float32",  # no rounding that depends on the batch a request met
    "--attention-backend": "torch_native",
    "--tp": "1",
    "--host": "127.0.0.1",
    "--max-total-tokens": "32768",
    "--max-running-requests": str(RUNNING_LIMIT),
    "--max-queued-requests": str(QUEUE_LIMIT),
    "--page-size": str(PAGE_TOKENS),
    # Of the formats for tool calls, one whose forced calls obey the switch against blanks below.
    "--tool-call-parser": "pythonic",
    "--lora-backend": "torch_native",
    "--max-loras-per-batch": "4",
    "--max-lora-rank": "8",
    "--random-seed": "0",
}
SWITCHES = (
    "--sleep-on-idle",  # an idle replica would else keep a core busy
    "--enable-cache-report",
    "--enable-metrics",
    "--enable-priority-scheduling",
    "--enable-lora",
    "--constrained-json-disable-any-whitespace",  # random weights would fill the answer with blanks
)


class SGLang:
    """SGLang 0.5.23 on the CPU."""

    engine = "sglang"
    memory_bytes = 1_600_000_000
    start_limit_s = 400.0
    """20 s on an idle machine; minutes where other programs hold the cores."""
    stop_limit_s = 20.0

    def command(self, port: int, sockets: Path) -> list[str]:
        if not SGLANG.python.exists() or not MODEL.exists():
            raise SetupError("SGLang is not set up here; `make test-engines` does it")
        command = [str(SGLANG.python), "-W", "ignore", "-m", SGLANG.module, "--port", str(port), *SWITCHES]
        for flag, value in FLAGS.items():
            command += [flag, value]
        command += ["--lora-target-modules", "q_proj", "v_proj"]
        command += ["--lora-paths", *(f"{name}={MODEL / name}" for name in ADAPTERS)]
        # Over TCP the publisher binds the wildcard address only, which would open it to the network.
        events = {"publisher": "zmq", "topic": "kv-events", "endpoint": f"ipc://{sockets}/{port}-kv"}
        return [*command, "--kv-events-config", json.dumps(events)]

    def environment(self) -> dict[str, str]:
        return SGLANG.process_environment()

    def addressed(self, adapter: str | None) -> dict[str, Any]:
        """The adapter's name alone would quietly be answered by the base model."""
        return {"model": f"{NAME}:{adapter}" if adapter else NAME}

    def counts(self, url: str) -> Counts:
        answer = httpx2.get(f"{url}/v1/loads", trust_env=False, timeout=30).raise_for_status().json()
        metrics = Metrics.of(url)
        return Counts(
            running=sum(load["num_running_reqs"] for load in answer["loads"]),
            waiting=sum(load["num_waiting_reqs"] for load in answer["loads"]),
            prompt_tokens=metrics.total("sglang:prompt_tokens_total"),
            generated_tokens=metrics.total("sglang:generation_tokens_total"),
            cached_tokens=metrics.total("sglang:cached_tokens_total"),
            aborted=metrics.total("sglang:num_aborted_requests_total"),
        )
