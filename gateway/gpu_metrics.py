"""What DCGM exporters last said of the replicas' GPUs, as metrics; nothing where none is configured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric

from backends.gpus import Gpu
from backends.upstream import Upstream

_GAUGES: tuple[tuple[str, str, Callable[[Gpu], float | None]], ...] = (
    ("tidegate_gpu_use_ratio", "Share of the time in which something ran on a GPU.", lambda gpu: gpu.use),
    ("tidegate_gpu_memory_used_bytes", "Memory in use on a GPU.", lambda gpu: gpu.memory_used_bytes),
    ("tidegate_gpu_memory_bytes", "Memory of a GPU.", lambda gpu: gpu.memory_bytes),
    ("tidegate_gpu_power_watts", "Power that a GPU draws.", lambda gpu: gpu.power_watts),
)


def gpu_families(upstreams: Iterable[Upstream]) -> Iterator[Metric]:
    """One sample for each GPU of each replica."""
    known = [(each.replica, gpu) for each in upstreams for gpu in each.gpus]
    for name, text, pick in _GAUGES:
        family = GaugeMetricFamily(name, text, labels=["pool", "replica", "gpu"])
        for replica, gpu in known:
            value = pick(gpu)
            if value is not None:
                family.add_metric([replica.pool, replica.name, gpu.index], value)
        yield family
