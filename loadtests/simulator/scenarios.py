"""The named workloads, each with the fleet it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from loadtests.simulator import generators
from loadtests.simulator.engine import Constants
from loadtests.simulator.fleet import DEFAULT_ENGINE, Fleet, Seat, engine_named, seats_of, slower
from loadtests.simulator.traces import read_trace, workload_of
from loadtests.simulator.traffic import Source, Workload

TRACES = Path(__file__).parent / "traces"
"""An excerpt of Mooncake's synthetic trace; `--traces` names a folder with whole ones."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    source: Source
    fleet: Callable[[int, Constants], Fleet]
    """From the number of replicas and the constants of an engine."""
    text: str
    replicas: int = 8
    size: int = 8000
    """Requests of one run."""
    differs: bool = False
    """Replicas, adapters, regions or lengths of answers differ, which a policy can make use of."""
    options: Mapping[str, Any] = field(default_factory=dict)

    def build(self, replicas: int | None = None, engine: str = DEFAULT_ENGINE, **options: Any) -> Fleet:
        fleet = self.fleet(replicas or self.replicas, engine_named(engine))
        return replace(fleet, **{**self.options, **options})


def equal_fleet(replicas: int, constants: Constants) -> Fleet:
    """So many of one kind at one place."""
    return Fleet(tuple(Seat(constants) for _ in range(replicas)))


def _large_caches(replicas: int, constants: Constants) -> Fleet:
    return equal_fleet(replicas, replace(constants, kv_tokens=constants.kv_tokens * 4))


def _mixed(replicas: int, constants: Constants) -> Fleet:
    half = replicas // 2
    return Fleet(seats_of([(replicas - half, Seat(constants)), (half, Seat(slower(constants, 2.0)))]))


def _adapters(replicas: int, constants: Constants) -> Fleet:
    return equal_fleet(replicas, replace(constants, adapter_slots=8, adapter_ms=250.0))


def _regions(replicas: int, constants: Constants) -> Fleet:
    half = replicas // 2
    return Fleet(
        seats_of([(replicas - half, Seat(constants, region="us")), (half, Seat(constants, region="eu"))]),
        rtt_ms={("us", "us"): 1.0, ("us", "eu"): 80.0, ("eu", "us"): 80.0, ("eu", "eu"): 1.0},
        origins=("us", "eu"),
    )


def _generations(replicas: int, constants: Constants) -> Fleet:
    """The newest generation, and one before it at less than half the price a token."""
    half = replicas // 2
    newest = Seat(
        engine_named("8b-b200"),
        input_usd_per_million=0.10,
        cached_usd_per_million=0.02,
        output_usd_per_million=0.50,
    )
    last = Seat(
        engine_named("8b-a100"),
        input_usd_per_million=0.04,
        cached_usd_per_million=0.01,
        output_usd_per_million=0.20,
    )
    return Fleet(seats_of([(half, newest), (replicas - half, last)]))


def _list(*scenarios: Scenario) -> dict[str, Scenario]:
    return {each.name: each for each in scenarios}


GENERATED = _list(
    Scenario(
        "chats",
        generators.chats(),
        equal_fleet,
        "conversations that grow by each answer; the caches hold them all",
        size=12_000,
    ),
    Scenario(
        "chats-long",
        generators.chats(opening=4000, message=400, turns=10, pause_s=12.0, name="chats-long"),
        equal_fleet,
        "longer conversations; the caches hold a part of them",
    ),
    Scenario(
        "shared-prefix",
        generators.shared_prefix(),
        equal_fleet,
        "150 customers with 6,000 tokens each, 1,200 asked",
        size=5000,
    ),
    Scenario(
        "zipf",
        generators.shared_prefix(1000, 3000, 500, 300, 1.0),
        equal_fleet,
        "1,000 contexts of 3,000 tokens, asked for by Zipf's law",
    ),
    Scenario("hot-4", generators.shared_prefix(4, 10_000, 300, 200), equal_fleet, "four prefixes of 10,000 tokens"),
    Scenario("hot-1", generators.shared_prefix(1, 10_000, 300, 200), equal_fleet, "one prefix of 10,000 tokens"),
    Scenario("siblings", generators.siblings(), equal_fleet, "16 requests within 80 ms share 8,000 new tokens"),
    Scenario(
        "paced",
        generators.chats(opening=3000, message=300, answer=100, turns=12, pause_s=5.0, paced=True, name="paced"),
        equal_fleet,
        "conversations with a request every five seconds",
    ),
    Scenario("distinct", generators.distinct(), equal_fleet, "no two prompts have anything in common"),
    Scenario("mixed-speed", generators.chats(), _mixed, "chats; half of the replicas are half as fast", differs=True),
    Scenario(
        "mixed-distinct",
        generators.distinct(),
        _mixed,
        "distinct prompts; half of the replicas are half as fast",
        differs=True,
    ),
    Scenario("lora", generators.lora(), _adapters, "64 adapters by Zipf's law, 8 slots a replica", differs=True),
    Scenario(
        "two-regions",
        generators.two_regions(),
        _regions,
        "short prompts, 1 ms and 80 ms away",
        size=16_000,
        differs=True,
    ),
    Scenario(
        "output-mix",
        generators.output_mix(),
        equal_fleet,
        "half of the answers short, half long: max_tokens",
        differs=True,
    ),
    Scenario(
        "tiers",
        generators.tiers(),
        _generations,
        "people and batch jobs on two generations; times are the people's",
        differs=True,
    ),
)

TRACE_FILES = {
    "conversation": ("mooncake_conversation_trace.jsonl", _large_caches, "Mooncake, conversation; caches of 1.6 M"),
    "conversation-small": ("mooncake_conversation_trace.jsonl", equal_fleet, "Mooncake, conversation; caches of 0.4 M"),
    "synthetic": ("mooncake_synthetic_trace.jsonl", _large_caches, "Mooncake, synthetic; caches of 1.6 M"),
    "synthetic-excerpt": (
        "mooncake_synthetic_excerpt.jsonl",
        equal_fleet,
        "the first 500 requests of Mooncake, synthetic",
    ),
    "azure-conv": ("AzureLLMInferenceTrace_conv.csv", equal_fleet, "Azure 2023, conversations; nothing is shared"),
    "azure-code": ("AzureLLMInferenceTrace_code.csv", equal_fleet, "Azure 2023, code; nothing is shared"),
}


def trace_source(path: Path, name: str) -> Source:
    """Requests of a file, from its beginning. Raises `TraceError` when it is called."""

    def make(size: int, per_s: float, rng: Random) -> Workload:
        return workload_of(name, read_trace(path, size), per_s, rng)

    return make


def scenarios(traces: Path | None = None) -> dict[str, Scenario]:
    """All that can be run here: those of traces only where their files are."""
    found = dict(GENERATED)
    for name, (file, fleet, text) in TRACE_FILES.items():
        for folder in (traces, TRACES):
            if folder is not None and (folder / file).exists():
                found[name] = Scenario(name, trace_source(folder / file, name), fleet, text, size=12_000)
                break
    return found
