"""Which degrees of parallelism an engine accepts for a model, and why not the others.

- Query heads are divided: `tp` must divide their number. Key-value heads are divided or copied: one number must divide
  the other.
- FP8 in blocks and 4-bit groups cannot be cut: what a GPU gets of each width must be whole blocks of 128. DeepSeek-V3
  divides its experts' 2,048 by 16 (128 each), not by 32. Qwen3-235B-A22B divides its 1,536 by 4 (384), not by 8 (192);
  with its experts whole on their GPUs (expert parallelism) it can use 8.
- Experts lie on GPUs in equal numbers: `ep` must divide them.
- A pipeline has no more stages than the model has layers.

The vocabulary sets no limit: engines fill it up to a multiple of 64 for each GPU. Nor does MXFP4: GPT-OSS' 2,880 are
filled up too.
"""

from __future__ import annotations

from collections.abc import Iterator

from backends.plan.architecture import LatentAttention, Model
from backends.plan.weights import INT4_GROUP, Split

NVFP4_GROUP = 16


def problems(model: Model, precision: str, split: Split) -> list[str]:
    """Why no engine accepts the split; empty where it is fine."""
    found = [*_attention(model, split)]
    if split.pp > model.layers:
        found.append(f"PP {split.pp}: only {model.layers} layers")
    if split.ep > 1:
        if model.experts is None:
            found.append(f"EP {split.ep}: the model has no experts")
        elif split.ep != split.tp:
            found.append(f"EP {split.ep}: planned only with as many GPUs as TP {split.tp}")
        elif model.experts.count % split.ep:
            found.append(f"EP {split.ep} does not divide {model.experts.count} experts")
    edge = _edge(model, precision)
    if edge is not None:
        found += [
            f"TP {split.tp}: {name} of {width} gives each GPU {width / split.tp:g}, not whole {precision} "
            f"blocks of {edge}"
            for name, width in _cut(model, precision, split)
            if width % (split.tp * edge)
        ]
    return found


def degrees(model: Model, precision: str, *, largest: int = 64) -> dict[str, list[int] | dict[str, str]]:
    """Powers of two that can be the degree of tensor and of expert parallelism, and why the other ones cannot."""
    powers = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    wrong = {tp: problems(model, precision, Split(tp)) for tp in powers}
    whole = {} if model.experts is None else {tp: problems(model, precision, Split(tp, 1, tp)) for tp in powers[1:]}
    return {
        "tp": [tp for tp in powers if not wrong[tp]],
        "tp_with_experts_whole": [tp for tp, found in whole.items() if not found],
        "refused": {str(tp): found[0] for tp, found in wrong.items() if found},
    }


def _edge(model: Model, precision: str) -> int | None:
    """What a precision cannot be cut within. FP8 that an engine makes itself while loading has no blocks."""
    match precision:
        case "fp8":
            return model.block
        case "int4":
            return INT4_GROUP
        case "nvfp4":
            return NVFP4_GROUP
        case _:
            return None


def _attention(model: Model, split: Split) -> Iterator[str]:
    of = model.attention
    if split.dp_attention:
        if not isinstance(of, LatentAttention):
            yield "data-parallel attention is planned for latent attention only"
        return
    if of.heads % split.tp:
        yield f"TP {split.tp} does not divide {of.heads} attention heads"
    if not isinstance(of, LatentAttention) and of.kv_heads % split.tp and split.tp % of.kv_heads:
        yield f"TP {split.tp}: {of.kv_heads} key-value heads can be neither divided nor copied evenly"


def _cut(model: Model, precision: str, split: Split) -> Iterator[tuple[str, int]]:
    """Widths that tensor parallelism cuts. int4 has groups along the rows only, so only inner widths matter."""
    of = model.attention
    if model.experts is None or model.experts.dense_layers:
        yield "intermediate_size", model.intermediate
    if model.experts is not None and split.ep == 1:
        yield "moe width", model.experts.width
    if model.experts is not None and model.experts.shared:
        yield "shared expert's width", model.experts.width * model.experts.shared
    if split.dp_attention or (isinstance(of, LatentAttention) and precision == "nvfp4"):
        return
    yield "attention output", of.heads * (of.v_dim if isinstance(of, LatentAttention) else of.head_dim)
    if precision == "fp8" and not isinstance(of, LatentAttention):
        # What is copied is not cut.
        yield "keys", max(of.kv_heads, split.tp) * of.head_dim


def candidates(gpus: int, *, experts: bool, dp_attention: bool = False) -> Iterator[Split]:
    """Splits of so many GPUs, the best first: fewest stages of a pipeline, then experts divided rather than whole."""
    for pp in range(1, gpus + 1):
        if gpus % pp:
            continue
        tp = gpus // pp
        yield Split(tp, pp, 1, dp_attention)
        if experts and tp > 1:
            yield Split(tp, pp, tp, dp_attention)
