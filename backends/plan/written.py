"""A plan as a configuration file of the gateway: `models`, `backends` and `launch`, which `tidegate check` accepts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from backends.plan.advice import Advice
from backends.plan.commands import NODE_ADDRESS, PORT, Checkpoint, spec_of
from backends.plan.errors import PlanError
from backends.plan.report import Asked, gpu_lines, gpu_report, model_lines, model_report

_PLAIN = re.compile(r"^[A-Za-z][A-Za-z0-9_./-]*$")
_WORDS = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})  # no text to YAML
_PORT_STEP = 10


def configuration(asked: Asked, advice: Advice, checkpoint: Checkpoint, *, command: str) -> str:
    """The file, figures first. Raises `PlanError` where nothing fits or no checkpoint has the precision."""
    if advice.chosen is None:
        raise PlanError(f"nothing to write: it does not fit on {advice.gpu.title}")
    if not checkpoint.as_stored and advice.question.precision != "fp8":
        raise PlanError(f"nothing to write: no checkpoint in {advice.question.precision} is known here")
    model = model_report(asked, advice.question, checkpoint)
    found = gpu_report(advice, checkpoint, asked.usd_per_gpu_hour)
    lines = [f"# Planned by: {command}", "#"]
    lines += [f"# {line}" for line in model_lines(model)]
    lines += [
        f"# {line}"
        for line in gpu_lines(found, context_tokens=asked.context_tokens, concurrency=asked.concurrency)
        if not line.startswith("  no:")
    ]
    lines += [f"#   no:  {refused}" for refused in advice.refused[-1:]]  # the largest that is too small
    lines += ["#", *(f"# {line}" for line in _how(advice))]
    lines += ["models:", f"  {_text(checkpoint.name)}: {{backend: pool}}", "", "backends:", "  pool:"]
    lines += [f"    engine: {advice.question.engine}", "    launch:"]
    lines += [f"      {name}: {_value(value)}" for name, value in _launch(advice, checkpoint)]
    return "\n".join(_wrapped(lines)) + "\n"


def _how(advice: Advice) -> Iterator[str]:
    chosen = advice.chosen
    assert chosen is not None
    if chosen.nodes > 1:
        others = "--node-rank 1" if chosen.nodes == 2 else f"--node-rank 1 to {chosen.nodes - 1}"
        yield "The gateway and `tidegate fleet up --config FILE --node-rank 0` run on the first machine, the same with"
        yield f"{others} on the other. node_address is one of the first machine's that the other reaches: change it."
    else:
        yield "tidegate serve --config FILE runs the gateway, tidegate fleet up --config FILE the servers beside it."
    if advice.gpu.vendor == "intel":
        yield "The engine is vLLM with the plugin vllm-gaudi: https://docs.vllm.ai/projects/gaudi/en/latest/"
        if advice.replicas_per_node > 1 and advice.replicas > 1:
            yield "One server a machine is written: several need HABANA_VISIBLE_MODULES, which launch does not set."
    if advice.gpu.vendor == "amd":
        yield "The engine needs its ROCm build."


def _launch(advice: Advice, checkpoint: Checkpoint) -> Iterator[tuple[str, Any]]:
    chosen = advice.chosen
    assert chosen is not None
    spec = spec_of(advice.question, chosen, checkpoint)
    yield "model", spec.model
    # CUDA_VISIBLE_DEVICES keeps servers of one machine apart; Gaudi has another variable.
    here = 1 if advice.gpu.vendor == "intel" else min(advice.replicas, advice.replicas_per_node)
    if here > 1:
        yield "count", here
    yield "port", PORT
    if here > 1:
        yield "port_step", _PORT_STEP
    for name, nothing in (("tp", 1), ("pp", 1), ("dp", 1), ("ep", 1), ("nodes", 1)):
        if getattr(spec, name) != nothing:
            yield name, getattr(spec, name)
    if chosen.nodes > 1:
        yield "node_address", NODE_ADDRESS
    if here > 1:
        yield "gpus_per_server", chosen.gpus
    for name in ("dtype", "quantization", "kv_cache_dtype", "context_tokens", "memory_fraction"):
        if getattr(spec, name) is not None:
            yield name, getattr(spec, name)
    if spec.speculative is not None:
        words = ("algorithm", "steps", "topk", "draft_tokens")
        said = {name: getattr(spec.speculative, name) for name in words}
        yield "speculative", {name: value for name, value in said.items() if value is not None}
    if spec.flags:
        yield "flags", list(spec.flags)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_value(each) for each in value) + "]"
    return _text(value) if isinstance(value, str) else str(value)


def _text(value: str) -> str:
    """A word as YAML: quoted where it could be read as anything else."""
    if _PLAIN.match(value) and value.lower() not in _WORDS:
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _wrapped(lines: list[str], width: int = 118) -> Iterator[str]:
    """Comments no longer than a line; further lines of one are indented."""
    for line in lines:
        if not line.startswith("#"):
            yield line
            continue
        indent = "#   " + " " * (len(line[1:]) - len(line[1:].lstrip()) - 1)
        while len(line) > width and " " in line[len(indent) : width]:
            cut = line.rindex(" ", len(indent), width)
            yield line[:cut].rstrip()
            line = indent + line[cut + 1 :]
        yield line
