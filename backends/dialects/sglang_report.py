"""What SGLang says about itself, read: its load under three shapes, its settings, its adapters. No I/O.

Everything that is missing or of a wrong type is read as "it does not say".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson

from backends.dialects.protocol import Adapter, EngineInfo, EngineLoad, KvEventsEndpoint, NotOffered, Priority
from backends.prometheus import Sample, read_page, total
from backends.side import SideChannelError, Trouble
from backends.usage import count_or_none

_RANK = re.compile(r"[0-9]{1,6}\Z")
_PREFIXES = ("sglang:", "sglang_")
_METRICS = (
    "num_running_reqs",
    "num_queue_reqs",
    "num_used_tokens",
    "token_usage",
    "max_total_num_tokens",
    "lora_pool_slots_used",
    "lora_pool_slots_total",
    "realtime_tokens",
    "generation_tokens",
)
_WANTED = (
    ("cached_tokens", "enable_cache_report", "start it with --enable-cache-report"),
    ("priority", "enable_priority_scheduling", "start it with --enable-priority-scheduling"),
    ("adapters", "enable_lora", "start it with --enable-lora"),
)
"""Signal, the setting that it needs, and what to do."""


def load(loads: Sequence[Any], dp_rank: int | None) -> EngineLoad:
    """The `loads` of `/v1/loads`, of one rank or of all together.

    The two prefill totals divide to the microseconds per token that the engine itself was busy with, whatever it
    batched. Generated tokens are the sixth of the `decode_moments`, which do not count each answer's first token.
    Raises `NotOffered` for a rank that is not there, and `SideChannelError` when there is none at all.
    """
    ranks = _of_rank([each for each in loads if isinstance(each, dict)], dp_rank)
    lora = [_mapping(each.get("lora")) for each in ranks]
    used = _sum(each.get("num_used_tokens") for each in ranks)
    capacity = _sum(each.get("max_total_num_tokens") for each in ranks)
    busy_us = _sum(each.get("total_prefill_busy_us") for each in ranks)
    return EngineLoad(
        running=_sum(each.get("num_running_reqs") for each in ranks),
        max_running=_sum(each.get("max_running_requests") for each in ranks) or None,
        waiting=_sum(each.get("num_waiting_reqs") for each in ranks),
        waiting_uncached_tokens=_sum(each.get("num_waiting_uncached_tokens") for each in ranks),
        kv_use=_share(used, capacity, [_number(each.get("token_usage")) for each in ranks]),
        kv_used_tokens=used,
        kv_capacity_tokens=capacity,
        prefill_tokens_total=_sum(each.get("total_prefill_uncached_tokens") for each in ranks),
        prefill_busy_s_total=None if busy_us is None else busy_us / 1e6,
        generated_tokens_total=_sum(_generated(each.get("decode_moments")) for each in ranks),
        adapter_slots=_sum(each.get("slots_total") for each in lora),
        adapter_slots_used=_sum(each.get("slots_used") for each in lora),
    )


def load_in_metrics(page: bytes, dp_rank: int | None) -> EngineLoad | None:
    """The same from `/metrics`, as far as it is there; None when the page has nothing of SGLang's.

    With priority scheduling, queue lengths are there once in all, with an empty `priority`, and once for each
    priority. Where all schedulers report, each rank's figures are there once for each of its tensor-parallel
    processes.
    """
    found = read_page(page, _METRICS, _PREFIXES)
    per_rank = {name: _per_rank(samples) for name, samples in found.items()}
    running = _gauge(per_rank, "num_running_reqs", dp_rank)
    waiting = _gauge(per_rank, "num_queue_reqs", dp_rank)
    if running is None and waiting is None:
        return None
    used = _gauge(per_rank, "num_used_tokens", dp_rank)
    capacity = _gauge(per_rank, "max_total_num_tokens", dp_rank)
    usage = [use for rank, use in per_rank.get("token_usage", {}).items() if dp_rank in (None, rank)]
    generated = _realtime(found, "decode", dp_rank)
    if generated is None and dp_rank is None:
        # Older versions count generated tokens for all ranks together, and only when a request has finished.
        counted = total(found.get("generation_tokens", []))
        generated = None if counted is None else int(counted)
    return EngineLoad(
        running=running,
        waiting=waiting,
        kv_use=_share(used, capacity, usage),
        kv_used_tokens=used,
        kv_capacity_tokens=capacity,
        prefill_tokens_total=_realtime(found, "prefill_compute", dp_rank),
        generated_tokens_total=generated,
        adapter_slots=_gauge(per_rank, "lora_pool_slots_total", dp_rank),
        adapter_slots_used=_gauge(per_rank, "lora_pool_slots_used", dp_rank),
    )


def old_load(tree: Any, dp_rank: int | None) -> EngineLoad:
    """`/get_load`, of 0.5.0 and the versions around it: `[{dp_rank, num_reqs, num_waiting_reqs, num_tokens}]`.

    `num_reqs` counts running and waiting ones, `num_tokens` what both need. Raises `NotOffered` for the shape before
    that, one number whose meaning changed.
    """
    loads = tree if isinstance(tree, list) else [tree]
    loads = [each for each in loads if isinstance(each, dict) and "num_reqs" in each]
    if not loads:
        raise NotOffered("this SGLang's /get_load does not say how many requests there are")
    ranks = _of_rank(loads, dp_rank)
    requests = _sum(each.get("num_reqs") for each in ranks)
    waiting = _sum(each.get("num_waiting_reqs") for each in ranks)
    running = None if requests is None or waiting is None else max(0, requests - waiting)
    return EngineLoad(running=running, waiting=waiting)


def info(server: Mapping[str, Any], model: Mapping[str, Any], cards: Sequence[Mapping[str, Any]]) -> EngineInfo:
    """From `/server_info`, `/model_info` and the entries of `/v1/models`, each empty when it is not there."""
    kv_events = _kv_events(server)
    dp_size = count_or_none(server.get("dp_size")) or 1
    capacity = count_or_none(server.get("max_total_num_tokens"))
    role = model.get("disaggregation_mode", server.get("disaggregation_mode"))
    bases = [card for card in cards if not isinstance(card.get("parent"), str)]
    names = tuple(card["id"] for card in bases)
    served = _text(model.get("served_model_name")) or _text(server.get("served_model_name"))
    lengths = [count_or_none(card.get("max_model_len")) for card in bases]
    return EngineInfo(
        version=_text(server.get("version")),
        models=names or ((served,) if served is not None else ()),
        epoch=epoch(server, model),
        context_tokens=next(filter(None, lengths), None) or count_or_none(server.get("context_length")),
        kv_capacity_tokens=None if capacity is None else capacity * dp_size,
        max_running=_max_running(server, dp_size),
        priority=_priority(server),
        block_size=count_or_none(server.get("page_size")),
        dp_size=dp_size,
        role=role if role in ("prefill", "decode") else None,
        kv_events=kv_events,
        lacks=_lacks(server, kv_events),
    )


def epoch(server: Mapping[str, Any], model: Mapping[str, Any]) -> str | None:
    """A digest of what differs after a restart (measured durations of the start) and after a change of weights.

    The weights' version is `/model_info`'s; `/server_info` goes on naming the one it was started with. A reload of
    the same path without a new `weight_version` cannot be seen. Versions before `startup_time` have their random seed
    instead, which differs unless it was given.
    """
    started = _mapping(server.get("startup_time"))
    # Not the durations of the HTTP side, of which there may be several processes.
    durations = [_number(started.get(name)) for name in ("load_weight", "kv_cache_allocation", "scheduler_e2e")]
    seed = count_or_none(server.get("random_seed"))
    if durations[-1] is None and seed is None:
        return None
    parts = [durations, seed, _text(model.get("weight_version")), _text(model.get("model_path"))]
    return hashlib.blake2b(orjson.dumps(parts), digest_size=8).hexdigest()


def adapters(cards: Iterable[Mapping[str, Any]]) -> tuple[Adapter, ...]:
    """The entries of a model list that have a parent."""
    return tuple(
        Adapter(card["id"], path=_text(card.get("root"))) for card in cards if isinstance(card.get("parent"), str)
    )


def adapters_at_start(server: Mapping[str, Any]) -> tuple[Adapter, ...]:
    """The `lora_paths` setting, in any of the shapes it has had. Raises `NotOffered` when there is none."""
    paths = server.get("lora_paths")
    if isinstance(paths, dict):
        return tuple(Adapter(name, path=_text(path)) for name, path in paths.items())
    if not isinstance(paths, list):
        raise NotOffered("this SGLang does not list LoRA adapters")
    found = []
    for each in paths:
        if isinstance(each, str):
            name, _, path = each.partition("=")
            found.append(Adapter(name, path=path or name))
        elif isinstance(each, dict) and isinstance(each.get("lora_name"), str):
            found.append(Adapter(each["lora_name"], path=_text(each.get("lora_path"))))
    return tuple(found)


def _lacks(server: Mapping[str, Any], kv_events: KvEventsEndpoint | None) -> tuple[tuple[str, str], ...]:
    lacks = [(signal, remedy) for signal, setting, remedy in _WANTED if server.get(setting, True) in (False, None)]
    if "kv_events" in server and kv_events is None:
        lacks.append(("kv_events", "start it with --kv-events-config and a tcp:// or ipc:// endpoint"))
    return tuple(lacks)


def _max_running(server: Mapping[str, Any], dp_size: int) -> int | None:
    """Requests that all ranks run at once: what each says of itself, made of the setting and of its memory.

    The setting itself is not set as a rule, and stands for one rank or for all, by the kind of parallelism: it is
    taken only where there is one.
    """
    states = server.get("internal_states")
    ranks = [_mapping(each) for each in states] if isinstance(states, list) else []
    if len(ranks) == dp_size:
        effective = _sum(each.get("effective_max_running_requests_per_dp") for each in ranks)
        if effective:
            return effective
    return count_or_none(server.get("max_running_requests")) or None if dp_size == 1 else None


def _priority(server: Mapping[str, Any]) -> Priority | None:
    enabled = server.get("enable_priority_scheduling")
    if not isinstance(enabled, bool):
        return None
    if not enabled:
        return Priority.NONE
    return Priority.LOWER_FIRST if server.get("schedule_low_priority_values_first") is True else Priority.HIGHER_FIRST


def _kv_events(server: Mapping[str, Any]) -> KvEventsEndpoint | None:
    """From the descriptor, which names TCP endpoints only, else from the setting itself."""
    told = server.get("kv_events")
    dp_size = count_or_none(server.get("dp_size")) or 1
    page = count_or_none(server.get("page_size"))
    if isinstance(told, dict):
        host = _text(told.get("endpoint_host"))
        endpoint = _tcp(host, told.get("endpoint_port_base"))
        if endpoint is not None:
            return KvEventsEndpoint(
                endpoint,
                replay_endpoint=_tcp(host, told.get("replay_endpoint_port_base")),
                topic=_text(told.get("topic")) or "",
                block_size=count_or_none(told.get("block_size")) or page,
                dp_size=count_or_none(told.get("dp_size")) or dp_size,
            )
    try:
        wanted = orjson.loads(server["kv_events_config"])
    except (KeyError, ValueError):
        return None
    endpoint = _text(_mapping(wanted).get("endpoint"))
    if endpoint is None or wanted.get("publisher") != "zmq" or not endpoint.startswith(("tcp://", "ipc://")):
        return None
    return KvEventsEndpoint(
        endpoint,
        replay_endpoint=_text(wanted.get("replay_endpoint")),
        topic=_text(wanted.get("topic")) or "",
        block_size=page,
        dp_size=dp_size,
    )


def _tcp(host: str | None, port: Any) -> str | None:
    if host is None or not count_or_none(port):
        return None
    return f"tcp://[{host}]:{port}" if ":" in host and not host.startswith("[") else f"tcp://{host}:{port}"


def _of_rank(ranks: list[dict[str, Any]], dp_rank: int | None) -> list[dict[str, Any]]:
    if not ranks:
        raise SideChannelError(Trouble.BROKEN, "the engine reported the load of no rank")
    if dp_rank is None:
        return ranks
    chosen = [each for each in ranks if each.get("dp_rank", 0) == dp_rank]
    if not chosen:
        raise NotOffered(f"the engine has no data-parallel rank {dp_rank}")
    return chosen[:1]


def _per_rank(samples: Iterable[Sample]) -> dict[int, float]:
    """By data-parallel rank: the largest row, which is the one in all, and the same from each of its processes."""
    found: dict[int, float] = {}
    for labels, value in samples:
        rank = labels.get("dp_rank") or "0"
        if _RANK.match(rank):
            found[int(rank)] = max(value, found.get(int(rank), value))
    return found


def _gauge(per_rank: Mapping[str, Mapping[int, float]], name: str, dp_rank: int | None) -> int | None:
    values = [value for rank, value in per_rank.get(name, {}).items() if dp_rank in (None, rank)]
    return max(0, int(sum(values))) if values else None


def _realtime(found: Mapping[str, Sequence[Sample]], mode: str, dp_rank: int | None) -> int | None:
    samples = [each for each in found.get("realtime_tokens", []) if each[0].get("mode") == mode]
    return _gauge({mode: _per_rank(samples)}, mode, dp_rank)


def _sum(values: Iterable[Any]) -> int | None:
    """The sum of counts; None when one of them is none, because part of a sum is no sum."""
    counts = [count_or_none(value) for value in values]
    known = [value for value in counts if value is not None]
    return sum(known) if known and len(known) == len(counts) else None


def _share(used: int | None, capacity: int | None, shares: Sequence[float | None]) -> float | None:
    """How full the KV cache is, 0 to 1: from the counts, else the mean of what the ranks say."""
    known = [share for share in shares if share is not None]
    if used is not None and capacity:
        share = used / capacity
    elif known and len(known) == len(shares):
        share = sum(known) / len(known)
    else:
        return None
    return min(1.0, max(0.0, share))


def _generated(moments: Any) -> int | None:
    if not isinstance(moments, list) or len(moments) < 6:
        return None
    value = _number(moments[5])
    return None if value is None or value < 0 else int(value)


def _number(value: Any) -> float | None:
    """A JSON number; `orjson` lets neither NaN nor infinity through."""
    return float(value) if type(value) is float or type(value) is int else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
