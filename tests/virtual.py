"""The real scheduler against simulated endpoints, in virtual time: thousands of rows in milliseconds.

``swarmkit.simulate`` has the server and the clock; here are what goes wrong on a server (a ``Trouble``, decided when
a request arrives) and ``Virtual``, which asserts what must hold whatever happens (the list is at ``Virtual.send`` and
``Virtual.check_outcome``).
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swarmkit.batches import home_queues
from swarmkit.policy import REACTIONS, Breaker, RetryPolicy
from swarmkit.records import Batch, Failure, FailureKind
from swarmkit.scheduler import Delivered, Failed, Scheduler
from swarmkit.simulate import Server as SoundServer
from swarmkit.simulate import VirtualRun

INF = math.inf
KILLS = (FailureKind.DISCONNECT, FailureKind.SERVER, FailureKind.HANG)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What happens to one request.

    kind : how it fails; None with ``kills_engine``: as the engine's death looks to its clients.
    after_s : seconds until it does.
    share : part of its rows that is delivered half-way there (never with batch delivery, but for an abort).
    retry_after_s : what the answer says about coming again.
    kills_engine : every request on the endpoint is lost with it, and it is down for so many seconds.
    """

    kind: FailureKind
    after_s: float = 0.0
    share: float = 0.0
    retry_after_s: float | None = None
    kills_engine: float | None = None
    reused: bool = False  # of a killer: at its first meeting with an engine it looks like a stale connection


Fault = Callable[[Batch, random.Random], "Trouble | tuple[FailureKind, float, float] | None"]


@dataclass
class Server(SoundServer):
    """A server on which things go wrong."""

    fault: Fault | None = None
    down: Sequence[tuple[float, float]] = ()  # spells during which nobody listens
    silent: bool = False  # its deaths are noticed by a timeout only
    timeout_s: float = 30.0

    def is_down(self, now):
        return super().is_down(now) or any(a <= now < b for a, b in self.down)


@dataclass
class Outcome:
    time_s: float = 0.0
    failure: Failure | None = None
    answered: dict = field(default_factory=dict)
    failed: dict = field(default_factory=dict)
    requests: int = 0
    most_in_flight: int = 0
    attempts: bytes = b""
    met: dict = field(default_factory=dict)  # row -> endpoints it was sent to, in order
    saw: dict = field(default_factory=dict)  # row -> Counter of the failures it met
    kills: dict = field(default_factory=dict)  # row -> engines it killed
    last_size: dict = field(default_factory=dict)  # row -> rows in the last request that held it
    copied: Counter = field(default_factory=Counter)  # row -> times it went out while another request held it
    sizes: list = field(default_factory=list)
    events: int = 0


class Virtual(VirtualRun):
    """One run.

    Parameters are the scheduler's and: ``lengths(row)``, the work in a row (1 is usual); ``killers``, row to the
    ``Trouble`` it makes wherever it is accepted; ``tight``, row to budget; ``books``, the number of events between
    two audits of the scheduler's books (0: none).
    """

    def __init__(
        self,
        servers,
        rows,
        *,
        by_rows=True,
        max_size=100,
        max_in_flight=16,
        concurrency=None,
        seed=0,
        retry=None,
        hedge=True,
        resting=(),
        tight=None,
        lengths=None,
        killers=None,
        books=0,
        trace=None,
    ):
        self.rng = random.Random(seed)
        self.rows = rows
        self.max_size, self.max_in_flight = max_size, max_in_flight
        self.concurrency = concurrency or INF
        self.retry = retry or RetryPolicy()
        self.hedge = hedge
        self.killers = killers or {}
        self.books = books
        self.trace = trace
        self.tight = tight or {}
        queues = home_queues(range(rows), len(servers), [1] * rows, self.tight)
        scheduler = Scheduler(
            queues,
            rows,
            max_size=max_size,
            max_in_flight=max_in_flight,
            retry=self.retry,
            draw=self.rng.random,
            concurrency=concurrency,
            tight=self.tight,
            resting=resting,
            hedge=hedge,
        )
        super().__init__(servers, scheduler, lengths, by_rows)
        self.unfinished: dict[int, set[int]] = {}  # ticket -> rows, as the server knows them
        self.holders: dict[int, set[int]] = {}  # row -> tickets that carry it
        self.requests_at = [0] * len(servers)
        self.not_before = [0.0] * len(servers)
        self.denied: set[int] = set()
        self.refused_alone: set[tuple[int, int]] = set()
        self.in_a_row = [Counter() for _ in servers]  # failures of an endpoint since its last delivery
        self.outcome = Outcome()
        for index, server in enumerate(servers):
            for begins, _ in server.down:
                self.at(begins, self.die, index)

    def stepped(self):
        self.outcome.events += 1
        if self.books and self.outcome.events % self.books == 0:
            check_books(self.scheduler)
        assert self.outcome.events < 50_000 + 200 * self.rows, "the run does not end"

    def run(self):
        super().run()
        self.outcome.time_s = self.now
        self.outcome.failure = self.failure
        self.outcome.attempts = bytes(self.scheduler.attempts)
        check_books(self.scheduler)
        self.check_outcome()
        return self.outcome

    def tell(self, event):
        if self.trace:
            self.trace(self.now, event)
        match event:
            case Delivered(ticket, rows):
                endpoint = self.open[ticket].endpoint
                for row in rows:
                    assert row not in self.outcome.failed or not self.scheduler.wants(row)
                    if self.scheduler.wants(row):
                        assert row not in self.outcome.answered, f"row {row} is answered twice"
                        self.outcome.answered[row] = endpoint
                    self.drop_holder(row, ticket)
                self.unfinished[ticket].difference_update(rows)
                self.in_a_row[endpoint].clear()
            case Failed(ticket, failure):
                self.failed(ticket, failure)
        super().tell(event)

    def do(self, instructions):
        for instruction in instructions if self.trace else ():
            self.trace(self.now, instruction)
        super().do(instructions)

    def settle(self, row, failure):
        assert row not in self.outcome.answered, f"row {row} was answered and fails"
        assert row not in self.outcome.failed, f"row {row} fails twice"
        self.outcome.failed[row] = failure

    # ---- requests ------------------------------

    def send(self, batch):
        """A request goes out: nothing of what the policy says may be broken."""
        index, ticket = batch.endpoint, batch.ticket
        outcome = self.outcome
        self.requests_at[index] += 1
        assert 1 <= len(batch.rows) <= self.max_size
        assert self.requests_at[index] <= self.max_in_flight, f"endpoint {index} has {self.requests_at[index]} requests"
        assert index not in self.denied, "an endpoint that denied us is asked again"
        assert self.not_before[index] <= self.now, "asked again before its Retry-After was over"
        e = self.scheduler._fleet[index]
        assert e.ready, f"sent to an endpoint whose breaker is {e.breaker}"
        assert e.breaker is not Breaker.HALF_OPEN or self.requests_at[index] == 1, "half-open: one request"
        assert len({row in self.tight for row in batch.rows}) == 1, "tight rows ride with roomy ones"
        assert len(set(batch.rows)) == len(batch.rows)
        self.unfinished[ticket] = set(batch.rows)
        outcome.requests += 1
        outcome.sizes.append(len(batch.rows))
        outcome.most_in_flight = max(outcome.most_in_flight, len(self.open) + 1)
        assert len(self.open) < self.concurrency
        for row in batch.rows:
            assert (row, index) not in self.refused_alone, f"row {row} was refused by endpoint {index} before"
            holders = self.holders.setdefault(row, set())
            if holders:
                outcome.copied[row] += 1
            holders.add(ticket)
            assert len(holders) <= (2 if self.hedge else 1), f"row {row} is held by {len(holders)} requests"
            assert row not in outcome.answered, f"row {row} was answered before"
            assert row not in outcome.failed, f"row {row} had failed before"
            outcome.met.setdefault(row, []).append(index)
            outcome.last_size[row] = len(batch.rows)
        super().send(batch)

    def accept(self, server, batch):
        ticket = batch.ticket
        if server.is_down(self.now):
            kind, wait = (FailureKind.HANG, server.timeout_s) if server.silent else (FailureKind.CONNECT, 0.0)
            return self.at(self.now + wait, self.fail, ticket, kind)
        trouble = server.fault(batch, self.rng) if server.fault else None
        if isinstance(trouble, tuple):
            trouble = Trouble(*trouble)
        if trouble is None and self.killers:
            killer = next((row for row in batch.rows if row in self.killers), None)
            if killer is not None:
                trouble = self.killers[killer]
                met = self.outcome.kills.setdefault(killer, set())
                if trouble.reused and batch.endpoint not in met:  # the client takes it for a stale connection
                    trouble = Trouble(FailureKind.STALE, trouble.after_s)
                met.add(batch.endpoint)
        if trouble is None:
            return super().accept(server, batch)
        done = [r for r in batch.rows[: int(trouble.share * len(batch.rows))] if r not in self.killers]
        if done and (self.by_rows or trouble.kind is FailureKind.ABORT):
            when = trouble.after_s / 2 if self.by_rows else trouble.after_s
            self.at(self.now + when, self.deliver, ticket, done)
        return self.at(self.now + trouble.after_s, self.fail, ticket, trouble)

    def fail(self, ticket, trouble):
        if ticket not in self.open or self.over:
            return
        trouble = Trouble(trouble) if isinstance(trouble, FailureKind) else trouble
        index = self.open[ticket].endpoint
        failure = Failure(trouble.kind, "simulated", f"endpoint {index}", retry_after_s=trouble.retry_after_s)
        if trouble.kills_engine is not None:
            server = self.servers[index]
            server.down = [*server.down, (self.now, self.now + trouble.kills_engine)]
        self.tell(Failed(ticket, failure))
        if trouble.kills_engine is not None:
            self.die(index)

    def die(self, index):
        server = self.servers[index]
        if not server.silent:
            return super().die(index)
        for ticket in [ticket for ticket, batch in self.open.items() if batch.endpoint == index]:
            server.running.pop(ticket, None)
            self.at(self.now + server.timeout_s, self.fail, ticket, FailureKind.HANG)
        server.waiting.clear()
        self.heap = [h for h in self.heap if not (h[2] in (self.done, self.begin) and h[3][0] is server)]
        heapq.heapify(self.heap)
        server.busy = 0
        return None

    def failed(self, ticket, failure):
        batch, kind = self.open[ticket], failure.kind
        index, reaction, retry = batch.endpoint, REACTIONS[failure.kind], self.retry
        for row in self.unfinished[ticket]:
            if self.scheduler.wants(row):
                self.outcome.saw.setdefault(row, Counter())[kind] += 1
        if kind is FailureKind.DENIED:
            self.denied.add(index)
        if kind is FailureKind.REJECTED and len(batch.rows) == 1:
            self.refused_alone.add((batch.rows[0], index))
        if kind is FailureKind.BUSY and failure.retry_after_s:
            self.not_before[index] = max(self.not_before[index], self.now + failure.retry_after_s)
        row_of = self.in_a_row[index]
        # Knocking at a door that stays shut may go on: it costs no row anything, and pauses grow to half a minute.
        row_of["blamed"] += reaction.blamed and kind is not FailureKind.CONNECT
        row_of["busy"] += kind is FailureKind.BUSY
        # No retry is unbounded: so many faults in a row close an endpoint for good (each opening after the first
        # takes one probe; what was in flight when it opened may still come in).
        slack = retry.max_opens + self.max_in_flight * retry.max_opens
        assert row_of["blamed"] <= retry.breaker_threshold + slack
        assert row_of["busy"] <= retry.max_busy + slack

    def close(self, ticket):
        assert ticket in self.open, "dropped twice, or after its end"
        batch = super().close(ticket)
        self.requests_at[batch.endpoint] -= 1
        for row in batch.rows:
            self.drop_holder(row, ticket)
        del self.unfinished[ticket]

    def drop_holder(self, row, ticket):
        if holders := self.holders.get(row):
            holders.discard(ticket)

    # ---- the end ------------------------------

    def check_outcome(self):
        """What must hold at the end of every run."""
        run, retry, counts = self.outcome, self.retry, self.scheduler.counts
        assert not set(run.answered) & set(run.failed)
        if run.failure is None:
            assert len(run.answered) + len(run.failed) == self.rows, "rows were lost"
        else:
            assert all(e.lost for e in self.scheduler._fleet), "stopped while an endpoint is left"
        copies = sum(run.copied.values())
        assert copies == counts.copies
        assert copies <= (max(10, self.rows // 10) + 10 if self.hedge else 0), f"{copies} copies"
        assert max(run.copied.values(), default=0) <= 1, "one copy a row"
        for row, saw in run.saw.items():
            # The budget of a row. Each request after its first is the consequence of a failure, or its one copy.
            assert len(run.met[row]) <= 1 + saw.total() + run.copied[row], f"row {row} went out for no reason"
            # Faults: the budget; where two requests carried the row, one more may fail after it was spent.
            faults = sum(n for kind, n in saw.items() if REACTIONS[kind].attempt)
            assert faults <= retry.max_attempts + run.copied[row], f"row {row}: {faults} faults"
            # The first stale connection of a row is free, the others are faults of all rows of the request.
            assert saw[FailureKind.STALE] <= retry.max_attempts + 1 + run.copied[row]
            # Refusals: a whole batch, its halves, the row alone, one other endpoint; a copy rides with others.
            halvings = math.ceil(math.log2(self.max_size)) + 1
            assert saw[FailureKind.REJECTED] <= (1 + run.copied[row]) * halvings + 1, f"row {row}: {saw}"
            assert saw[FailureKind.DENIED] <= len(self.servers)
        for row, kills in run.kills.items():
            assert len(kills) <= 3, f"row {row} killed {len(kills)} engines"
        for row, failure in run.failed.items():
            saw = run.saw.get(row, Counter())
            if failure.kind is FailureKind.REJECTED:
                assert saw[FailureKind.REJECTED], f"row {row} was refused by nobody"
            else:
                stale = saw[FailureKind.STALE] and saw[FailureKind.STALE] + saw[FailureKind.CONNECT]
                deaths = sum(saw[kind] for kind in KILLS) + stale
                faults = sum(n for kind, n in saw.items() if REACTIONS[kind].attempt) + stale
                assert faults >= retry.max_attempts or deaths >= 3, f"row {row} gave up early: {failure} {saw}"


def check_books(scheduler):
    """What the scheduler and its fleet keep as running sums is what a recount gives."""
    fleet, flights = scheduler._fleet, scheduler._flights.values()
    held, requests = Counter(), Counter()
    for flight in flights:
        held[flight.batch.endpoint] += len(flight.unfinished)
        requests[flight.batch.endpoint] += 1
    for index, e in enumerate(fleet):
        assert (e.held, e.requests) == (held[index], requests[index]), f"endpoint {index}: {e}"
    assert fleet.ready == sum(e.ready for e in fleet)
    queues = list(scheduler._queues._queues)
    assert scheduler._queues.unsent == sum(map(len, queues))
    left = [row for queue in queues for row in queue]
    for parcel in [*scheduler._parcels, *scheduler._quarantine]:
        left += [row for row in parcel.rows if scheduler.wants(row)]
    assert len(set(left)) == len(left), "a row waits in two places"
    under_way = {row for flight in flights for row in flight.unfinished}
    assert not under_way & set(left), "a row is under way and waits"
    assert scheduler._left == len(left) + len(under_way)
    rates = [e.rate for e in fleet if e.ready]
    assert math.isclose(fleet._rate_sum, sum(rates), rel_tol=1e-6, abs_tol=1e-6)
    assert fleet._rated == sum(rate > 0 for rate in rates)
    timed = [e for e in fleet if e.ready and e.rate > 0 and e.row_s < INF]
    assert math.isclose(fleet._timed, sum(e.rate for e in timed), rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(fleet._slots, sum(e.rate * e.row_s for e in timed), rel_tol=1e-6, abs_tol=1e-6)
    opens = scheduler._fleet._retry.max_opens
    assert [e.lost for e in fleet] == [e.breaker is Breaker.OUT or e.opens >= opens for e in fleet]
    assert fleet._lost == sum(e.lost for e in fleet)
    assert fleet.done == sum(e.done for e in fleet)
    clean = [e.ready and e.proven and not e.blames and not e.busy for e in fleet]
    assert clean == [e.clean for e in fleet]
    assert fleet._clean == sum(clean)


def ideal_s(servers, rows):
    """Total work over total speed."""
    return rows / sum(s.rows_per_s for s in servers)
