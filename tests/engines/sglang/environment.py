"""A real SGLang on this machine's CPU, with import-only stubs for the packages that only GPUs have."""

from __future__ import annotations

from pathlib import Path

from tests.engines.environment import FOLDER, Environment

HERE = Path(__file__).resolve().parent

SGLANG = Environment(
    engine="SGLang",
    venv=FOLDER / "sglang" / "venv",
    requirements=HERE / "requirements.txt",
    module="sglang.launch_server",
    size_bytes=1_800_000_000,
    variables={"PYTHONPATH": str(HERE / "stubs"), "SGLANG_USE_CPU_ENGINE": "1"},
)
