"""Which version runs, and how the last reading of its configuration went, as metrics."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.version import tidegate_version


class Reloads:
    """What has become of this worker's configuration since its start."""

    __slots__ = ("_applied", "_in_force_since_unix_s", "_refused", "_succeeded")

    def __init__(self) -> None:
        self._applied = 0
        self._refused = 0
        self._succeeded = True
        self._in_force_since_unix_s = time.time()

    @property
    def succeeded(self) -> bool:
        """Whether the last configuration that was read is in force."""
        return self._succeeded

    def applied(self) -> None:
        """A new configuration is in force."""
        self._applied += 1
        self._succeeded = True
        self._in_force_since_unix_s = time.time()

    def refused(self) -> None:
        """A new one could not be used; the one before goes on."""
        self._refused += 1
        self._succeeded = False

    def families(self) -> Iterator[Metric]:
        """The version too, since both are of the same life of the process."""
        build = GaugeMetricFamily(
            "tidegate_build_info", "The version that runs, and its Python.", labels=["version", "python"]
        )
        build.add_metric([tidegate_version(), platform.python_version()], 1.0)
        yield build
        reloads = CounterMetricFamily(
            "tidegate_config_reloads", "Times that the configuration was read again, by result.", labels=["result"]
        )
        reloads.add_metric(["applied"], self._applied)
        reloads.add_metric(["refused"], self._refused)
        yield reloads
        yield GaugeMetricFamily(
            "tidegate_config_last_reload_successful",
            "0 when the last configuration read could not be used.",
            value=float(self._succeeded),
        )
        yield GaugeMetricFamily(
            "tidegate_config_in_force_since_timestamp_seconds",
            "When the configuration in force was taken, in Unix time.",
            value=self._in_force_since_unix_s,
        )
