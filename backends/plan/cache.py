"""Bytes of the KV cache: of a token, of a request, in all and on one GPU.

Ordinary attention keeps a key and a value for each key-value head: 2 x kv_heads x head_dim numbers a layer. DeepSeek's
latent attention keeps one compressed vector and one rotary key: for V3 (512 + 64) x 61 layers x 2 bytes = 70,272 bytes
a token in BF16, whatever the number of heads (https://arxiv.org/abs/2412.19437, section 4.2). A layer with a sliding
window keeps no more tokens than the window has.

Tensor parallelism divides key-value heads until each GPU has one; from then on GPUs hold the same. A latent vector has
no heads, so every GPU holds all of it, unless attention is data-parallel: then each GPU holds that of its own requests
(https://lmsys.org/blog/2024-12-04-sglang-v0-4/#data-parallelism-attention-for-deepseek-models).
"""

from __future__ import annotations

import math

from backends.plan.architecture import LatentAttention, Model
from backends.plan.errors import PlanError
from backends.plan.weights import Split

KV_BYTES = {"bf16": 2, "fp16": 2, "fp8": 1}


def check_kv(name: str) -> str:
    """The name itself. Raises `PlanError` for one that is not known."""
    if name not in KV_BYTES:
        raise PlanError(f"kv: {name!r} is not known; known are {', '.join(KV_BYTES)}")
    return name


def _layer_bytes(model: Model, kv: str, tp: int) -> int:
    of = model.attention
    if isinstance(of, LatentAttention):
        return (of.kv_rank + of.rope_dim) * KV_BYTES[kv]
    return 2 * max(1, math.ceil(of.kv_heads / tp)) * of.head_dim * KV_BYTES[kv]


def bytes_per_token(model: Model, kv: str) -> int:
    """Bytes that one more token takes, all layers and GPUs together and nothing held twice; before windows are full."""
    return _layer_bytes(model, check_kv(kv), 1) * model.layers


def request_bytes(model: Model, kv: str, tokens: int, split: Split | None = None) -> int:
    """Bytes of a request of `tokens` tokens; with `split` those on the fullest GPU that serves it."""
    split = split or Split()
    stage = math.ceil(model.layers / split.pp)
    each = _layer_bytes(model, check_kv(kv), 1 if split.dp_attention else split.tp)
    if model.window is None:
        return each * stage * tokens
    # Windowed layers alternate with others, so a stage has its part of both, the full ones rounded up.
    full = min(stage, math.ceil((model.layers - model.windowed_layers) / split.pp))
    return each * (full * tokens + (stage - full) * min(tokens, model.window))
