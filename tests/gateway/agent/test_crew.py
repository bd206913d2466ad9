from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.agent.crew import Add, Crew, Release, Seat
from gateway.agent.keeping import Answered, Empty, Event, Exited, Keeper, Leave, Limits, Phase, Say


class Machine:
    """A crew whose servers do at once, or when told to, what real ones take minutes for."""

    def __init__(self, count: int, capacity: int) -> None:
        self.crew = Crew(count, capacity)
        self.now = 0.0
        self.said: list[str] = []
        self.fails = False
        """Whether what is started now ends before it is ready."""
        self.least_ready = 0
        self.turn()

    def turn(self) -> None:
        """The next steps, and what follows from them until nothing does."""
        for _ in range(1000):
            for place, seat in list(self.crew.seats.items()):
                self.post(seat)
                if seat.keeper.phase is Phase.GONE:
                    del self.crew.seats[place]
            steps = self.crew.decide()
            for step in steps:
                match step:
                    case Add(place):
                        assert place not in self.crew.seats
                        assert place < self.crew.capacity
                        seat = Seat(
                            place,
                            f"box-pool-{place}",
                            Keeper(Limits(start_timeout_s=60, stop_timeout_s=60), self.now, max),
                        )
                        self.crew.seats[place] = seat
                        self.post(seat)
                    case Release(place, again):
                        self.post(self.crew.seats[place], Leave(again))
                    case Say(text):
                        self.said.append(text)
            self.least_ready = min(self.least_ready, self.crew.ready)
            if not steps:
                return
        raise AssertionError("it never comes to rest")

    def post(self, seat: Seat, *events: Event) -> None:
        if "start" in seat.keeper.decide(self.now, events):
            seat.generation = self.crew.generation

    def live_on(self, seconds: float = 1.0) -> None:
        """Every server does what is expected of it next."""
        self.now += seconds
        for seat in list(self.crew.seats.values()):
            match seat.keeper.phase:
                case Phase.STARTING:
                    self.post(seat, Exited("ended with exit code 1") if self.fails else Answered())
                case Phase.READY:
                    self.post(seat, Answered())
                case Phase.DRAINING:
                    self.post(seat, Empty())
                case Phase.STOPPING:
                    self.post(seat, Exited("ended with exit code 0"))
            self.turn()

    def settle(self, steps: int = 60) -> None:
        for _ in range(steps):
            self.live_on()

    @property
    def ready_places(self) -> list[int]:
        return [place for place, seat in sorted(self.crew.seats.items()) if seat.ready]


def running(count: int, capacity: int) -> Machine:
    machine = Machine(count, capacity)
    machine.settle()
    assert len(machine.ready_places) == min(count, capacity)
    machine.least_ready = count
    return machine


def test_as_many_are_started_as_ordered_in_the_lowest_places() -> None:
    assert running(3, 8).ready_places == [0, 1, 2]


def test_more_are_added_and_no_more_than_there_is_room_for() -> None:
    machine = running(1, 3)
    machine.crew.order(7, (), None)
    machine.turn()
    machine.settle()
    assert machine.ready_places == [0, 1, 2]


def test_those_that_are_named_go_first_else_the_last() -> None:
    machine = running(4, 4)
    machine.crew.order(3, {"box-pool-1"}, None)
    machine.turn()
    machine.settle()
    assert machine.ready_places == [0, 2, 3]
    machine.crew.order(2, (), None)
    machine.turn()
    machine.settle()
    assert machine.ready_places == [0, 2]


def test_one_that_is_not_ready_goes_before_one_that_is() -> None:
    machine = running(2, 3)
    machine.crew.order(3, (), None)
    machine.turn()
    machine.crew.seats[0].keeper.decide(machine.now, [Exited("was ended by SIGKILL")])
    machine.crew.seats[2].keeper.decide(machine.now, [Answered()])
    machine.crew.order(2, (), None)
    machine.turn()
    assert machine.ready_places == [1, 2]


def test_what_somebody_took_down_is_not_started_again() -> None:
    machine = running(2, 4)
    machine.crew.fewer += 1
    machine.post(machine.crew.seats[1], Leave())
    machine.settle()
    assert machine.ready_places == [0]
    machine.crew.order(2, (), None)
    machine.settle()
    assert machine.ready_places == [0]


def rolled(machine: Machine) -> bool:
    return all(seat.generation == machine.crew.generation for seat in machine.crew.seats.values())


def test_rolling_takes_one_at_a_time() -> None:
    machine = running(3, 3)
    machine.crew.renew()
    machine.turn()
    machine.settle()
    assert rolled(machine)
    assert machine.least_ready == 2
    assert machine.ready_places == [0, 1, 2]
    assert not machine.crew.rolling
    assert machine.said == ["all servers are started anew"]


def test_only_server_is_replaced_by_another_one_first_where_there_is_room() -> None:
    machine = running(1, 2)
    machine.crew.renew()
    machine.turn()
    assert machine.crew.settled == 1, "the second one is not to be counted by the gateway"
    machine.settle()
    assert rolled(machine)
    assert machine.least_ready == 1
    assert machine.ready_places == [1]
    assert machine.said[0] == "starting another server before box-pool-0 goes"


@pytest.mark.parametrize("capacity", [3, 1])
def test_one_that_is_left_while_all_are_started_anew_waits_for_the_place_of_one_that_goes(capacity: int) -> None:
    """The count is lowered, by an order or with the room in the file, while the first one is drained."""
    machine = running(3, 3)
    machine.crew.renew()
    machine.turn()
    machine.crew.order(1, (), None)
    machine.crew.capacity = capacity
    machine.turn()
    assert machine.crew.ready == 1
    machine.settle()
    assert rolled(machine)
    assert machine.least_ready == 1
    assert machine.said[0].startswith("starting another server before")
    assert len(machine.said) == 2


def test_only_server_is_drained_where_there_is_no_room() -> None:
    machine = running(1, 1)
    machine.crew.renew()
    machine.turn()
    machine.settle()
    assert rolled(machine)
    assert machine.least_ready == 0
    assert "there is no room for a second one" in machine.said[0]


def test_rolling_stops_when_the_new_one_does_not_start_and_the_rest_runs_on() -> None:
    machine = running(3, 3)
    machine.fails = True
    machine.crew.order(3, (), 0)
    machine.crew.order(3, (), 1)
    machine.turn()
    machine.settle()
    assert machine.ready_places == [1, 2]
    assert machine.said == [
        "stopped starting servers anew: box-pool-0 ended with exit code 1 after 1 s; the other 2 run on as before"
    ]
    assert machine.crew.roll == 0
    machine.fails = False
    machine.crew.order(3, (), 1)
    for _ in range(40):
        machine.live_on(10.0)
    assert machine.ready_places == [0, 1, 2]
    assert not rolled(machine), "the same order is not carried on with"
    machine.crew.order(3, (), 2)
    machine.turn()
    machine.settle()
    assert rolled(machine)
    assert machine.crew.roll == 2


def test_failed_replacement_of_the_only_server_is_given_up() -> None:
    machine = running(1, 2)
    machine.fails = True
    machine.crew.renew()
    machine.turn()
    machine.settle()
    assert machine.ready_places == [0]
    assert list(machine.crew.seats) == [0]


def test_next_one_waits_until_the_gateways_have_taken_the_one_before() -> None:
    machine = running(2, 2)
    machine.crew.renew()
    machine.turn()
    first = machine.crew.seats[0]
    first.taken = False
    machine.settle()
    assert machine.crew.ready == 2
    assert not rolled(machine)
    first.taken = True
    machine.settle()
    assert rolled(machine)


def test_numbers_of_orders_are_carried_out_once_and_those_from_before_the_start_never() -> None:
    machine = running(2, 2)
    machine.crew.order(2, (), 5)
    assert (machine.crew.roll, machine.crew.rolling) == (5, False)
    for number, generation in ((6, 1), (6, 1), (0, 1), (1, 2)):  # at 0, the gateway has begun anew
        machine.crew.order(2, (), number)
        machine.turn()
        machine.settle()
        assert (machine.crew.roll, machine.crew.generation, machine.crew.rolling) == (number, generation, False)


ORDERS = st.lists(
    st.tuples(
        st.integers(0, 5),  # servers
        st.integers(0, 3),  # number of the rolling restart
        st.lists(st.integers(0, 4), max_size=2),  # which servers die
        st.integers(0, 6),  # how long nothing else happens
        st.booleans(),  # whether starts fail
    ),
    max_size=12,
)


@given(st.integers(1, 4), st.integers(1, 5), ORDERS)
def test_after_any_history_the_order_is_met_and_everything_is_new(
    count: int, capacity: int, orders: list[tuple[int, int, list[int], int, bool]]
) -> None:
    machine = Machine(count, capacity)
    machine.crew.order(count, (), 0)
    for wanted, roll, dying, passed, fails in orders:
        machine.fails = fails
        machine.crew.order(wanted, (), roll)
        machine.turn()
        for place in dying:
            seat = machine.crew.seats.get(place)
            if seat is not None and seat.keeper.running:
                machine.post(seat, Exited("was ended by SIGKILL"))
                machine.turn()
        machine.settle(passed)
    machine.fails = False
    machine.now += 1000
    machine.crew.order(count, (), 99)
    machine.turn()
    machine.settle()
    machine.now += 1000
    machine.settle()
    assert len(machine.ready_places) == min(count, capacity) == len(machine.crew.seats)
    assert rolled(machine)
    assert machine.crew.roll == 99


@given(st.integers(2, 5), st.integers(0, 2))
def test_never_more_than_one_is_missing_while_all_are_started_anew(count: int, spare: int) -> None:
    machine = running(count, count + spare)
    machine.crew.renew()
    machine.turn()
    machine.settle(10 * count)
    assert rolled(machine)
    assert machine.least_ready == count - 1


def test_no_further_one_is_taken_while_another_one_is_missing() -> None:
    machine = running(3, 3)
    machine.crew.renew()
    machine.turn()
    while not (machine.crew.seats[0].generation == 1 and machine.ready_places == [0, 2]):
        machine.live_on()
    assert machine.crew.seats[1].keeper.phase is not Phase.READY
    machine.post(machine.crew.seats[0], Exited("was ended by SIGKILL"))
    machine.crew.seats[0].keeper.due += 60
    machine.least_ready = 3
    for _ in range(30):
        machine.live_on()
    assert machine.crew.seats[1].ready
    assert machine.crew.seats[2].generation == 0, "its turn only comes when the first one is back"
    machine.settle(80)
    assert rolled(machine)
