"""`tidegate simulate scaling`: what an autoscaler makes of days of arrivals, in time, money and changes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from loadtests.simulator.fleet import DEFAULT_ENGINE, FleetError, engine_named, engines_in
from loadtests.simulator.scaling import plots, tables
from loadtests.simulator.scaling.arrivals import courses
from loadtests.simulator.scaling.deciders import deciders
from loadtests.simulator.scaling.run import Figures, Run, run_all

SPILLING = ("tidegate", "static, mean", "HPA")
SPIKES = ("viral", "viral at once")
FLOORS = (1, 4, 8, 16, 24)
RESTARTS = (
    ("diurnal", 8.0),
    ("diurnal", 10.5),
    ("monday", 6.1),
    ("viral", 6.4),
    ("viral at once", 6.2),
    ("sawtooth", 5.1),
)
"""Courses and hours in which the gateway is killed: where the load rises, or is high."""
WATCHED_H = 3.0
"""For how long it is looked at after that."""
MORE_SEEDS = 4
"""Times as many runs of these: what they tell apart is little."""
DRAWN = ("tidegate", "HPA", "oracle")
PICTURES = {"diurnal": (0.0, 24.0), "viral": (5.0, 10.0), "viral at once": (5.5, 3.0)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; returns the exit code: 2 when it was not said rightly what."""
    options = parser().parse_args(argv)
    known, all_deciders = courses(), deciders()
    names, chosen = options.courses or tuple(known), options.deciders or tuple(all_deciders)
    try:
        engine_named(options.engine)
        for kind, asked, there in (("course", names, known), ("decider", chosen, all_deciders)):
            for each in asked:
                if each not in there:
                    raise ValueError(f"no {kind} is called {each!r}; there are {', '.join(there)}")
        if options.write is not None and (options.courses or options.deciders or options.hours):
            raise ValueError("--write takes all courses, all deciders and whole days")
    except (FleetError, ValueError) as error:
        print(f"tidegate simulate scaling: {error}", file=sys.stderr)
        return 2
    seeds = range(1, options.seeds + 1)
    days = [
        Run(name, decider, seed, spill, hours=options.hours, engine=options.engine, lead_s=options.lead)
        for name in names
        for decider in chosen
        for spill in ((False, True) if decider in SPILLING and name in SPIKES else (False,))
        for seed in seeds
    ]
    found = _run(days, options.processes)
    print(tables.summary(found))
    if options.plot is not None:
        for name in names:
            if name in PICTURES:
                _draw(options.plot, name, chosen, options)
    if options.write is not None:
        step = [
            Run("viral at once", "tidegate", seed, spill, floor, 1.5, 5.5, engine=options.engine, lead_s=options.lead)
            for spill in (False, True)
            for floor in FLOORS
            for seed in seeds
        ]
        restarts = [
            Run(
                name,
                "tidegate",
                seed,
                hours=at + WATCHED_H,
                engine=options.engine,
                lead_s=options.lead,
                count_from_h=at,
                restart=restart,
            )
            for name, at in RESTARTS
            for restart in ("", "with", "without")
            for seed in range(1, MORE_SEEDS * options.seeds + 1)
        ]
        text = tables.page(found, _run(step, options.processes), _run(restarts, options.processes))
        tables.write(options.write, text)
    return 0


def _run(what: Iterable[Run], processes: int) -> dict[Run, Figures]:
    """In the order asked for."""
    runs = list(what)
    found: dict[Run, Figures] = {}
    for each, figures in run_all(runs, processes):
        found[each] = figures
        print(f"{len(found)} of {len(runs)}", end="\r", file=sys.stderr, flush=True)
    return {each: found[each] for each in runs}


def _draw(folder: Path, name: str, chosen: Sequence[str], options: argparse.Namespace) -> None:
    begin, hours = PICTURES[name]
    shown = {
        decider: Run(name, decider, 1, False, 1, hours, begin, True, options.engine, options.lead)
        for decider in DRAWN
        if decider in chosen
    }
    found = _run(shown.values(), options.processes)
    if found:
        path = folder / f"scaling-{name.replace(' ', '-')}.svg"
        plots.draw(path, f"{name}: {courses()[name].text}", {key: found[each] for key, each in shown.items()})


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="tidegate simulate scaling",
        description="Compare autoscalers over simulated days, with the production code of this gateway's.",
    )
    made.add_argument("--courses", type=_names, metavar="NAME,...", help=f"of {', '.join(courses())} (default: all)")
    made.add_argument("--deciders", type=_words, metavar="NAME;...", help=f"of {'; '.join(deciders())} (default: all)")
    made.add_argument("--hours", type=_positive, metavar="H", help="only the first so many")
    made.add_argument("--seeds", type=_whole, default=3, metavar="N", help="runs of each (default 3)")
    made.add_argument("--engine", default=DEFAULT_ENGINE, metavar="NAME", help=f"of {', '.join(engines_in())}")
    made.add_argument("--lead", type=_positive, default=240.0, metavar="S", help="median of a start (default 240)")
    made.add_argument("--processes", type=_whole, default=2, metavar="N", help="default 2")
    made.add_argument("--plot", type=Path, metavar="FOLDER", help="write a picture of each course that is worth one")
    made.add_argument("--write", type=Path, metavar="FILE", help="write the tables into docs/scaling.md")
    return made


def _names(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(","))


def _words(text: str) -> tuple[str, ...]:
    return tuple(each.strip() for each in text.split(";"))


def _whole(text: str) -> int:
    if not text.isdecimal() or len(text) > 6 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
