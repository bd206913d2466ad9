"""The plan as one document (for `--json`), and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from backends.plan.advice import Advice, advise
from backends.plan.architecture import LatentAttention, Model
from backends.plan.cache import bytes_per_token
from backends.plan.catalogue import Known
from backends.plan.commands import Checkpoint, command_lines
from backends.plan.errors import PlanError
from backends.plan.fit import Placement, Question, engine_refused, place
from backends.plan.gpus import WEIGHTS, Gpu, format_of
from backends.plan.parameters import active, parts_of, total
from backends.plan.reserve import ENGINES
from backends.plan.speed import bound
from backends.plan.splits import degrees
from backends.plan.units import KB, billions, gb, gib, whole
from backends.plan.weights import published_bytes

_SHOWN = 2
"""Set-ups that do not fit, of which the text says why: the largest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question about a known model, in words."""

    known: Known
    precision: str | None = None
    kv: str = "bf16"
    engine: str | None = None  # None: the first that runs on the GPU
    context_tokens: int = 32_768
    concurrency: int = 64
    prediction: bool = False
    dp_attention: bool = False
    memory_fraction: float | None = None
    gpus: int | None = None
    replica_gpus: int | None = None
    usd_per_gpu_hour: float | None = None

    def on(self, gpu: Gpu) -> tuple[Question, Checkpoint]:
        """The question for one kind of GPU, and what its engine would load. Raises `PlanError`."""
        model, precision, hub, as_stored = self.known.in_precision(self.precision)
        if self.prediction and not model.prediction_layers:
            raise PlanError(f"{self.known.name} has no prediction module (num_nextn_predict_layers is 0 or missing)")
        question = Question(
            model=model,
            precision=precision,
            kv=self.kv,
            engine=self.engine or ("sglang" if self.dp_attention else _first_engine(model, precision, gpu)),
            context_tokens=self.context_tokens,
            concurrency=self.concurrency,
            prediction=self.prediction,
            dp_attention=self.dp_attention,
            memory_fraction=self.memory_fraction,
            checkpoint_bytes=self.known.checkpoint_bytes if precision == model.native else None,
        ).checked()
        return question, Checkpoint(self.known.name, hub, as_stored)

    def advice(self, gpu: Gpu) -> tuple[Advice, Checkpoint]:
        """What to run it on, of one kind of GPU. Raises `PlanError`."""
        question, checkpoint = self.on(gpu)
        return advise(question, gpu, gpus=self.gpus, replica_gpus=self.replica_gpus), checkpoint


def _first_engine(model: Model, precision: str, gpu: Gpu) -> str:
    """The first that can serve these weights on this GPU, else the first that runs there at all."""
    able = (engine for engine in gpu.engines if engine_refused(model, precision, engine, gpu) is None)
    return next(able, gpu.engines[0])


def model_report(asked: Asked, question: Question, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the model is, whatever it runs on."""
    model, parts = question.model, parts_of(question.model)
    limits = []
    if question.context_tokens > model.context_tokens:
        limits.append(
            f"the model is made for {whole(model.context_tokens)} tokens of context; more needs its own way of "
            f"stretching positions (YaRN, say)"
        )
    return {
        "name": checkpoint.name,
        "checkpoint": checkpoint.model,
        "configuration": asked.known.source,
        "architecture": model.architecture,
        "precision": question.precision,
        "precision_of_the_checkpoint": checkpoint.as_stored,
        "parameters": total(parts),
        "active_parameters": active(parts, embedding=False),
        "prediction_parameters": total(parts, prediction=True) - total(parts),
        "published_bytes": question.checkpoint_bytes or round(published_bytes(model, parts, question.precision)),
        "weights_bytes": round(question.weights_bytes),
        "kv": question.kv,
        "kv_bytes_per_token": bytes_per_token(model, question.kv),
        "kv_kind": "latent" if isinstance(model.attention, LatentAttention) else "grouped",
        "window_tokens": model.window,
        "windowed_layers": model.windowed_layers,
        "context_tokens": model.context_tokens,
        "degrees": degrees(model, question.precision),
        "layers": model.layers,
        "experts": None if model.experts is None else model.experts.count,
        "notes": limits,
    }


def gpu_report(advice: Advice, checkpoint: Checkpoint, usd_per_gpu_hour: float | None) -> dict[str, Any]:
    """What one kind of GPU can do."""
    gpu, question = advice.gpu, advice.question
    said: dict[str, Any] = {
        "gpu": gpu.name,
        "title": gpu.title,
        "engine": question.engine,
        "nominal_gb": gpu.nominal_gb,
        "memory_bytes": gpu.memory_bytes,
        "bandwidth_bytes_s": gpu.bandwidth,
        "fits": advice.chosen is not None,
        "smallest_gpus": None if advice.smallest is None else advice.smallest.gpus,
        "refused": list(advice.refused),
        "notes": list(gpu.notes),
        "sources": list(gpu.sources),
    }
    if question.precision == "fp8" and gpu.fp8_note is not None:
        said["notes"].append(gpu.fp8_note)
        if gpu.fp8 == WEIGHTS and question.model.experts is not None:
            said["notes"].append(
                "vLLM may need --moe-backend marlin: https://github.com/vllm-project/vllm/issues/54318"
            )
    elif format_of(gpu, question.precision) == WEIGHTS and question.precision != "int4":
        said["notes"].append(f"{question.precision} weights are computed in 16 bits here: memory is saved, not time")
    chosen = advice.chosen
    if chosen is None:
        return said
    said["notes"] += _hints(question, chosen)
    fastest = bound(question, chosen)
    said["replica"] = {
        "gpus": chosen.gpus,
        "nodes": chosen.nodes,
        "split": {"tp": chosen.split.tp, "pp": chosen.split.pp, "ep": chosen.split.ep},
        "dp_attention": chosen.split.dp_attention,
        "split_text": str(chosen.split),
        "weights_bytes_per_gpu": round(chosen.weights_bytes),
        "usable_bytes_per_gpu": round(chosen.room.usable_bytes),
        "rule": chosen.room.told,
        "kv_bytes_per_gpu": round(chosen.cache_bytes),
        "kv_tokens": chosen.tokens,
        "concurrent_at_context": chosen.concurrent,
        "bound_alone_tokens_s": round(fastest.alone_tokens_s, 1),
        "bound_together_requests": fastest.requests,
        "bound_together_tokens_s": round(fastest.together_tokens_s, 1),
    }
    said |= {
        "replicas": advice.replicas,
        "replicas_per_node": advice.replicas_per_node,
        "gpus": advice.gpus,
        "nodes": advice.nodes,
        "concurrent_at_context": advice.concurrent,
        "usd_per_hour": None if usd_per_gpu_hour is None else round(usd_per_gpu_hour * advice.gpus, 2),
        "commands": {
            engine: command_lines(replace(question, engine=engine), chosen, checkpoint)
            for engine in ENGINES
            if engine_refused(question.model, question.precision, engine, gpu) is None
            and not (question.dp_attention and engine != question.engine)
        },
    }
    return said


def _hints(question: Question, chosen: Placement) -> Iterator[str]:
    """What would hold more requests."""
    if not isinstance(question.model.attention, LatentAttention) or question.dp_attention or chosen.split.tp == 1:
        return
    if question.engine != "sglang":
        return
    other = place(replace(question, dp_attention=True), chosen.gpu, replace(chosen.split, dp_attention=True))
    if other.fits and other.concurrent > chosen.concurrent:
        yield (
            f"each GPU holds the whole latent cache; with --dp-attention each holds its own requests', and "
            f"{other.concurrent} fit at once instead of {chosen.concurrent}"
        )


def model_lines(model: dict[str, Any]) -> Iterator[str]:
    """The model as text."""
    further = model["prediction_parameters"]
    yield (
        f"{model['name']}: {billions(model['parameters'])} parameters, {billions(model['active_parameters'])} of them "
        f"for each token" + (f", and {billions(further)} of a prediction module" if further else "")
    )
    stored = "" if model["precision_of_the_checkpoint"] else " (the checkpoint has another precision)"
    loaded = model["weights_bytes"]
    yield (
        f"weights in {model['precision']}{stored}: {gb(loaded)} ({gib(loaded)}) loaded, "
        f"{gb(model['published_bytes'])} on disk"
    )
    window = (
        f"; {model['windowed_layers']} layers keep {model['window_tokens']} tokens only"
        if model["window_tokens"]
        else ""
    )
    yield (
        f"KV cache in {model['kv']}: {whole(model['kv_bytes_per_token'])} bytes "
        f"({model['kv_bytes_per_token'] / KB:.1f} KB) a token{window}"
    )
    yield from _degree_lines(model)
    yield from model["notes"]


def _degree_lines(model: dict[str, Any]) -> Iterator[str]:
    found = model["degrees"]
    said = f"tensor parallelism of {', '.join(map(str, found['tp']))}"
    further = [each for each in found["tp_with_experts_whole"] if each not in found["tp"]]
    said += f"; {', '.join(map(str, further))} with expert parallelism" if further else ""
    refused = next(iter(found["refused"].values()), None)
    yield said + (f" ({refused})" if refused else "")


def gpu_lines(found: dict[str, Any], *, context_tokens: int, concurrency: int) -> Iterator[str]:
    """What one kind of GPU can do, as text."""
    yield (
        f"{found['title']} ({gib(found['memory_bytes'])} by the driver, {found['bandwidth_bytes_s'] / 1e12:g} TB/s), "
        f"{found['engine']}"
    )
    refused = found["refused"]
    if len(refused) > _SHOWN:
        yield f"  no:  {len(refused) - _SHOWN} smaller ones"
    for each in refused[-_SHOWN:]:
        yield f"  no:  {each}"
    if not found["fits"]:
        yield "  It does not fit." if found["refused"] else "  It does not fit on so few."
        return
    replica = found["replica"]
    nodes = f" on {replica['nodes']} machines" if replica["nodes"] > 1 else ""
    yield f"  yes: {replica['gpus']} x {found['title']}{nodes} a replica, {replica['split_text']}"
    yield (
        f"       each GPU: {gib(replica['weights_bytes_per_gpu'])} of weights; {gib(replica['usable_bytes_per_gpu'])} "
        f"for weights and KV cache ({replica['rule']}); {gib(replica['kv_bytes_per_gpu'])} of KV cache"
    )
    yield (
        f"       {whole(replica['kv_tokens'])} tokens of KV cache: {replica['concurrent_at_context']} requests of "
        f"{whole(context_tokens)} tokens at once"
    )
    yield (
        f"       at most (by bandwidth, a bound) {replica['bound_alone_tokens_s']:,.0f} tokens/s for one request, "
        f"{replica['bound_together_tokens_s']:,.0f} for {replica['bound_together_requests']} together"
    )
    cost = "" if found["usd_per_hour"] is None else f", ${found['usd_per_hour']:,.2f} an hour"
    yield (
        f"       {_many(found['replicas'], 'replica')}, {_many(found['gpus'], 'GPU')}, "
        f"{_many(found['nodes'], 'machine')}: "
        f"{found['concurrent_at_context']} such requests of the {concurrency} asked for{cost}"
    )
    for note in found["notes"]:
        yield f"       note: {note}"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("s" if count != 1 else "")


def table_rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """All GPUs beside each other."""
    rows: list[tuple[str, ...]] = [
        ("GPU", "LEAST", "REPLICA", "SPLIT", "KV TOKENS", "AT ONCE", "REPLICAS", "GPUS", "TOKENS/S <=", "ENGINE")
    ]
    for each in found:
        if not each["fits"]:
            rows.append((each["title"], "does not fit", *["-"] * 7, each["engine"]))
            continue
        replica = each["replica"]
        rows.append(
            (
                each["title"],
                str(each["smallest_gpus"]),
                str(replica["gpus"]),
                replica["split_text"],
                whole(replica["kv_tokens"]),
                str(replica["concurrent_at_context"]),
                str(each["replicas"]),
                str(each["gpus"]),
                f"{replica['bound_alone_tokens_s']:,.0f}",
                each["engine"],
            )
        )
    return rows
