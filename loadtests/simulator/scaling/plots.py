"""Pictures of runs, as SVG written here: two lines and an area do not need a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from loadtests.simulator.scaling.run import Figures

Line = Sequence[tuple[float, float]]

WIDTH, PANEL, LEFT, RIGHT, TOP, GAP = 760.0, 130.0, 46.0, 12.0, 34.0, 26.0
POINTS = 220
COLOURS = {"tidegate": "#1f6feb", "oracle": "#8b949e", "HPA": "#d9822b", "static, peak": "#b0b0b0"}
_INK = "#57606a"


def draw(path: Path, title: str, runs: dict[str, Figures]) -> None:
    """Three panels over time: requests a second; replicas that are ready; share within the target. By decider."""
    first = next(iter(runs.values()))
    panels = [
        ("requests/s", {"": [(hour, rate) for hour, rate, _, _ in first.samples]}),
        (
            "replicas ready",
            {name: [(hour, float(ready)) for hour, _, ready, _ in each.samples] for name, each in runs.items()},
        ),
        ("within target", {name: [(hour, good) for hour, _, _, good in each.samples] for name, each in runs.items()}),
    ]
    height = TOP + len(panels) * (PANEL + GAP) + 14.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0f} {height:.0f}" font-family="sans-serif"'
        f' font-size="11" fill="{_INK}">',
        f'<rect width="{WIDTH:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="14" font-size="13">{escape(title)}</text>',
    ]
    at = LEFT
    for name in runs:
        parts.append(f'<text x="{at:.0f}" y="29" fill="{_colour(name)}">{escape(name)}</text>')
        at += 22.0 + 6.5 * len(name)
    for number, (label, lines) in enumerate(panels):
        parts += _panel(TOP + number * (PANEL + GAP), label, lines)
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{height - 4:.0f}" text-anchor="middle">hours</text></svg>')
    path.write_text("\n".join(parts) + "\n")


def _colour(name: str) -> str:
    return COLOURS.get(name, "#24292f")


def _panel(top: float, label: str, lines: Mapping[str, Line]) -> list[str]:
    last = max(point[0] for line in lines.values() for point in line)
    first = min(point[0] for line in lines.values() for point in line)
    most = 1.0 if label.startswith("within") else 1.05 * max(point[1] for line in lines.values() for point in line)
    wide = WIDTH - LEFT - RIGHT

    def place(hour: float, value: float) -> str:
        return (
            f"{LEFT + wide * (hour - first) / max(last - first, 1e-9):.0f},{top + 8 + PANEL * (1 - value / most):.1f}"
        )

    parts = [
        f'<text x="{LEFT}" y="{top + 4:.0f}">{label}</text>',
        f'<path d="M{LEFT} {top + 8:.0f}v{PANEL:.0f}h{wide:.0f}" fill="none" stroke="#d0d7de"/>',
        f'<text x="{LEFT - 4}" y="{top + 16:.0f}" text-anchor="end">{most:.3g}</text>',
        f'<text x="{LEFT - 4}" y="{top + 8 + PANEL:.0f}" text-anchor="end">0</text>',
        f'<text x="{LEFT}" y="{top + 20 + PANEL:.0f}">{first:.0f}</text>',
        f'<text x="{WIDTH - RIGHT}" y="{top + 20 + PANEL:.0f}" text-anchor="end">{last:.0f}</text>',
    ]
    for name, line in lines.items():
        points = " ".join(place(hour, value) for hour, value in _thinned(line, lowest=label.startswith("within")))
        width = 1.6 if name == "tidegate" else 1.1
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_colour(name)}" stroke-width="{width}"/>')
    return parts


def _thinned(line: Line, *, lowest: bool) -> list[tuple[float, float]]:
    """Few enough points for a small file: the lowest of each stretch where that is what matters, else the highest."""
    stretch = max(1, -(-len(line) // POINTS))
    choose = min if lowest else max
    return [choose(line[begin : begin + stretch], key=lambda point: point[1]) for begin in range(0, len(line), stretch)]
