"""The part of the schema about engines that `tidegate fleet up` starts on its own machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from gateway.config.secrets import Secret
from gateway.config.values import DAY_S, FilePath, Host, Number, Section, Switch, Whole

_Degree = Annotated[Whole, Field(ge=1, le=1024)]
_Word = Annotated[str, Field(min_length=1, max_length=4096)]
_VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]


class Speculative(Section):
    """Speculative decoding: a small model drafts, the large one checks."""

    algorithm: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] = Field(
        description="The engine's own word for it: EAGLE, EAGLE3, NEXTN, NGRAM, ...", examples=["EAGLE"]
    )
    draft_model: _Word | None = Field(default=None, description="Path or hub name of the draft model. Null: none.")
    steps: Annotated[Whole, Field(ge=1, le=64)] | None = Field(
        default=None, description="Steps drafted at once. Null: the engine's own default."
    )
    topk: Annotated[Whole, Field(ge=1, le=64)] | None = Field(
        default=None, description="Branches of each step. Null: the engine's own default."
    )
    draft_tokens: Annotated[Whole, Field(ge=1, le=256)] | None = Field(
        default=None, description="Tokens checked at once. Null: the engine's own default."
    )


class Launch(Section):
    """How the servers of a pool are started. The engine is the backend's; adapters are the backend's, too."""

    model: _Word = Field(
        description="Path or hub name of the model; of llama.cpp a GGUF file.", examples=["deepseek-ai/DeepSeek-V3"]
    )
    revision: _Word | None = Field(default=None, description="Branch, tag or commit of the hub's model. Null: newest.")
    count: Annotated[Whole, Field(ge=0, le=256)] = Field(
        default=1, description="Servers on this machine. With scaling.provider `local` only what to begin with."
    )
    host: Host = Field(default="127.0.0.1", description="Address they listen on, and are reached at from the gateway.")
    port: Annotated[Whole, Field(ge=1, le=65000)] = Field(
        default=30000, description="Port of the first; the others follow, each `port_step` further."
    )
    port_step: Annotated[Whole, Field(ge=1, le=1000)] = Field(
        default=1, description="Distance between the ports of two servers. Engines that open more ports need more."
    )
    tp: _Degree = Field(default=1, description="GPUs that each layer is split over (tensor parallelism).")
    pp: _Degree = Field(default=1, description="Stages that the layers are split into (pipeline parallelism).")
    dp: _Degree = Field(default=1, description="Data-parallel ranks inside of one server.")
    ep: _Degree = Field(default=1, description="GPUs that experts are spread over (expert parallelism).")
    nodes: _Degree = Field(default=1, description="Machines that one server runs on.")
    node_rank: Annotated[Whole, Field(ge=0, le=1023)] = Field(
        default=0, description="Which of these this machine is; 0 answers requests. `fleet up --node-rank` says so too."
    )
    node_address: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:\[\]-]{1,260}$")] | None = Field(
        default=None,
        description="host:port at which the machine of rank 0 brings them together; needed with several.",
        examples=["10.0.0.1:20000"],
    )
    gpus_per_server: Annotated[Whole, Field(ge=0, le=64)] | None = Field(
        default=None,
        description="GPUs of this machine that each server gets, in order (CUDA_VISIBLE_DEVICES). Null: "
        "tp x pp x dp / nodes where `count` is above one, all otherwise. 0: nothing is set.",
    )
    dtype: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,20}$")] | None = Field(
        default=None, description="Precision of computation. Null: the model's own."
    )
    quantization: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,40}$")] | None = Field(
        default=None,
        description="How weights are quantised, in the engine's own words (fp8, awq, ...). Null: as the model is.",
    )
    kv_cache_dtype: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,20}$")] | None = Field(
        default=None, description="Precision of the KV cache, in the engine's own words. Null: its default."
    )
    context_tokens: Annotated[Whole, Field(ge=16, le=100_000_000)] | None = Field(
        default=None, description="Longest prompt and answer together. Null: the model's own."
    )
    max_running: Annotated[Whole, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="Requests that run at once. Null: the engine's own default."
    )
    memory_fraction: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        default=None, description="Part of the GPUs' memory that the engine takes. Null: its default."
    )
    speculative: Speculative | None = Field(default=None, description="Speculative decoding. Null: none.")
    max_loras: Annotated[Whole, Field(ge=1, le=10_000)] | None = Field(
        default=None, description="Adapters in a batch. Null: the engine's default; needs `adapters` or `lora`."
    )
    max_lora_rank: Annotated[Whole, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Largest rank of an adapter. Null: that of the adapters at the start."
    )
    lora: Switch = Field(default=False, description="Whether adapters can be loaded while it serves, with none yet.")
    python: FilePath | None = Field(
        default=None,
        description="The Python that has the engine. Null: the one that runs `tidegate fleet up`.",
        examples=["/opt/sglang/bin/python"],
    )
    command: tuple[_Word, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="A command of your own instead, in words; {host}, {port}, {index} and {name} are filled in. "
        "Null: the engine's usual one.",
    )
    flags: tuple[_Word, ...] = Field(
        default=(),
        max_length=200,
        description="Further words of the command line. None by default.",
        examples=[["--enable-dp-attention"]],
    )
    env: Mapping[_VariableName, Annotated[str, Field(max_length=4096)]] = Field(
        default={}, max_length=200, description="Further environment of the servers. None by default."
    )
    secret_env: Mapping[_VariableName, Secret] = Field(
        default={},
        max_length=50,
        description="The same for what must not be read, as references {env: NAME} or "
        "{file: PATH}: a token of the hub, say. None by default.",
        examples=[{"HF_TOKEN": {"env": "HF_TOKEN"}}],
    )
    start_timeout_s: Annotated[Number, Field(gt=0, le=DAY_S)] = Field(
        default=3600.0,
        description="Seconds to be ready in, after which a server is started again. An hour: hundreds "
        "of gigabytes are loaded, perhaps downloaded first.",
    )
    stop_timeout_s: Annotated[Number, Field(gt=0, le=DAY_S)] = Field(
        default=600.0, description="Seconds for requests under way when a server is to stop, before it is ended."
    )
