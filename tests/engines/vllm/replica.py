"""vLLM, started with everything on that Tidegate reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.engines.environment import SetupError
from tests.engines.install import MODEL
from tests.engines.replica import ADAPTERS, NAME, RUNNING_LIMIT, Counts, Metrics
from tests.engines.vllm.environment import VLLM as ENVIRONMENT

BLOCK_TOKENS = 32
"""The attention of its CPU build takes multiples of 32 only."""

FLAGS = {
    "--model": str(MODEL / "hf"),
    "--served-model-name": NAME,
    "--host": "127.0.0.1",
    "--dtype": "float32",  # no rounding that depends on the batch a request met
    "--max-model-len": "8192",
    "--max-num-seqs": str(RUNNING_LIMIT),
    "--block-size": str(BLOCK_TOKENS),
    "--scheduling-policy": "priority",
    "--tool-call-parser": "pythonic",
    "--max-loras": "4",  # its last slot has to stay empty: see `test_vllm_on_a_cpu_...` of test_native.py
    "--max-lora-rank": "8",
    "--seed": "0",
}
SWITCHES = (
    "--enforce-eager",  # nothing is compiled: a start takes seconds instead of minutes
    "--enable-prompt-tokens-details",
    "--enable-server-load-tracking",
    "--enable-auto-tool-choice",
    "--enable-lora",
)


class VLLM:
    """vLLM 0.32.0 on the CPU."""

    engine = "vllm"
    memory_bytes = 2_600_000_000
    start_limit_s = 400.0
    """40 s on an idle machine; minutes where other programs hold the cores."""
    stop_limit_s = 60.0

    def command(self, port: int, sockets: Path) -> list[str]:
        if not ENVIRONMENT.python.exists() or not MODEL.exists():
            raise SetupError("vLLM is not set up here; `make test-engines` does it")
        command = [str(ENVIRONMENT.python), "-W", "ignore", "-m", ENVIRONMENT.module, "--port", str(port), *SWITCHES]
        for flag, value in FLAGS.items():
            command += [flag, value]
        command += ["--lora-modules", *(f"{name}={MODEL / name}" for name in ADAPTERS)]
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "topic": "kv-events",
            "endpoint": f"ipc://{sockets}/{port}-kv",
        }
        return [*command, "--kv-events-config", json.dumps(events)]

    def environment(self) -> dict[str, str]:
        return ENVIRONMENT.process_environment()

    def addressed(self, adapter: str | None) -> dict[str, Any]:
        return {"model": adapter or NAME}

    def counts(self, url: str) -> Counts:
        metrics = Metrics.of(url)
        return Counts(
            running=metrics.total("vllm:num_requests_running"),
            waiting=metrics.total("vllm:num_requests_waiting"),
            prompt_tokens=metrics.total("vllm:prompt_tokens_total"),
            generated_tokens=metrics.total("vllm:generation_tokens_total"),
            cached_tokens=metrics.total("vllm:prefix_cache_hits_total"),
            aborted=None,  # `request_success_total{finished_reason="abort"}` stays at 0 when a client leaves
        )
