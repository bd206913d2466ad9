"""Runs many cells (workload, load, seed, policy), each once: results are kept in a file under what they depend on."""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

from loadtests.simulator import capacity, fleet, metrics
from loadtests.simulator.scenarios import Scenario, equal_fleet, scenarios, trace_source
from loadtests.simulator.simulation import Simulation
from routing.policies import make_policy

ROOT = Path(__file__).parent.parent.parent

Run: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One run. Equal but for the policy: equal arrivals, prompts and answers."""

    workload: str
    load: float
    """Share of the capacity."""
    seed: int
    policy: str
    size: int
    engine: str = fleet.DEFAULT_ENGINE
    replicas: int = 8
    gateways: int = 1
    told: bool = False

    @property
    def key(self) -> str:
        told = " told" if self.told else ""
        return (
            f"{self.workload} {self.load:g} {self.policy} seed {self.seed}: {self.size} requests,"
            f" {self.replicas} {self.engine}, {self.gateways} gateways{told}"
        )


class Store:
    """Results by cell, in a JSON file. A result made by other code than today's does not count."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._rows: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._rows = {}
        self._unsaved = 0

    def get(self, key: str, code: str) -> Any:
        row = self._rows.get(key)
        return row["figures"] if row is not None and row["code"] == code else None

    def put(self, key: str, code: str, value: Any) -> None:
        self._rows[key] = {"code": code, "figures": value}
        self._unsaved += 1
        if self._unsaved >= 20:
            self.save()

    def save(self) -> None:
        if self._unsaved:
            fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(self._rows, indent=0, sort_keys=True) + "\n")
            fresh.replace(self.path)
            self._unsaved = 0


def code_of(policy: str) -> str:
    """Digest of the source that a policy's decisions depend on: its module and the router, with what they import of
    `routing` (one of the user's own: of its own package as well), and the simulator's model."""
    chooser = make_policy(policy, Random(0))
    own, colon, _ = policy.partition(":")
    modules = _closure([type(chooser).__module__, "routing.router", *([own] if colon else [])], own.split(".")[0])
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted({*modules, *_model()}):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def model_code() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in [*_model(), ROOT / "loadtests/simulator/capacity.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _model() -> list[Path]:
    names = ("cache", "engine", "fleet", "gateway", "generators", "scenarios", "simulation", "traces", "traffic")
    return [*(Path(__file__).parent / f"{name}.py" for name in names), fleet.FITS]


def _closure(names: Sequence[str], package: str) -> set[Path]:
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        # What __init__ of the policies imports is every policy.
        if name in found or name == "routing.policies":
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            continue
        path = found[name] = Path(spec.origin)
        imports = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
        modules = [node.module for node in imports if node.module]
        waiting.extend(each for each in modules if each.startswith(("routing.", f"{package}.")))
    return set(found.values())


def run_cell(cell: Cell, scenario: Scenario, per_s: float) -> dict[str, float]:
    """The figures of one run; the workload is made anew, from the cell's seed."""
    return next(iter(_run([cell], scenario, per_s)))[1]


def _run(
    cells: Sequence[Cell], scenario: Scenario, per_s: float, usd_per_hour: float = 0.0
) -> Iterator[tuple[Cell, dict[str, float]]]:
    """Cells that differ in nothing but the policy, over one workload."""
    first = cells[0]
    workload = scenario.source(first.size, per_s * first.load, Random(f"{first.workload} {first.seed}"))
    for cell in cells:
        built = scenario.build(cell.replicas, cell.engine, gateways=cell.gateways, told_speeds=cell.told)
        if usd_per_hour:
            built = replace(built, seats=tuple(replace(seat, usd_per_hour=usd_per_hour) for seat in built.seats))
        name = cell.policy

        def make(rng: Random, name: str = name) -> Any:
            return make_policy(name, rng)

        gc.collect()
        gc.disable()  # a run makes millions of objects and hardly any cycles
        try:
            result = Simulation(workload, built, make, cell.seed).run()
            found = metrics.figures(result, workload, built)
        finally:
            gc.enable()
        found["per_s"] = per_s * cell.load
        yield cell, found


@dataclass(frozen=True, slots=True)
class Where:
    """Where workloads come from that are not generated, and what replicas cost."""

    traces: Path | None = None
    trace: Path | None = None
    """A file of its own, under whatever name the cells give it."""
    usd_per_hour: float = 0.0

    def scenario(self, name: str) -> Scenario:
        if self.trace is not None:
            return Scenario(name, trace_source(self.trace, name), equal_fleet, str(self.trace))
        return scenarios(self.traces)[name]

    @property
    def stamp(self) -> str:
        """What results depend on besides the cell and the code."""
        if self.trace is None:
            return f" ${self.usd_per_hour:g}" if self.usd_per_hour else ""
        status = self.trace.stat()
        return f" {self.trace.resolve()} {status.st_size} {status.st_mtime_ns} ${self.usd_per_hour:g}"


def _task(subject: tuple[Sequence[Cell], float, Where]) -> list[tuple[Cell, dict[str, float]]]:
    cells, per_s, where = subject
    return list(_run(cells, where.scenario(cells[0].workload), per_s, where.usd_per_hour))


def _capacity_task(subject: tuple[str, int, str, Where]) -> tuple[tuple[str, int, str], float | None]:
    """None: the fleet does not answer such requests."""
    name, replicas, engine, where = subject
    scenario = where.scenario(name)
    try:
        return (name, replicas, engine), capacity.capacity_of(scenario.source, scenario.build(replicas, engine))
    except ValueError:
        return (name, replicas, engine), None


@contextmanager
def _pool(processes: int) -> Iterator[Run]:
    """Runs a function over many subjects, results as they come; one process is this one."""
    if processes <= 1:
        yield map
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_nice) as pool:
        yield pool.imap_unordered


def _nice() -> None:
    os.nice(10)


def run_all(
    cells: Sequence[Cell],
    store: Store,
    *,
    where: Where | None = None,
    processes: int = 2,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[Cell, dict[str, float]]:
    """Every cell's figures in their order, from the store or run now. Workloads that nobody answers are left out."""
    where = where or Where()
    codes = {policy: code_of(policy) for policy in {cell.policy for cell in cells}}
    found: dict[Cell, dict[str, float]] = {}
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        known = store.get(cell.key + where.stamp, codes[cell.policy])
        if known is not None:
            found[cell] = known
        else:
            group = (cell.workload, cell.load, cell.seed, cell.size, cell.engine, cell.replicas)
            groups.setdefault(group, []).append(cell)
    if not groups:
        return {cell: found[cell] for cell in cells if cell in found}
    with _pool(processes) as run:
        rates = _capacities([each for group in groups.values() for each in group], store, run, where, tell)
        tasks = [
            (group, rates[fleet_key], where)
            for group in groups.values()
            if (fleet_key := (group[0].workload, group[0].replicas, group[0].engine)) in rates
        ]
        for done, results in enumerate(run(_task, tasks), 1):
            for cell, figures in results:
                found[cell] = figures
                store.put(cell.key + where.stamp, codes[cell.policy], figures)
            tell(f"{done} of {len(tasks)}: {results[0][0].workload} at {results[0][0].load:.0%}")
    store.save()
    return {cell: found[cell] for cell in cells if cell in found}


def _capacities(
    cells: Iterable[Cell], store: Store, run: Run, where: Where, tell: Callable[[str], None]
) -> dict[tuple[str, int, str], float]:
    """Requests per second of each workload's fleet, likewise kept."""
    code = model_code()
    wanted = {(cell.workload, cell.replicas, cell.engine) for cell in cells}
    rates: dict[tuple[str, int, str], float] = {}
    missing: list[tuple[str, int, str]] = []
    for each in sorted(wanted):
        known = store.get(_capacity_key(each) + where.stamp, code)
        if known is None:
            missing.append(each)
        else:
            rates[each] = known
    tasks = [(name, replicas, engine, where) for name, replicas, engine in missing]
    for each, rate in run(_capacity_task, tasks):
        name = each[0]
        if rate is None:
            tell(f"{name} is left out: most of its requests are not answered")
            continue
        rates[each] = rate
        store.put(_capacity_key(each) + where.stamp, code, rate)
        tell(f"capacity of {name}: {rate:.2f} requests/s")
    store.save()
    return rates


def _capacity_key(what: tuple[str, int, str]) -> str:
    name, replicas, engine = what
    return f"capacity of {name}: {replicas} {engine}"
