"""Each engine's own words for a `LaunchSpec`, as its command line has them.

Read in the engines' own parsers: SGLang 0.5.23, vLLM 0.32.0 and LMDeploy 0.18.0 in their wheels, TensorRT-LLM in its
sources (`tensorrt_llm/commands/serve.py`) and the documentation of its command line. docs/launching.md has the table.

What an engine has no word for is refused, with what to do instead: a setting that is quietly left out would start a
server that is not the one that was asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from backends.launch.spec import LaunchError, LaunchSpec, SpeculativeSpec

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that `vllm serve --max-lora-rank` takes."""


@dataclass(frozen=True, slots=True)
class Words:
    """How one engine is spoken to."""

    name: str
    """As people call it."""
    begin: Callable[[LaunchSpec], list[str]]
    """What every start needs: the program, the model, its name, the address, and what the gateway reads."""
    flags: Mapping[str, str]
    """Settings that are one flag and a value: setting → flag."""
    phrases: Mapping[str, Callable[[LaunchSpec], list[str]]] = field(default_factory=dict)
    """Settings that take more than that. May raise `LaunchError`."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Settings that the engine has no word for, where something else helps: setting → what."""


def python_of(spec: LaunchSpec) -> str:
    """The interpreter that has the engine."""
    return spec.python or sys.executable


def refuse(spec: LaunchSpec, setting: str, why: str) -> LaunchError:
    """The error for a setting that this engine cannot be given."""
    return LaunchError(f"launch.{setting}: {WORDS[spec.engine].name} {why}", setting)


def _sglang(spec: LaunchSpec) -> list[str]:
    if ":" in spec.served_name:
        raise LaunchError(
            f"the model's name {spec.served_name!r} has a colon, which SGLang keeps for model:adapter", "served_name"
        )
    words = [python_of(spec), "-m", "sglang.launch_server", "--model-path", spec.model]
    words += ["--served-model-name", spec.served_name, "--host", spec.host, "--port", str(spec.port)]
    return [*words, "--enable-cache-report", "--enable-metrics"]


def _sglang_dp(spec: LaunchSpec) -> list[str]:
    if spec.nodes > 1:
        raise refuse(
            spec,
            "dp",
            "runs its copies of a model on one machine only; for attention that is data-parallel over machines write "
            "flags: [--attn-dp-size, N]",
        )
    return ["--dp-size", str(spec.dp)]


def _sglang_ep(spec: LaunchSpec) -> list[str]:
    if spec.tp % spec.ep:
        raise refuse(spec, "ep", f"spreads experts inside of tp ({spec.tp}), which {spec.ep} does not divide")
    return ["--ep-size", str(spec.ep)]


def _sglang_nodes(spec: LaunchSpec) -> list[str]:
    return ["--nnodes", str(spec.nodes), "--node-rank", str(spec.node_rank), "--dist-init-addr", _node_address(spec)]


def _sglang_speculative(spec: LaunchSpec) -> list[str]:
    asked = _speculative(spec)
    words = ["--speculative-algorithm", asked.algorithm]
    for flag, value in (
        ("--speculative-draft-model-path", asked.draft_model),
        ("--speculative-num-steps", asked.steps),
        ("--speculative-eagle-topk", asked.topk),
        ("--speculative-num-draft-tokens", asked.draft_tokens),
    ):
        words += [flag, str(value)] if value is not None else []
    return words


def _sglang_lora(spec: LaunchSpec) -> list[str]:
    words = ["--enable-lora"]
    if spec.adapters:
        words += ["--lora-paths", *(f"{name}={path}" for name, path in spec.adapters)]
    elif spec.max_lora_rank is None:
        raise refuse(spec, "max_lora_rank", "has to be told it, where no adapter of the start shows it")
    # Without it, only modules that the adapters of the start have could be adapted by later ones.
    if spec.lora and "--lora-target-modules" not in spec.flags:
        words += ["--lora-target-modules", "all"]
    return words


def _vllm(spec: LaunchSpec) -> list[str]:
    words = [python_of(spec), "-m", "vllm.entrypoints.cli.main", "serve", spec.model]
    words += ["--served-model-name", spec.served_name, "--host", spec.host, "--port", str(spec.port)]
    # The gateway drains a server before it is stopped; this is for streams of clients that came past the gateway.
    return [*words, "--enable-prompt-tokens-details", "--shutdown-timeout", "20"]


def _vllm_ep(spec: LaunchSpec) -> list[str]:
    if spec.ep != spec.tp * spec.dp:
        raise refuse(spec, "ep", f"spreads experts over all of tp x dp ({spec.tp * spec.dp}) or over none")
    return ["--enable-expert-parallel"]


def _vllm_nodes(spec: LaunchSpec) -> list[str]:
    host, _, port = _node_address(spec).rpartition(":")
    words = ["--nnodes", str(spec.nodes), "--node-rank", str(spec.node_rank)]
    words += ["--master-addr", host.strip("[]"), "--master-port", port]
    return [*words, "--headless"] if spec.node_rank else words


def _vllm_speculative(spec: LaunchSpec) -> list[str]:
    asked = _speculative(spec)
    said: dict[str, str | int] = {"method": asked.algorithm.lower()}
    if asked.draft_model is not None:
        said["model"] = asked.draft_model
    if asked.steps is not None:
        said["num_speculative_tokens"] = asked.steps
    _no_branches(spec, asked)
    return ["--speculative-config", json.dumps(said)]


def _vllm_lora(spec: LaunchSpec) -> list[str]:
    words = ["--enable-lora"]
    if spec.adapters:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in spec.adapters)]
    return words


def _vllm_rank(spec: LaunchSpec) -> list[str]:
    asked = spec.max_lora_rank or 1
    if asked > VLLM_RANKS[-1]:
        raise refuse(spec, "max_lora_rank", f"takes no adapters of more than {VLLM_RANKS[-1]}")
    return ["--max-lora-rank", str(min(rank for rank in VLLM_RANKS if rank >= asked))]


def _trtllm(spec: LaunchSpec) -> list[str]:
    words = [python_of(spec), "-m", "tensorrt_llm.commands.serve", "serve", spec.model]
    words += ["--served_model_name", spec.served_name, "--host", spec.host, "--port", str(spec.port)]
    return [*words, "--backend", "pytorch"]


def _trtllm_ep(spec: LaunchSpec) -> list[str]:
    if spec.tp % spec.ep:
        raise refuse(spec, "ep", f"spreads experts inside of tp ({spec.tp}), which {spec.ep} does not divide")
    return ["--ep_size", str(spec.ep)]


def _lmdeploy(spec: LaunchSpec) -> list[str]:
    words = [python_of(spec), "-m", "lmdeploy", "serve", "api_server", spec.model]
    words += ["--model-name", spec.served_name, "--server-name", spec.host, "--server-port", str(spec.port)]
    # Off by default there, and what the gateway routes by.
    return [*words, "--enable-prefix-caching"]


def _lmdeploy_adapters(spec: LaunchSpec) -> list[str]:
    words = ["--adapters", *(f"{name}={path}" for name, path in spec.adapters)]
    # Its other backend (TurboMind, the default) ignores them.
    return words if "--backend" in spec.flags else ["--backend", "pytorch", *words]


def _lmdeploy_nodes(spec: LaunchSpec) -> list[str]:
    return ["--nnodes", str(spec.nodes), "--node-rank", str(spec.node_rank), "--dist-init-addr", _node_address(spec)]


def _lmdeploy_speculative(spec: LaunchSpec) -> list[str]:
    asked = _speculative(spec)
    words = ["--speculative-algorithm", asked.algorithm.lower()]
    words += ["--speculative-draft-model", asked.draft_model] if asked.draft_model is not None else []
    words += ["--speculative-num-draft-tokens", str(asked.steps)] if asked.steps is not None else []
    _no_branches(spec, asked)
    return words


def _llamacpp(spec: LaunchSpec) -> list[str]:
    words = [python_of(spec), "-m", "backends.launch.llamacpp", "--model", spec.model, "--alias", spec.served_name]
    return [*words, "--host", spec.host, "--port", str(spec.port), "--slots", str(_slots(spec))]


def _llamacpp_context(spec: LaunchSpec) -> list[str]:
    # Its `--ctx` is shared by the slots.
    return ["--ctx", str((spec.context_tokens or 0) * _slots(spec))]


def _slots(spec: LaunchSpec) -> int:
    return 2 if spec.max_running is None else spec.max_running


def _no_branches(spec: LaunchSpec, asked: SpeculativeSpec) -> None:
    """Refuse what only SGLang's drafting has."""
    for setting in ("topk", "draft_tokens"):
        if getattr(asked, setting) is not None:
            raise refuse(spec, f"speculative.{setting}", "drafts one chain of tokens; write `steps`, its length")


def _node_address(spec: LaunchSpec) -> str:
    if spec.node_address is None:
        raise LaunchError(
            "launch.node_address is needed with several nodes: host:port at the machine of rank 0", "node_address"
        )
    return spec.node_address


def _speculative(spec: LaunchSpec) -> SpeculativeSpec:
    assert spec.speculative is not None  # asked for only where it is
    return spec.speculative


_IN_A_FILE = "takes it from a file only: write flags: [--config, FILE]"
_GGUF = "has it in the GGUF file"

WORDS: Mapping[str, Words] = {
    "sglang": Words(
        "SGLang",
        _sglang,
        {
            "revision": "--revision",
            "tp": "--tp-size",
            "pp": "--pp-size",
            "dtype": "--dtype",
            "quantization": "--quantization",
            "kv_cache_dtype": "--kv-cache-dtype",
            "context_tokens": "--context-length",
            "max_running": "--max-running-requests",
            "memory_fraction": "--mem-fraction-static",
            "max_loras": "--max-loras-per-batch",
            "max_lora_rank": "--max-lora-rank",
        },
        {
            "dp": _sglang_dp,
            "ep": _sglang_ep,
            "nodes": _sglang_nodes,
            "speculative": _sglang_speculative,
            "adapters": _sglang_lora,
        },
    ),
    "vllm": Words(
        "vLLM",
        _vllm,
        {
            "revision": "--revision",
            "tp": "--tensor-parallel-size",
            "pp": "--pipeline-parallel-size",
            "dp": "--data-parallel-size",
            "dtype": "--dtype",
            "quantization": "--quantization",
            "kv_cache_dtype": "--kv-cache-dtype",
            "context_tokens": "--max-model-len",
            "max_running": "--max-num-seqs",
            "memory_fraction": "--gpu-memory-utilization",
            "max_loras": "--max-loras",
        },
        {
            "ep": _vllm_ep,
            "nodes": _vllm_nodes,
            "speculative": _vllm_speculative,
            "adapters": _vllm_lora,
            "max_lora_rank": _vllm_rank,
        },
    ),
    "trtllm": Words(
        "TensorRT-LLM",
        _trtllm,
        {
            "revision": "--revision",
            "tp": "--tp_size",
            "pp": "--pp_size",
            "context_tokens": "--max_seq_len",
            "max_running": "--max_batch_size",
            "memory_fraction": "--free_gpu_memory_fraction",
        },
        {"ep": _trtllm_ep},
        {
            "nodes": "is started on several machines by mpirun or Slurm (trtllm-llmapi-launch): write that as a "
            "`command`",
            "dp": "has data-parallel attention only, inside of tp: write flags: [--config, FILE] with "
            "enable_attention_dp: true",
            **dict.fromkeys(("dtype", "quantization", "kv_cache_dtype", "speculative", "adapters"), _IN_A_FILE),
            **dict.fromkeys(("max_loras", "max_lora_rank"), _IN_A_FILE),
        },
    ),
    "lmdeploy": Words(
        "LMDeploy",
        _lmdeploy,
        {
            "revision": "--revision",
            "tp": "--tp",
            "dp": "--dp",
            "ep": "--ep",
            "dtype": "--dtype",
            "quantization": "--model-format",
            "kv_cache_dtype": "--quant-policy",
            "context_tokens": "--session-len",
            "max_running": "--max-batch-size",
            "memory_fraction": "--cache-max-entry-count",
        },
        {"nodes": _lmdeploy_nodes, "speculative": _lmdeploy_speculative, "adapters": _lmdeploy_adapters},
        {
            "pp": "has no pipeline parallelism",
            "lora": "loads adapters only at its start: name them under `adapters`",
            **dict.fromkeys(("max_loras", "max_lora_rank"), "sizes itself for the adapters of its start"),
        },
    ),
    "llamacpp": Words(
        "llama.cpp",
        _llamacpp,
        {},
        {"context_tokens": _llamacpp_context, "max_running": lambda spec: []},  # `--slots`, which is always said
        {
            "revision": "takes a file, not the name of a model",
            **dict.fromkeys(("dtype", "quantization"), _GGUF),
            **dict.fromkeys(("adapters", "lora"), "is started here without adapters; write a `command` of your own"),
        },
    ),
}
