"""The servers of a placement as `LaunchSpec`s, and their commands in each engine's words."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from backends.launch.commands import command_of
from backends.launch.spec import LaunchError, LaunchSpec, SpeculativeSpec
from backends.plan.fit import Placement, Question

NODE_ADDRESS = "10.0.0.1:20000"
"""Stands for the address of the first of several machines."""
PORT = 30_000
_KV_WORDS = {"sglang": "fp8_e4m3", "vllm": "fp8", "trtllm": "fp8", "lmdeploy": "fp8"}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What an engine loads: a hub's name or a path, and whether the precision is already that of its weights."""

    name: str  # that clients call it by
    model: str
    as_stored: bool


def spec_of(question: Question, placement: Placement, checkpoint: Checkpoint, *, rank: int = 0) -> LaunchSpec:
    """The server of a placement, or of several machines the part of one of them."""
    engine, split = question.engine, placement.split
    quantization = dtype = None
    if not checkpoint.as_stored:
        quantization = question.precision if question.precision == "fp8" else None
    if (
        question.precision in _DTYPES
        and question.model.native in _DTYPES
        and question.precision != question.model.native
    ):
        dtype = _DTYPES[question.precision]
    several = placement.nodes > 1
    return LaunchSpec(
        engine=engine,
        model=checkpoint.model,
        served_name=checkpoint.name,
        port=PORT,
        tp=split.tp,
        pp=split.pp,
        dp=split.tp if split.dp_attention else 1,
        ep=split.ep,
        nodes=placement.nodes,
        node_rank=rank,
        node_address=NODE_ADDRESS if several else None,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=_KV_WORDS[engine] if question.kv == "fp8" else None,
        context_tokens=question.context_tokens,
        memory_fraction=question.memory_fraction,
        speculative=_speculative(question),
        python="python3",
        flags=("--enable-dp-attention",) if split.dp_attention else (),
    )


def _speculative(question: Question) -> SpeculativeSpec | None:
    """Drafting by the model's own prediction module, one token ahead."""
    if not question.prediction:
        return None
    if question.engine == "sglang":
        return SpeculativeSpec(algorithm="EAGLE", steps=1, topk=1, draft_tokens=2)
    return SpeculativeSpec(algorithm="mtp", steps=1)


def command_lines(question: Question, placement: Placement, checkpoint: Checkpoint) -> list[str]:
    """One line for each machine of a replica, for a shell. A precision that an engine cannot make of this checkpoint,
    or a setting it has no word for, is a line that begins with #."""
    if not checkpoint.as_stored and question.precision != "fp8":
        return [
            f"# no checkpoint of {checkpoint.model} in {question.precision} is known here, and {question.engine} makes "
            f"none while loading: plan the path of one that is so quantised"
        ]
    lines = []
    for rank in range(placement.nodes):
        try:
            lines.append(shlex.join(command_of(spec_of(question, placement, checkpoint, rank=rank))))
        except LaunchError as error:
            return [f"# {error}"]
    return lines
