"""The command line and the environment that start one server: a `LaunchSpec` in its engine's own words.

The settings that are asked for are said in the order of `SETTINGS`; `flags` come last, so that they win where an
engine takes the last of two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backends.launch.engines import WORDS, Words, refuse
from backends.launch.spec import LaunchError, LaunchSpec

SETTINGS: Mapping[str, Any] = {
    "revision": None,
    "tp": 1,
    "pp": 1,
    "dp": 1,
    "ep": 1,
    "nodes": 1,
    "dtype": None,
    "quantization": None,
    "kv_cache_dtype": None,
    "context_tokens": None,
    "max_running": None,
    "memory_fraction": None,
    "speculative": None,
    "adapters": (),
    "lora": False,
    "max_loras": None,
    "max_lora_rank": None,
}
"""What an engine may be asked for, in the order in which it is said, and the value that asks for nothing."""


def launchable() -> tuple[str, ...]:
    """The engines that can be started; others (`openai`, say) are somebody else's servers."""
    return tuple(WORDS)


def command_of(spec: LaunchSpec) -> list[str]:
    """The words of the command line. Raises `LaunchError`, which names the setting that the engine has no word for.

    A `command` of the spec's own is taken as it is, but for {host}, {port}, {index} and {name}.
    """
    if spec.command is not None:
        return [_filled(word, spec) for word in spec.command]
    words = WORDS.get(spec.engine)
    if words is None:
        raise LaunchError(
            f"{spec.engine} is not an engine that can be started; these are: {', '.join(launchable())}", "engine"
        )
    if not 0 <= spec.node_rank < spec.nodes:
        raise LaunchError(f"launch.node_rank: {spec.node_rank} of {spec.nodes} nodes; they count from 0", "node_rank")
    command = words.begin(spec)
    for setting, nothing in SETTINGS.items():
        if getattr(spec, setting) != nothing:
            command += _said(words, setting, spec)
    return [*command, *spec.flags]


def environment_of(spec: LaunchSpec) -> dict[str, str]:
    """What is added to the environment of the process; `spec.env` wins."""
    added = {"PYTHONUNBUFFERED": "1"}  # or what it says of its progress would come in pieces of 8 KB
    if spec.gpus is not None:
        # NVIDIA's name, and AMD's. A ROCm build of PyTorch reads both, and refuses two that differ.
        added |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), ",".join(map(str, spec.gpus)))
    if spec.engine == "vllm" and (spec.lora or spec.adapters):
        added["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return added | dict(spec.env)


def _said(words: Words, setting: str, spec: LaunchSpec) -> list[str]:
    """One setting that is asked for."""
    if setting in words.flags:
        return [words.flags[setting], str(getattr(spec, setting))]
    if setting == "lora" and setting not in words.instead and "adapters" in words.phrases:
        # The adapters of the start switch it on as well, and have said so.
        return [] if spec.adapters else words.phrases["adapters"](spec)
    if setting in words.phrases:
        return words.phrases[setting](spec)
    raise refuse(spec, setting, words.instead.get(setting, "has no word for it; take it out, or write `flags`"))


def _filled(word: str, spec: LaunchSpec) -> str:
    for name in ("host", "port", "index", "name"):
        word = word.replace(f"{{{name}}}", str(getattr(spec, name)))
    return word
