"""Does a model fit on some GPUs, split in one way: weights, reserve and KV cache together, and the reason if not."""

from __future__ import annotations

from dataclasses import dataclass

from backends.plan.architecture import Model
from backends.plan.cache import check_kv, request_bytes
from backends.plan.errors import PlanError
from backends.plan.gpus import NO, WEIGHTS, Gpu, format_of
from backends.plan.parameters import Part, parts_of
from backends.plan.reserve import ENGINES, Room, room
from backends.plan.splits import problems
from backends.plan.units import GB, gb, gib, whole
from backends.plan.weights import Split, bytes_per_gpu, check_precision, loaded_bytes, published_bytes

BY_HAND = 0.85
"""SGLang's `mem-fraction-static` as people set it themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be served, and how."""

    model: Model
    precision: str
    kv: str = "bf16"
    engine: str = "sglang"
    context_tokens: int = 32_768
    concurrency: int = 64
    prediction: bool = False  # with DeepSeek's prediction module, for speculative decoding
    dp_attention: bool = False
    memory_fraction: float | None = None
    checkpoint_bytes: int | None = None  # the truth, where there is a checkpoint to measure

    def checked(self) -> Question:
        """Itself. Raises `PlanError` naming the setting that cannot be."""
        check_precision(self.precision)
        check_kv(self.kv)
        if self.engine not in ENGINES:
            raise PlanError(f"engine: {self.engine!r} is not planned for; planned for are {', '.join(ENGINES)}")
        if self.context_tokens < 1:
            raise PlanError(f"context: {self.context_tokens} is not a number of tokens")
        if self.concurrency < 1:
            raise PlanError(f"concurrency: {self.concurrency} is not a number of requests")
        if self.dp_attention and self.engine != "sglang":
            raise PlanError(f"dp_attention: planned for SGLang only, not for {self.engine}")
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """Every matrix of the model."""
        return parts_of(self.model)

    @property
    def correction(self) -> float:
        """What the checkpoint has for each byte of the sum; 1 without a checkpoint."""
        if self.checkpoint_bytes is None:
            return 1.0
        return self.checkpoint_bytes / published_bytes(self.model, self.parts, self.precision)

    @property
    def weights_bytes(self) -> float:
        """What the engine loads, all GPUs together, nothing twice."""
        return self.correction * loaded_bytes(self.model, self.parts, self.precision, prediction=self.prediction)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One replica on `split.gpus` GPUs, and what is left there. Figures of bytes are of the fullest GPU."""

    gpu: Gpu
    split: Split
    nodes: int
    weights_bytes: float
    room: Room
    cache_bytes: float
    request_bytes: int  # of one request at the question's context
    tokens: int  # of KV cache, all GPUs of the replica together
    concurrent: int  # requests of the full context at once
    refused: str | None  # why it does not fit

    @property
    def fits(self) -> bool:
        """Whether at least one request of the full context can be served."""
        return self.refused is None

    @property
    def gpus(self) -> int:
        """GPUs of the replica."""
        return self.split.gpus


def place(question: Question, gpu: Gpu, split: Split) -> Placement:
    """What becomes of one replica. It fits where the weights do and the cache holds a request of the full context."""
    nodes = -(-split.gpus // gpu.per_node)
    weights = question.correction * bytes_per_gpu(
        question.model, question.parts, question.precision, split, prediction=question.prediction
    )
    found = room(
        question.model, gpu, question.engine, split,
        context_tokens=question.context_tokens, memory_fraction=question.memory_fraction,
    )  # fmt: skip
    cache = found.cache_bytes(weights)
    each = request_bytes(question.model, question.kv, question.context_tokens, split)
    # With data-parallel attention every GPU has requests of its own.
    groups = split.tp if split.dp_attention else 1
    concurrent = max(0, int(cache // each)) * groups
    tokens = max(0, int(cache * question.context_tokens // each)) * groups
    refused = engine_refused(question.model, question.precision, question.engine, gpu)
    if refused is None and (wrong := problems(question.model, question.precision, split)):
        refused = "; ".join(wrong)
    if refused is None and cache <= 0:
        refused = too_small(question, gpu, split, weights, found)
    if refused is None and concurrent < 1:
        refused = (
            f"{counted(gpu, split.gpus)} hold the weights, but of KV cache only {whole(tokens)} tokens, less than one "
            f"request of {whole(question.context_tokens)}"
        )
    return Placement(
        gpu=gpu, split=split, nodes=nodes, weights_bytes=weights, room=found, cache_bytes=cache, request_bytes=each,
        tokens=tokens, concurrent=concurrent, refused=refused,
    )  # fmt: skip


def counted(gpu: Gpu, gpus: int) -> str:
    """`8 x H100 SXM 80 GB`."""
    return f"{gpus} x {gpu.title}"


def engine_refused(model: Model, precision: str, engine: str, gpu: Gpu) -> str | None:
    """Why the engine cannot serve these weights on this GPU; None where it can."""
    if engine not in gpu.engines:
        do = "do" if len(gpu.engines) > 1 else "does"
        why = f" ({gpu.notes[0]})" if gpu.vendor == "intel" else ""
        return f"{engine} does not run on {gpu.title}; {' and '.join(gpu.engines)} {do}{why}"
    if format_of(gpu, precision) == NO:
        return f"{gpu.title} takes no {precision} weights"
    if engine == "sglang" and precision == "fp8" and gpu.fp8 == WEIGHTS and model.experts is not None:
        # https://github.com/sgl-project/sglang/issues/12887; Fp8MoEMethod of 0.5.23 has no Marlin kernels either.
        return f"sglang has FP8 experts only on GPUs that compute in FP8, and {gpu.title} does not; vllm has them there"
    return None


def too_small(question: Question, gpu: Gpu, split: Split, weights: float, found: Room) -> str:
    """Why the weights do not fit, in the data sheet's units first."""
    gpus = split.gpus
    nominal, needed = gpus * gpu.nominal_gb * GB, question.weights_bytes
    left = max(0.0, found.usable_bytes)
    if nominal < needed:
        first = f"{counted(gpu, gpus)} = {nominal / GB:,.0f} GB < {gb(needed)} of weights"
    else:
        first = f"{counted(gpu, gpus)} = {nominal / GB:,.0f} GB for {gb(needed)} of weights"
    return (
        f"{first}: each GPU would hold {gib(weights)} of them, and {question.engine} leaves {gib(left)} "
        f"of its {gib(gpu.memory_bytes)} for weights and KV cache" + _by_hand(question, gpu, split, weights)
    )


def _by_hand(question: Question, gpu: Gpu, split: Split, weights: float) -> str:
    """SGLang's rule was made for a few machines: what would hold the weights on many."""
    if question.engine != "sglang" or question.memory_fraction is not None or split.gpus <= gpu.per_node:
        return ""
    told = room(
        question.model, gpu, question.engine, split,
        context_tokens=question.context_tokens, memory_fraction=BY_HAND,
    )  # fmt: skip
    if told.cache_bytes(weights) <= 0:
        return ""
    return (
        f"; its own rule keeps {split.gpus / 8:g} GiB of each back for {split.gpus} GPUs: --memory-fraction {BY_HAND} "
        f"leaves {gib(told.usable_bytes)}"
    )
