"""What an engine keeps back from a GPU's memory before it takes the rest for weights and KV cache.

Every engine has its own rule; the figures are its defaults, and `memory_fraction` overrides the fraction.

SGLang 0.5 (arg_groups/memory_hook.py of its wheel, `handle_gpu_memory_settings`) keeps back, in MiB,
    512 + 1.5 x chunked_prefill + 1024 x tp x pp / 8 + 2 x largest CUDA graph + graphs of prefill
with 1,536 for the graphs of prefill with latent attention, at least 10,240 on GPUs above 60 GiB. The fraction that is
left, rounded to 3 digits, is `--mem-fraction-static`, and it applies to the memory that is free once the process
talks to its GPUs. On H200 with TP 8 and latent attention: 512 + 12,288 + 1,024 + 1,024 + 1,536 = 16,384 MiB, so
(143,771 - 16,384) / 143,771 = 0.886. Newer versions size the cache after capturing graphs and may keep back less, so
this is on the safe side. With AMD's aiter kernels and more than 8,192 tokens of context it multiplies the fraction by
0.85 (arg_groups/attention_hook.py).

vLLM takes `gpu_memory_utilization` = 0.92 of all memory (vllm/config/cache.py), and of that what a trial run of the
largest batch used besides weights is not for the cache. That peak is estimated here (`activation_bytes`). The plugin
for Gaudi keeps a tenth of what is left for graphs (VLLM_GRAPH_RESERVED_MEM).

TensorRT-LLM gives 0.9 of what is free after weights and activations to the cache (free_gpu_memory_fraction), LMDeploy
0.8 of what is free after weights (cache_max_entry_count).
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.plan.architecture import LatentAttention, Model
from backends.plan.errors import PlanError
from backends.plan.gpus import Gpu
from backends.plan.units import GIB
from backends.plan.weights import Split

ENGINES = ("sglang", "vllm", "trtllm", "lmdeploy")
CONTEXT_BYTES = 1.0 * GIB
"""Of the process: the driver's own part that no program gets, the CUDA context, the libraries' work space. An H100 has
79.65 GiB by the driver and 79.1 GiB for programs; a context takes about half a GiB. An estimate, on the safe side."""
LINK_BYTES = 1.0 * GIB
"""Further, where GPUs talk to each other: NCCL's buffers and the engines' own all-reduce. An estimate."""
SGLANG_LARGE_MIB = 10_240
SGLANG_AITER = 0.85
VLLM_UTILIZATION = 0.92
GAUDI_CACHE = 0.9
TRTLLM_CACHE = 0.9
LMDEPLOY_CACHE = 0.8
_BATCHED_TOKENS = 8192
_BATCHED_REQUESTS = 256


@dataclass(frozen=True, slots=True)
class Room:
    """What one GPU has for the model. The cache gets `cache_fraction` of what the weights leave of `usable_bytes`."""

    usable_bytes: float
    cache_fraction: float
    told: str  # the rule with its figures

    def cache_bytes(self, weights_bytes: float) -> float:
        """For the KV cache; below zero by what the weights lack."""
        left = self.usable_bytes - weights_bytes
        return left * self.cache_fraction if left > 0 else left


def room(
    model: Model, gpu: Gpu, engine: str, split: Split, *, context_tokens: int, memory_fraction: float | None = None
) -> Room:
    """What an engine leaves of a GPU for weights and KV cache. Raises `PlanError` for an engine that is not known."""
    if memory_fraction is not None and not 0 < memory_fraction < 1:
        raise PlanError(f"memory_fraction: {memory_fraction} is not between 0 and 1")
    process = CONTEXT_BYTES + (LINK_BYTES if split.gpus > 1 else 0)
    free = gpu.memory_bytes - process
    match engine:
        case "sglang":
            fraction = memory_fraction or sglang_fraction(model, gpu, split, context_tokens=context_tokens)
            return Room(free * fraction, 1.0, f"mem-fraction-static {fraction:.3f} of what is free")
        case "vllm":
            fraction = memory_fraction or VLLM_UTILIZATION
            usable = gpu.memory_bytes * fraction - process - activation_bytes(model, split)
            cache = GAUDI_CACHE if gpu.vendor == "intel" else 1.0
            return Room(usable, cache, f"gpu-memory-utilization {fraction:.2f} less activations")
        case "trtllm":
            fraction = memory_fraction or TRTLLM_CACHE
            return Room(
                free - activation_bytes(model, split), fraction, f"{fraction:.2f} of what is free for the cache"
            )
        case "lmdeploy":
            fraction = memory_fraction or LMDEPLOY_CACHE
            return Room(
                free - activation_bytes(model, split), fraction, f"{fraction:.2f} of what is free for the cache"
            )
        case _:
            raise PlanError(f"engine: {engine!r} is not planned for; planned for are {', '.join(ENGINES)}")


def sglang_fraction(model: Model, gpu: Gpu, split: Split, *, context_tokens: int) -> float:
    """SGLang's own `--mem-fraction-static`, as it would choose it."""
    prefill, graph = sglang_sizes(gpu, split.tp)
    latent = isinstance(model.attention, LatentAttention)
    kept = 512 + 1.5 * max(prefill, 2048) + 1024 * split.gpus / 8 + 2 * graph
    kept += 1536 if latent else 8 * 64  # 8 MiB for each of some 64 sizes of prefill that are captured
    if split.dp_attention:
        kept += graph * split.tp * (4.5 if graph > 300 else 3.0)
    if gpu.driver_mib > 60 * 1024:
        kept = max(kept, SGLANG_LARGE_MIB)
    fraction = round((gpu.driver_mib - kept) / gpu.driver_mib, 3)
    return fraction * SGLANG_AITER if gpu.vendor == "amd" and context_tokens > 8192 else fraction


def sglang_sizes(gpu: Gpu, tp: int) -> tuple[int, int]:
    """Tokens of a chunk of prefill and requests of the largest CUDA graph, by the GPU's memory."""
    gib = gpu.driver_mib / 1024
    if gib < 20:
        return 2048, 8
    if gib < 35:
        return 4096, 48 if tp < 4 else 160
    if gib < 60:
        return 4096, 32 if tp < 4 else 160
    if gib < 160:
        return 8192, 256 if tp < 4 else 512
    return 16_384, 512


def activation_bytes(model: Model, split: Split) -> float:
    """Peak of a batch of 8,192 tokens besides weights and cache: an estimate.

    Six vectors of the hidden size and three of the feed-forward width live at once for each token, with experts their
    intermediate results for each chosen expert, and the logits of 256 requests in 32 bits, twice.
    """
    numbers = 6.0 * model.hidden + 3.0 * model.intermediate / split.tp
    if model.experts is not None:
        numbers += model.experts.chosen * (2.0 * model.experts.width / split.tp + model.hidden)
    return 2.0 * _BATCHED_TOKENS * numbers + 8.0 * _BATCHED_REQUESTS * model.vocabulary
