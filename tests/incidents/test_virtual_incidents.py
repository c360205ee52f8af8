"""Ordinary incidents, in virtual time: restarts, resets, outages, racks that die, endpoints that fail for everybody.

Rows of a second, 32 at once on an endpoint. Every row is answered, and the time is compared with the ideal: the work
over the speed of the endpoints that were up, plus the outage.
"""

import heapq

import pytest
from virtual import Server, Trouble, Virtual

from swarmkit.records import FailureKind

pytestmark = pytest.mark.slow

SLOTS = 32


def fleet(endpoints, rows, *, fault=lambda i: None, down=lambda i: (), **settings):
    servers = [Server(1.0, SLOTS, fault=fault(i), down=list(down(i))) for i in range(endpoints)]
    return Virtual(servers, rows, **settings)


def reset(virtual):
    """All connections are reset; the servers stay up, and drop what they were doing."""
    tickets = list(virtual.open)
    for server in virtual.servers:
        server.running.clear()
        server.waiting.clear()
        server.busy = 0
    heap = virtual.clock.heap
    heap[:] = [h for h in heap if h[2] not in (virtual.done, virtual.begin)]
    heapq.heapify(heap)
    for ticket in tickets:
        virtual.at(virtual.now, virtual.fail, ticket, FailureKind.DISCONNECT)


def now_and_then(kind, chance):
    return lambda batch, rng: (kind, 0.5, 0) if rng.random() < chance else None


def always(kind, after_s=0.01):
    return lambda batch, rng: (kind, after_s, 0)


def ideal_s(endpoints, rows, lost_s=0.0):
    """Seconds for the rows if endpoints lose so many seconds of work together."""
    return (rows / SLOTS + lost_s) / endpoints


def check(virtual, ideal, prompts=1.5, times=1.5):
    """Every row answered, in at most so many times the ideal, with at most so many times the prompts."""
    run = virtual.run()
    assert run.failure is None
    assert len(run.answered) == virtual.rows
    assert run.time_s <= times * ideal, f"{run.time_s:.1f} s, ideally {ideal:.1f} s"
    assert run.prompts <= prompts * virtual.rows, f"{run.prompts / virtual.rows:.2f} prompts a row"
    assert run.alone <= virtual.rows / 500, f"{run.alone} rows went out alone"
    return run


@pytest.fixture(params=[True, False], ids=["rows", "batch"])
def delivery(request):
    return {"by_rows": request.param}


@pytest.mark.long
def test_rolling_restart_ten_at_a_time(delivery):
    down = lambda i: [(2 + 2 * (i // 10), 7 + 2 * (i // 10))]  # noqa: E731
    check(fleet(100, 60_000, down=down, **delivery), ideal_s(100, 60_000, 100 * 5))


def test_rolling_restart_one_at_a_time(delivery):
    down = lambda i: [(2 + 3 * i, 5 + 3 * i)]  # noqa: E731
    check(fleet(8, 4000, down=down, **delivery), ideal_s(8, 4000, 8 * 3))


@pytest.mark.long
@pytest.mark.parametrize("times", [1, 2, 5])
def test_all_connections_are_reset(delivery, times):
    virtual = fleet(100, 60_000, **delivery)
    for k in range(times):
        virtual.at(3.0 + 2 * k, reset, virtual)
    # The first loses the rows of the slow start, each further one those that an endpoint works on.
    check(virtual, ideal_s(100, 60_000) + times, prompts=min(1.5, 1.25 + 0.1 * (times - 1)))


@pytest.mark.parametrize("seconds", [3, 30])
def test_all_refuse_for_a_while(delivery, seconds):
    down = lambda i: [(3, 3 + seconds)]  # noqa: E731
    check(fleet(8, 4000, down=down, **delivery), ideal_s(8, 4000) + seconds)


def test_all_refuse_from_the_start(delivery):
    check(fleet(8, 4000, down=lambda i: [(0, 20)], **delivery), ideal_s(8, 4000) + 20)


@pytest.mark.long
def test_a_rack_dies_for_a_while(delivery):
    down = lambda i: [(5, 25)] if i < 25 else ()  # noqa: E731
    check(fleet(100, 60_000, down=down, **delivery), ideal_s(100, 60_000, 25 * 15))


@pytest.mark.long
def test_half_is_unreachable_from_the_start(delivery):
    down = lambda i: [(0, 1e9)] if i % 2 else ()  # noqa: E731
    check(fleet(100, 60_000, down=down, **delivery), ideal_s(50, 60_000), prompts=1.05, times=1.2)


@pytest.mark.long
def test_half_answers_200_with_an_error(delivery):
    fault = lambda i: always(FailureKind.MALFORMED) if i % 2 else None  # noqa: E731
    check(fleet(100, 60_000, fault=fault, **delivery), ideal_s(50, 60_000), times=1.2)


def test_one_fails_half_of_its_requests(delivery):
    fault = lambda i: now_and_then(FailureKind.SERVER, 0.5) if i == 0 else None  # noqa: E731
    check(fleet(8, 4000, fault=fault, **delivery), ideal_s(8, 4000))


@pytest.mark.parametrize("endpoints", [8, pytest.param(100, marks=pytest.mark.long)])
def test_a_fifth_of_all_requests_fails(delivery, endpoints):
    fault = lambda i: now_and_then(FailureKind.SERVER, 0.2)  # noqa: E731
    check(fleet(endpoints, 500 * endpoints, fault=fault, **delivery), ideal_s(endpoints, 500 * endpoints) / 0.8)


def test_one_is_stuck(delivery):
    fault = lambda i: always(FailureKind.HANG, 300.0) if i == 0 else None  # noqa: E731
    check(fleet(8, 4000, fault=fault, **delivery), ideal_s(7, 4000))


@pytest.mark.long
def test_everything_at_once(delivery):
    def fault(i):
        return (
            always(FailureKind.MALFORMED)
            if i % 10 == 1
            else always(FailureKind.HANG, 300.0)
            if i % 10 == 2
            else now_and_then(FailureKind.SERVER, 0.2)
        )

    def down(i):
        return [(0, 1e9)] if i % 10 == 3 else [(4 + i / 10, 9 + i / 10)]

    virtual = fleet(100, 60_000, fault=fault, down=down, **delivery)
    virtual.at(6.0, reset, virtual)
    virtual.at(8.0, reset, virtual)
    check(virtual, ideal_s(70, 60_000, 70 * 5) / 0.8 + 2, prompts=1.8)  # 1.25 for the 502s alone


@pytest.mark.parametrize("kills_s", [5.0, 1e9], ids=["comes back", "for good"])
def test_a_row_that_crashes_engines_fails_alone_and_meets_three(delivery, kills_s):
    killer = Trouble(FailureKind.DISCONNECT, 0.5, kills_engine=kills_s)
    virtual = fleet(8, 4000, killers={1234: killer}, **delivery)
    run = virtual.run()
    assert run.failure is None
    assert set(run.failed) == {1234}
    assert len(run.kills[1234]) <= 3
    assert len(run.answered) == 3999
