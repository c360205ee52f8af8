"""The scheduler's promises, in virtual time with seeded fleets and faults."""

import random

import pytest
from virtual import Server, Virtual, ideal_s

from swarmkit.policy import RetryPolicy
from swarmkit.records import FailureKind

PASSING = [
    FailureKind.STALE,
    FailureKind.DISCONNECT,
    FailureKind.SERVER,
    FailureKind.ABORT,
    FailureKind.BUSY,
    FailureKind.MALFORMED,
    FailureKind.LOCAL,
    FailureKind.CONNECT,
    FailureKind.HANG,
]


def now_and_then(kinds, chance):
    def fault(batch, rng):
        if rng.random() < chance:
            return rng.choice(kinds), rng.uniform(0, 3), rng.choice([0, 0, 0.5])
        return None

    return fault


def refuses(bad_rows):
    """A server that refuses any request with a bad row in it, as vLLM does."""
    return lambda batch, rng: (FailureKind.REJECTED, 0.01, 0) if bad_rows & set(batch.rows) else None


@pytest.mark.parametrize("seed", range(60))
def test_every_row_is_settled_exactly_once_whatever_happens(seed):
    rng = random.Random(seed)
    rows = rng.choice([1, 7, 100, 999, 3000])
    bad = set(rng.sample(range(rows), rng.randint(0, min(3, rows))))
    healthy = [
        Server(rng.uniform(0.1, 2), rng.choice([1, 8, 64]), fault=refuses(bad)) for _ in range(rng.randint(1, 8))
    ]
    shaky = [
        Server(rng.uniform(0.1, 2), 16, fault=now_and_then(PASSING, rng.uniform(0, 0.5)))
        for _ in range(rng.randint(0, 6))
    ]
    dying = [Server(dies_at=rng.uniform(0, 5), fault=refuses(bad)) for _ in range(rng.randint(0, 3))]
    denied = [Server(fault=lambda b, r: (FailureKind.DENIED, 0.1, 0)) for _ in range(rng.randint(0, 2))]
    servers = [*healthy, *shaky, *dying, *denied]
    rng.shuffle(servers)
    max_in_flight = rng.choice([1, 4])
    retry = RetryPolicy()
    run = Virtual(
        servers,
        rows,
        by_rows=rng.random() < 0.5,
        max_size=rng.choice([1, 10, 100]),
        max_in_flight=max_in_flight,
        concurrency=rng.choice([None, 3]),
        seed=seed,
        retry=retry,
    ).run()
    assert run.failure is None
    assert len(run.answered) + len(run.failed) == rows
    for row, failure in run.failed.items():
        # A good row may run out of attempts amid faults; a bad one is refused in the server's own words.
        assert failure.kind is not FailureKind.REJECTED or row in bad
    assert set(run.failed) >= {row for row in bad if row not in run.answered}


def test_while_all_is_well_every_row_stays_at_home_in_one_request_an_endpoint():
    run = Virtual([Server() for _ in range(100)], 10_000).run()
    assert run.requests == 100
    assert all(run.met[row] == [row % 100] for row in range(10_000))


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("endpoints", [10, 100])
def test_the_rows_of_a_slow_endpoint_are_stolen(by_rows, endpoints):
    healthy = [Server() for _ in range(endpoints - 1)]
    alone = Virtual(healthy, 100_000, by_rows=by_rows).run()
    run = Virtual([*healthy, Server(row_s=10.0)], 100_000, by_rows=by_rows).run()
    assert run.time_s <= 1.3 * alone.time_s
    assert sum(endpoint == endpoints - 1 for endpoint in run.answered.values()) < 100_000 / endpoints


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_mixed_fleets_finish_near_the_ideal(seed, by_rows):
    rng = random.Random(seed)
    servers = [Server(rng.uniform(0.3, 3), rng.choice([8, 64, 256])) for _ in range(20)]
    run = Virtual(servers, 100_000, by_rows=by_rows).run()
    assert run.time_s <= 1.2 * ideal_s(servers, 100_000)
    assert run.requests < 1.3 * 1000  # 1,000 full batches: bites shrink at the end only


def test_thefts_do_not_shred_the_end_of_a_run():
    # 653 rows on 3 equal endpoints: one of them took what was left in fourteen requests down to a single row.
    run = Virtual([Server(row_s=1.5, slots=256) for _ in range(3)], 653, max_in_flight=64).run()
    assert run.requests <= 13


def test_a_stale_connection_is_no_endless_loop():
    run = Virtual([Server(fault=lambda b, r: (FailureKind.STALE, 0.0, 0))], 3).run()
    assert run.failure is not None or len(run.failed) == 3


def test_once_dead_rows_go_where_nobody_died():
    # A batch that died on the endpoint that resets goes on to one without a fault, so no good row is suspected.
    def resets(batch, rng):
        return (FailureKind.DISCONNECT, 0.5, 0) if rng.random() < 0.5 else None

    run = Virtual([*(Server(fault=resets) for _ in range(3)), *(Server() for _ in range(4))], 10_000)
    assert not run.run().failed
    assert run.scheduler.counts.quarantined <= 300, "at the very beginning no endpoint has shown what it is"


def test_rows_that_an_endpoint_never_answers_are_copied_and_its_connection_dropped():
    run = Virtual([*(Server() for _ in range(9)), Server(row_s=1e9)], 20_000).run()
    assert len(run.answered) == 20_000
    assert run.time_s < 60


def test_a_healthy_run_copies_nothing():
    run = Virtual([Server() for _ in range(10)], 20_000)
    run.run()
    assert run.scheduler.counts.copies == 0


def test_copies_are_bounded():
    servers = [Server(), *(Server(row_s=1e6, dies_at=1e5) for _ in range(9))]
    virtual = Virtual(servers, 2000)
    run = virtual.run()
    assert len(run.answered) == 2000
    assert virtual.scheduler.counts.copies <= 200


def test_a_refused_batch_is_halved_until_the_bad_row_stands_alone():
    run = Virtual([Server(fault=refuses({42, 77})) for _ in range(3)], 300).run()
    assert set(run.failed) == {42, 77}
    assert all(f.kind is FailureKind.REJECTED for f in run.failed.values())
    assert len(set(run.met[42][-2:])) == 2, "the lone row is asked of one other endpoint before it fails"


def test_a_bad_row_on_a_lone_endpoint_fails_at_once():
    run = Virtual([Server(fault=refuses({0}))], 4, max_size=4).run()
    assert set(run.failed) == {0}
    assert run.met[0].count(0) == 3  # in the batch of four, in its half, alone


def test_rows_of_a_dead_endpoint_go_to_the_others():
    run = Virtual([Server(), Server(dies_at=0.0), Server()], 900).run()
    assert len(run.answered) == 900
    assert 1 not in run.answered.values()


def test_when_all_endpoints_are_gone_the_run_ends_with_the_reason():
    run = Virtual([Server(dies_at=1.5) for _ in range(3)], 5000).run()
    assert run.failure.kind is FailureKind.CONNECT
    assert run.answered
    assert len(run.answered) < 5000
    assert run.time_s < 60, "within the budget of pauses"


def test_an_endpoint_that_denies_us_gets_nothing_more():
    run = Virtual([Server(), Server(fault=lambda b, r: (FailureKind.DENIED, 0.1, 0))], 5000).run()
    assert len(run.answered) == 5000
    assert sum(1 in endpoints for endpoints in run.met.values()) <= 100


def test_a_full_queue_gets_smaller_batches_and_time():
    # Like vLLM with a bound of 20 queued prompts: larger requests are refused even by an idle server.
    full = Server(fault=lambda batch, rng: (FailureKind.BUSY, 0.0, 0) if len(batch.rows) > 20 else None)
    run = Virtual([full], 1000).run()
    assert len(run.answered) == 1000


def test_a_row_that_kills_engines_meets_three_and_its_neighbours_live():
    killer = 1234
    servers = [
        Server(fault=lambda batch, rng: (FailureKind.DISCONNECT, 0.5, 0) if killer in batch.rows else None)
        for _ in range(6)
    ]
    run = Virtual(servers, 5000).run()
    assert set(run.failed) == {killer}
    assert len(run.met[killer]) == 3


def test_the_bound_on_requests_in_flight_holds():
    run = Virtual([Server() for _ in range(50)], 20_000, concurrency=7).run()
    assert run.most_in_flight <= 7
    assert len(run.answered) == 20_000


def test_an_endpoint_holds_at_most_its_requests():
    run = Virtual([Server(slots=1, row_s=0.1)], 5000, max_in_flight=3).run()
    assert run.most_in_flight <= 3


def test_pauses_grow_and_are_jittered():
    from swarmkit.policy import backoff_s

    retry = RetryPolicy(base_s=1.0, cap_s=10.0, jitter=0.5)
    assert [backoff_s(k, retry, 0.0) for k in range(1, 7)] == [1, 2, 4, 8, 10, 10]
    assert backoff_s(3, retry, 1.0) == 2.0
