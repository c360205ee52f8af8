"""The first of the seeds of ``python tests/simulation``, and small cases that hypothesis makes up."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation.scenario import Scenario, run_seed

from swarmkit.engine.breaker import Breaker
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.messages import Added, Delivered, Drop, Ended, Failed, Removed, Send, Settle, Stop, Tick, Wake
from swarmkit.engine.policy import REACTIONS, RetryPolicy
from swarmkit.engine.scheduler import Scheduler
from swarmkit.records import Failure, FailureKind

CHUNK = 30


@pytest.mark.parametrize("first", range(0, 120, CHUNK))
def test_whatever_happens_every_row_ends_once_and_within_bounds(first):
    for seed in range(first, first + CHUNK):
        _, problem, _, _ = run_seed(seed)
        assert not problem, f"replay with: python tests/simulation --seed {seed} --trace\n{problem}"


def test_a_seed_says_all_about_a_run():
    first, second = (Scenario(7).run().outcome for _ in range(2))
    assert first == second


@st.composite
def small_cases(draw):
    """Up to 3 endpoints and 6 rows, and what happens next, for as long as hypothesis cares to say."""
    rows = draw(st.integers(1, 6))
    return {
        "endpoints": draw(st.integers(1, 3)),
        "rows": rows,
        "max_size": draw(st.integers(1, 4)),
        "max_in_flight": draw(st.integers(1, 3)),
        "concurrency": draw(st.sampled_from([None, 1, 2])),
        "limited": draw(st.sets(st.integers(0, rows - 1), max_size=2)),
        "resting": draw(st.sets(st.integers(0, 2), max_size=2)),
        "hedge": draw(st.booleans()),
        "steps": draw(
            st.lists(
                st.tuples(
                    st.integers(0, 5),  # which of the open requests
                    st.sampled_from(["deliver one", "deliver all", "end", "wait", "add", "remove", *REACTIONS]),
                    st.sampled_from([0.0, 0.1, 1.0, 40.0]),  # seconds until then
                ),
                max_size=40,
            )
        ),
    }


@settings(max_examples=300, deadline=None)
@given(small_cases())
def test_any_order_of_events_keeps_the_books_and_ends(case):
    fleet = Fleet(
        case["endpoints"],
        max_size=case["max_size"],
        max_in_flight=case["max_in_flight"],
        retry=RetryPolicy(),
        draw=random.Random(0).random,
        resting=[i for i in case["resting"] if i < case["endpoints"]],
        concurrency=case["concurrency"],
    )
    queues = [range(i, case["rows"], case["endpoints"]) for i in range(case["endpoints"])]
    limited = dict.fromkeys(case["limited"], 128)
    scheduler = Scheduler(fleet, queues, case["rows"], limited=limited, hedge=case["hedge"])
    now, over = 0.0, False
    flights: dict = {}  # ticket -> batch
    left: dict = {}  # ticket -> rows not delivered
    wakes: list = []
    settled: dict = {}

    def carry_out(messages):
        nonlocal over
        for message in messages:
            match message:
                case Send(batch):
                    at_same = [b for b in flights.values() if b.endpoint == batch.endpoint]
                    assert len(at_same) < case["max_in_flight"]
                    assert not case["concurrency"] or len(flights) < case["concurrency"]
                    assert not set(batch.rows) & set(settled) or len(batch.rows) == 1
                    if not batch.rows or settled.get(batch.rows[0]) == "answered":  # a probe
                        flights[batch.ticket], left[batch.ticket] = batch, list(batch.rows)
                        continue
                    carried = [r for b in flights.values() for r in b.rows if r in left[b.ticket]]
                    assert case["hedge"] or not set(batch.rows) & set(carried)
                    flights[batch.ticket], left[batch.ticket] = batch, list(batch.rows)
                case Settle(row, _):
                    assert row not in settled
                    settled[row] = "failed"
                case Drop(ticket):
                    del flights[ticket], left[ticket]
                case Wake(at):
                    wakes.append(at)
                case Stop(failure):
                    over = True
                    assert failure is None or not scheduler.wants(0) or now >= 30 or scheduler.fleet.out
        scheduler.validate()

    def tell(event):
        if isinstance(event, Delivered):
            for row in event.rows:
                left[event.ticket].remove(row)
                if scheduler.wants(row):
                    assert row not in settled
                    settled[row] = "answered"
        elif not isinstance(event, Tick | Added | Removed):
            del flights[event.ticket], left[event.ticket]
        carry_out(scheduler.handle(event, now))

    def change(number, is_added):
        # One that was removed comes back, or a new one comes; one that is there goes.
        some = [i for i, e in enumerate(scheduler.fleet) if (e.breaker is Breaker.REMOVED) == is_added]
        some += [len(scheduler.fleet)] if is_added else []
        if some:
            index = some[number % len(some)]
            tell(Added(index) if is_added else Removed(index))

    def step(number, what, seconds):
        nonlocal now
        if what in ("add", "remove"):
            return change(number, what == "add")
        due = min((w for w in wakes if w >= now), default=None)
        now = now + seconds
        if due is not None and (due <= now or not flights):  # wakes ring in time, and nothing else happens meanwhile
            now = due
            wakes.remove(due)
            return tell(Tick())
        if not flights:
            raise AssertionError("nothing is under way and nothing is planned")
        ticket = sorted(flights)[number % len(flights)]
        match what:
            case "wait":
                tell(Tick())
            case "deliver one" if left[ticket]:
                tell(Delivered(ticket, left[ticket][:1]))
            case "deliver all":
                tell(Delivered(ticket, list(left[ticket])))
            case FailureKind():
                tell(Failed(ticket, Failure(what, "as drawn")))
            case _:
                if left[ticket]:
                    tell(Delivered(ticket, list(left[ticket])))
                if ticket in flights and not over:
                    tell(Ended(ticket))
        return None

    carry_out(scheduler.start(now))
    for number, what, seconds in case["steps"]:
        if not over:
            step(number, what, seconds)
    for _ in range(2_000):  # from here on all is well; where no endpoint is left, it is waited for ten minutes
        if not over:
            step(0, "end", 0.1)
    assert over, "the run does not end"
    assert len(settled) == case["rows"] or now >= 30
