"""Numbers of one run, and of several with the same arrivals."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from loadtests.simulator.fleet import Fleet
from loadtests.simulator.simulation import Outcome, Result
from loadtests.simulator.traffic import Workload

WARM_UP = 0.1
"""Share of the requests, the first ones, that are not counted; more where the workload takes longer to begin."""
MOST_WARM_UP = 0.5

_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, two-sided 95 %, by degrees of freedom."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank; of nothing: 0."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def figures(result: Result, workload: Workload, fleet: Fleet) -> dict[str, float]:
    """Everything that is reported of one run."""
    counted = _counted(result.outcomes, workload.warm_s)
    done = [each for each in counted if not each.failed]
    ttft = sorted(each.ttft_ms for each in done)
    total = sorted(each.total_ms for each in done)
    tpot = sorted(
        (each.end - each.first) * 1000.0 / (each.job.output_tokens - 1) for each in done if each.job.output_tokens > 1
    )
    prompt = sum(each.job.prompt_tokens for each in done)
    good = sum(_good(each, workload) for each in done)
    span_s = max(1e-9, result.end - counted[0].sent) if counted else 1e-9
    decide = sorted(second for gateway in result.gateways for second in gateway.decide_s)
    per_replica = [float(each) for each in result.counts]
    busy = [engine.busy_s / max(result.end - result.outcomes[0].sent, 1e-9) for engine in result.engines]
    errors = [abs(each.ttft_ms - each.predicted_ttft_ms) for each in done if each.predicted_ttft_ms is not None]
    return {
        "requests": float(len(counted)),
        "failed": float(len(counted) - len(done)),
        "ttft_ms": mean(ttft),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p90_ms": percentile(ttft, 0.9),
        "ttft_p99_ms": percentile(ttft, 0.99),
        "tpot_ms": mean(tpot),
        "total_ms": mean(total),
        "total_p99_ms": percentile(total, 0.99),
        "hit_rate": sum(each.cached for each in done) / prompt if prompt else 0.0,
        "believed_rate": sum(each.believed for each in done) / prompt if prompt else 0.0,
        "goodput_per_s": good / span_s,
        "good_share": good / len(counted) if counted else 0.0,
        "load_cv": _variation(per_replica),
        "busy": mean(busy),
        "busy_cv": _variation(busy),
        "adapter_loads": float(sum(engine.adapter_loads for engine in result.engines)),
        "preemptions": float(sum(engine.preemptions for engine in result.engines)),
        "usd_per_million": _usd(done, fleet, span_s),
        "prediction_error": mean(errors) / mean(ttft) if errors and ttft and mean(ttft) else 0.0,
        "decide_us": mean(decide) * 1e6,
        "decide_p99_us": percentile(decide, 0.99) * 1e6,
        **_by_class(done),
    }


def _counted(outcomes: Sequence[Outcome], warm_s: float) -> Sequence[Outcome]:
    begun = int(WARM_UP * len(outcomes))
    most = int(MOST_WARM_UP * len(outcomes))
    while begun < most and outcomes[begun].job.at < warm_s:
        begun += 1
    return outcomes[begun:]


def _by_class(done: Sequence[Outcome]) -> dict[str, float]:
    """Times of those to whom price does not matter, where it matters to others; else nothing."""
    people = [each for each in done if not each.job.ms_per_usd]
    if len(people) == len(done):
        return {}
    ttft = sorted(each.ttft_ms for each in people)
    return {
        "people_ttft_ms": mean(ttft),
        "people_ttft_p99_ms": percentile(ttft, 0.99),
        "people_total_ms": mean([each.total_ms for each in people]),
    }


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % confidence interval of the mean; 0 for a single value."""
    count = len(values)
    if count < 2:
        return 0.0
    middle = mean(values)
    variance = sum((each - middle) ** 2 for each in values) / (count - 1)
    return _T_95.get(count - 1, 1.96) * sqrt(variance / count)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """By how much ours is above theirs as a share of theirs, mean of the pairs, and half its confidence interval."""
    ratios = [mine / other - 1.0 for mine, other in zip(ours, theirs, strict=True) if other]
    return mean(ratios), interval(ratios)


def _good(outcome: Outcome, workload: Workload) -> bool:
    tokens = outcome.job.output_tokens
    tpot_ms = (outcome.end - outcome.first) * 1000.0 / (tokens - 1) if tokens > 1 else 0.0
    return outcome.ttft_ms <= workload.slo_ttft_ms and tpot_ms <= workload.slo_tpot_ms


def _usd(done: Sequence[Outcome], fleet: Fleet, span_s: float) -> float:
    """Dollars per million tokens: what own engines cost while they ran, and what tokens cost at those with a price."""
    usd = sum(seat.usd_per_hour for seat in fleet.seats) * span_s / 3600.0
    tokens = 0
    for each in done:
        seat = fleet.seats[each.replica]
        job = each.job
        usd += (
            (job.prompt_tokens - each.cached) * seat.input_usd_per_million
            + each.cached * seat.cached_usd_per_million
            + job.output_tokens * seat.output_usd_per_million
        ) / 1e6
        tokens += job.prompt_tokens + job.output_tokens
    return usd * 1e6 / tokens if tokens else 0.0


def _variation(values: Sequence[float]) -> float:
    """Standard deviation as a share of the mean."""
    middle = mean(values)
    return sqrt(mean([(each - middle) ** 2 for each in values])) / middle if middle else 0.0
