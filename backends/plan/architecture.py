"""`config.json` of a model as the dimensions that the sums need.

Known are the architectures whose sums are checked against published totals in tests/backends/plan: Llama and Mistral,
Qwen2/2.5, Qwen3, Qwen3-MoE, Mixtral, DeepSeek V2/V3/R1 and GPT-OSS. Any other is refused by name, because a sum that is
almost right is worse than none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backends.plan.errors import PlanError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
    "DeepseekV2ForCausalLM": "deepseek",
    "DeepseekV3ForCausalLM": "deepseek",
    "GptOssForCausalLM": "gpt_oss",
}
"""The word in `architectures`, and the family whose sums it follows."""

_DTYPES = {"bfloat16": "bf16", "float16": "fp16"}
_DEFAULT_POSITIONS = 4096
_LARGEST = 10**9
"""Of any dimension: ten times the longest context there is, and no float overflows with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention that keeps a key and a value for each of `kv_heads` heads (multi-head, grouped-query)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    head_norms: bool = False  # Qwen3 normalises queries and keys, each with a vector of head_dim
    sinks: bool = False  # GPT-OSS: one learned number for each head


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention, https://arxiv.org/abs/2405.04434 section 2.1: one compressed vector of
    `kv_rank` numbers and one rotary key of `rope_dim` are kept for each token and layer, whatever the number of heads.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The mixture of experts of a layer."""

    count: int
    chosen: int
    width: int
    shared: int = 0
    router_bias: bool = False
    expert_bias: bool = False
    dense_layers: int = 0  # layers with an ordinary feed-forward part instead


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The dimensions of one model."""

    family: str
    architecture: str
    hidden: int
    layers: int
    intermediate: int  # width of the feed-forward part of layers without experts
    vocabulary: int
    tied: bool  # the head is the embedding table
    mlp_bias: bool
    attention: Attention | LatentAttention
    experts: Experts | None
    prediction_layers: int  # DeepSeek's multi-token prediction: further layers that only speculative decoding uses
    window: int | None  # tokens that a layer with a sliding window looks back over
    windowed_layers: int
    context_tokens: int  # the model's own limit
    native: str  # precision of the published weights: bf16, fp16, fp8, int4, mxfp4
    block: int | None  # edge of FP8's blocks of one scale


def read_model(config: Mapping[str, Any]) -> Model:
    """The model of a parsed `config.json`.

    Raises `PlanError` naming the field that is missing, of the wrong kind, or says something that is not known.
    """
    architecture = _architecture(config)
    family = ARCHITECTURES[architecture]
    layers = _whole(config, "num_hidden_layers")
    window, windowed = _window(config, family, layers)
    native, block = _native(config)
    return Model(
        family=family,
        architecture=architecture,
        hidden=_whole(config, "hidden_size"),
        layers=layers,
        intermediate=_whole(config, "intermediate_size"),
        vocabulary=_whole(config, "vocab_size"),
        tied=_switch(config, "tie_word_embeddings", default=False),
        mlp_bias=_switch(config, "mlp_bias", default=False),
        attention=_latent(config) if family == "deepseek" else _attention(config, family),
        experts=_experts(config, family, layers),
        prediction_layers=_whole(config, "num_nextn_predict_layers", default=0, least=0),
        window=window,
        windowed_layers=windowed,
        context_tokens=_whole(config, "max_position_embeddings", default=_DEFAULT_POSITIONS),
        native=native,
        block=block,
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise PlanError('config.json: architectures: a list with one name is needed, like ["LlamaForCausalLM"]')
    if names[0] not in ARCHITECTURES:
        raise PlanError(
            f"config.json: architectures: {names[0]} is not known, so its parameters cannot be counted; known are "
            + ", ".join(ARCHITECTURES)
        )
    return names[0]


def _whole(config: Mapping[str, Any], field: str, *, default: int | None = None, least: int = 1) -> int:
    value = config.get(field)
    if value is None:
        if default is None:
            raise PlanError(f"config.json: {field}: missing")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _LARGEST:
        raise PlanError(f"config.json: {field}: {repr(value)[:40]} is not a whole number from {least} to {_LARGEST}")
    return value


def _switch(config: Mapping[str, Any], field: str, *, default: bool) -> bool:
    value = config.get(field, default)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise PlanError(f"config.json: {field}: {value!r} is neither true nor false")
    return value


def _attention(config: Mapping[str, Any], family: str) -> Attention:
    heads = _whole(config, "num_attention_heads")
    hidden = _whole(config, "hidden_size")
    if config.get("head_dim") is None and hidden % heads:
        raise PlanError(
            f"config.json: num_attention_heads: {heads} does not divide hidden_size {hidden}; is head_dim lost?"
        )
    kv_heads = _whole(config, "num_key_value_heads", default=heads)
    if heads % kv_heads:
        raise PlanError(f"config.json: num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}")
    bias = _switch(config, "attention_bias", default=family == "gpt_oss")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_whole(config, "head_dim", default=hidden // heads),
        qkv_bias=bias or family == "qwen2",  # Qwen2 has them always; its config.json does not say so
        output_bias=bias,
        head_norms=family in ("qwen3", "qwen3_moe"),
        sinks=family == "gpt_oss",
    )


def _latent(config: Mapping[str, Any]) -> LatentAttention:
    q_rank = config.get("q_lora_rank")
    return LatentAttention(
        heads=_whole(config, "num_attention_heads"),
        q_rank=None if q_rank is None else _whole(config, "q_lora_rank"),
        kv_rank=_whole(config, "kv_lora_rank"),
        nope_dim=_whole(config, "qk_nope_head_dim"),
        rope_dim=_whole(config, "qk_rope_head_dim"),
        v_dim=_whole(config, "v_head_dim"),
    )


def _experts(config: Mapping[str, Any], family: str, layers: int) -> Experts | None:
    if family == "deepseek":
        if config.get("n_routed_experts") is None:
            return None
        if _whole(config, "moe_layer_freq", default=1) != 1:
            raise PlanError("config.json: moe_layer_freq: only 1 is known")
        found = Experts(
            count=_whole(config, "n_routed_experts"),
            chosen=_whole(config, "num_experts_per_tok"),
            width=_whole(config, "moe_intermediate_size"),
            shared=_whole(config, "n_shared_experts", default=0, least=0),
            router_bias=config.get("topk_method") == "noaux_tc",
            dense_layers=min(layers, _whole(config, "first_k_dense_replace", default=0, least=0)),
        )
    elif family == "qwen3_moe":
        if _whole(config, "decoder_sparse_step", default=1) != 1:
            raise PlanError("config.json: decoder_sparse_step: only 1 is known")
        dense = config.get("mlp_only_layers") or []
        if not isinstance(dense, list):
            raise PlanError("config.json: mlp_only_layers: not a list")
        found = Experts(
            count=_whole(config, "num_experts"),
            chosen=_whole(config, "num_experts_per_tok"),
            width=_whole(config, "moe_intermediate_size"),
            dense_layers=len(dense),
        )
    elif family in ("mixtral", "gpt_oss"):
        found = Experts(
            count=_whole(config, "num_local_experts"),
            chosen=_whole(config, "num_experts_per_tok"),
            width=_whole(config, "intermediate_size"),
            router_bias=family == "gpt_oss",
            expert_bias=family == "gpt_oss",
        )
    else:
        return None
    if found.chosen > found.count:
        raise PlanError(f"config.json: num_experts_per_tok: {found.chosen} of only {found.count} experts")
    return found


def _window(config: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, int]:
    """The sliding window and how many layers have it: `layer_types` says so, else all do, unless switched off."""
    if config.get("sliding_window") is None or not _switch(config, "use_sliding_window", default=True):
        return None, 0
    window = _whole(config, "sliding_window")
    types = config.get("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != layers:
            raise PlanError(f"config.json: layer_types: not a list of one word for each of the {layers} layers")
        unknown = sorted({str(each) for each in types} - {"sliding_attention", "full_attention"})
        if unknown:
            raise PlanError(f"config.json: layer_types: {unknown[0]} is not known")
        return window, types.count("sliding_attention")
    if family == "qwen2":  # Qwen2: layers from max_window_layers on have it
        return window, max(0, layers - _whole(config, "max_window_layers", default=layers, least=0))
    return window, layers


def _native(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """Precision of the weights as published, and the edge of FP8's blocks."""
    quantised = config.get("quantization_config")
    if quantised is None:
        dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
        if dtype not in _DTYPES:
            raise PlanError(f"config.json: torch_dtype: {dtype!r} is not known; known are {', '.join(_DTYPES)}")
        return _DTYPES[dtype], None
    if not isinstance(quantised, Mapping):
        raise PlanError("config.json: quantization_config: not an object")
    method = quantised.get("quant_method")
    if method == "fp8":
        block = quantised.get("weight_block_size")
        if block is None:
            return "fp8", None
        if not (isinstance(block, list) and len(block) == 2 and block[0] == block[1] and isinstance(block[0], int)):
            raise PlanError(f"config.json: quantization_config.weight_block_size: {block!r} is not a pair of equals")
        return "fp8", math.gcd(block[0], block[1])
    if method in ("awq", "gptq"):
        bits, group = quantised.get("bits"), quantised.get("group_size")
        if (bits, group) != (4, 128):
            raise PlanError(
                f"config.json: quantization_config: {method} of {bits} bits in groups of {group} is not known"
            )
        return "int4", None
    if method == "mxfp4":
        return "mxfp4", None
    raise PlanError(
        f"config.json: quantization_config.quant_method: {method!r} is not known; known are fp8, awq, gptq, mxfp4"
    )
