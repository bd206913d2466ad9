"""Differences of pulses: restarts, models that come, several workers, and three resolutions that end."""

from __future__ import annotations

from gateway.rollups.pulse import ModelPulse, PoolPulse, Pulse
from gateway.rollups.series import DAY, HOUR, MAX_MODELS, OTHER_MODELS, WEEK, Series
from gateway.rollups.tally import ModelTally, Tally, difference, together


def pulse(completed: int, *, pid: int = 1, failed: int = 0, worker: int = 0, ttft: list[int] | None = None) -> Pulse:
    model = ModelPulse(completed + failed, failed, 10 * completed, completed, 5 * completed, 0.1 * completed)
    model.ttft = [0, completed, 0] if ttft is None else ttft
    model.duration, model.ttft_s = [0, 0, completed], 0.5 * completed
    outcomes = {"completed": completed, "upstream_error": failed}
    return Pulse(worker, pid, 100.0 + pid, requests=outcomes, models={"m": model}, pools=[PoolPulse("p", [], 0, 1, 2)])


def test_the_first_pulse_counts_from_the_start_of_its_worker() -> None:
    found = difference(None, pulse(3, failed=1))
    assert found.requests == {"completed": 3, "upstream_error": 1}
    assert found.models["m"] == ModelTally(4, 1, 30, 3, 15, 0.1 * 3, 0.0, 3, 1.5)
    assert (found.ttft, found.duration, found.retries, found.retries_refused) == ({1: 3}, {2: 3}, 2, 1)


def test_only_what_is_new_counts() -> None:
    found = difference(pulse(3), pulse(5))
    assert found.requests == {"completed": 2}
    assert (found.models["m"].requests, found.ttft, found.retries) == (2, {1: 2}, 0)
    quiet = difference(pulse(5), pulse(5))
    assert quiet == Tally()
    assert quiet.empty


def test_a_worker_that_was_started_again_counts_from_zero_and_never_below() -> None:
    again = difference(pulse(1000), pulse(2, pid=2))
    assert again.requests == {"completed": 2}
    assert again.models["m"].requests == 2
    odd = difference(pulse(1000, ttft=[9, 9, 9]), pulse(2))  # the same process, with less than before
    assert odd.requests == {}
    assert all(count >= 0 for count in (*odd.ttft.values(), odd.models["m"].requests, odd.models["m"].prompt_tokens))


def test_workers_add_up_in_what_they_count_and_in_what_they_hold() -> None:
    first, second = Tally(requests={"completed": 2}, in_flight=3), Tally(requests={"completed": 1}, in_flight=4)
    first.queue, second.queue = {"standard": 2}, {"standard": 1, "batch": 5}
    both = together([first, second], 10.0)
    assert (both.covered_s, both.requests, both.in_flight) == (10.0, {"completed": 3}, 7)
    assert both.queue == {"standard": 3, "batch": 5}


def test_of_states_over_time_the_highest_stays() -> None:
    slot = Tally(in_flight=3, queue={"standard": 9})
    slot.add(Tally(in_flight=2, queue={"standard": 1}, loop_lag_s=0.5))
    assert (slot.in_flight, slot.queue, slot.loop_lag_s) == (3, {"standard": 9}, 0.5)


def test_every_resolution_counts_each_tally_once() -> None:
    series, begin = Series(), 1_700_000_400.0
    for second in range(0, 4000, 10):
        series.add(Tally(10.0, requests={"completed": 1}), begin + second + 5)
    end = begin + 3999.0
    assert sum(series.levels["day"].total(end).requests.values()) == 400
    assert sum(series.levels["week"].total(end).requests.values()) == 400
    # The last hour has 360 slots, and the one that is running.
    assert 360 <= sum(series.levels["hour"].total(end).requests.values()) <= 361
    times = [start for start, _ in series.levels["hour"].each(end)]
    assert len(times) == HOUR.slots
    assert times[-1] - times[0] == 3590


def test_what_is_kept_is_bounded_whatever_the_clock_does() -> None:
    series = Series()
    for day in range(30):
        for second in range(0, 86_400, 600):
            series.add(Tally(10.0, requests={"completed": 1}), 1_700_000_000.0 + day * 86_400 + second)
    for day in range(30, 0, -1):  # set back by a day, again and again
        series.add(Tally(10.0, requests={"completed": 1}), 1_700_000_000.0 + day * 86_400)
    for width in (HOUR, DAY, WEEK):
        assert len(series.levels[width.name].slots) <= width.slots + 1


def test_models_beyond_the_limit_are_added_up() -> None:
    series = Series()
    for number in range(3 * MAX_MODELS):
        series.add(Tally(1.0, models={f"m{number}": ModelTally(requests=1)}), 1_700_000_000.0)
    (slot,) = series.levels["hour"].slots.values()
    assert len(slot.models) <= MAX_MODELS
    assert slot.models[OTHER_MODELS].requests > MAX_MODELS
    assert sum(each.requests for each in slot.models.values()) == 3 * MAX_MODELS
