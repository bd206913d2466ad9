"""Pictures of results, with matplotlib where it is installed (`pip install 'tidegate[plots]'`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

METRICS = (
    ("ttft_ms", "mean time to first token, ms"),
    ("ttft_p99_ms", "p99 time to first token, ms"),
    ("total_ms", "mean end-to-end time, ms"),
    ("hit_rate", "prompt tokens found in a cache"),
    ("goodput_per_s", "requests within the objective, per s"),
    ("usd_per_million", "dollars per million tokens"),
)


class PlotError(Exception):
    """There is nothing to draw with."""


def require() -> None:
    """Raises `PlotError` where matplotlib is missing, before hours are spent on what was to be drawn."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install 'tidegate[plots]'") from error


def draw(
    path: Path,
    title: str,
    loads: Sequence[float],
    rows: Mapping[str, Mapping[float, Mapping[str, tuple[float, float]]]],
) -> None:
    """One panel a metric; `rows`: policy, load, metric to mean and half the confidence interval. Bars where there is
    one load, lines where there are more."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [
        each for each in METRICS if any(row[each[0]][0] for per_load in rows.values() for row in per_load.values())
    ]
    figure = Figure(figsize=(12, 3.4 * ((len(shown) + 2) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for number, (metric, label) in enumerate(shown, 1):
        axes = figure.add_subplot((len(shown) + 2) // 3, 3, number)
        axes.set_title(label, fontsize=9)
        for place, (policy, per_load) in enumerate(rows.items()):
            values = [per_load[load][metric] for load in loads]
            heights, errors = [value for value, _ in values], [error for _, error in values]
            if len(loads) == 1:
                axes.barh(place, heights[0], xerr=errors[0], color=f"C{place % 10}")
            else:
                axes.errorbar([100.0 * load for load in loads], heights, yerr=errors, label=policy, marker="o")
        if len(loads) == 1:
            axes.set_yticks(range(len(rows)), list(rows), fontsize=7)
            axes.invert_yaxis()
        else:
            axes.set_xlabel("load, % of capacity", fontsize=8)
            if metric.endswith("_ms"):
                axes.set_yscale("log")
            if number == 1:
                axes.legend(fontsize=6)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_grid(
    path: Path,
    label: str,
    loads: Sequence[float],
    panels: Mapping[str, Mapping[str, Sequence[float]]],
) -> None:
    """One panel a workload, one line a policy; `panels`: workload, policy, values by load."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = (len(panels) + 3) // 4
    figure = Figure(figsize=(14, 3.0 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(label)
    for number, (workload, per_policy) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, 4, number)
        axes.set_title(workload, fontsize=9)
        axes.set_yscale("log")
        for place, (policy, values) in enumerate(per_policy.items()):
            axes.plot(
                [100.0 * load for load in loads],
                values,
                label=policy,
                marker=".",
                color=f"C{place % 10}",
                linestyle="-" if place < 10 else "--",
                linewidth=2.5 if not place else 1.0,
            )
        if number == 1:
            axes.legend(fontsize=5)
    figure.savefig(path, dpi=100, metadata={"Software": None})
