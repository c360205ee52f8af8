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

from swarmkit.analysis.simulate import Server as SoundServer
from swarmkit.analysis.simulate import VirtualRun, blocks_of
from swarmkit.engine.breaker import Breaker
from swarmkit.engine.deadline import Deadline
from swarmkit.engine.endpoints import Fleet
from swarmkit.engine.messages import Added, Delivered, Ended, Failed, Removed
from swarmkit.engine.policy import REACTIONS, RetryPolicy
from swarmkit.engine.prefixes import prefix_order
from swarmkit.engine.queues import home_queues
from swarmkit.engine.scheduler import Scheduler
from swarmkit.engine.sharing import LOOK_S, Looks
from swarmkit.records import Batch, Failure, FailureKind

INF = math.inf
KILLS = (FailureKind.DISCONNECT, FailureKind.SERVER, FailureKind.HANG)
REFUSALS = (FailureKind.REJECTED, FailureKind.DENIED, FailureKind.TOO_LARGE)


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
    down: Sequence[tuple[float, float]] = ()  # (begin, end) of times at which it refuses connections
    silent: bool = False  # its crashes are noticed by a timeout only
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
    prompts: int = 0  # rows in all requests that reached a server
    refused_short: int = 0  # short prompts that were refused
    probes: int = 0
    alone: int = 0  # requests with a single row
    most_in_flight: int = 0
    attempts: bytes = b""
    met: dict = field(default_factory=dict)  # row -> endpoints it was sent to, in order
    saw: dict = field(default_factory=dict)  # row -> Counter of the failures it met
    kills: dict = field(default_factory=dict)  # row -> engines it killed
    failed_alone: set = field(default_factory=set)  # rows of requests with a single row that failed
    copied: Counter = field(default_factory=Counter)  # row -> times it went out while another request held it
    sizes: list = field(default_factory=list)
    events: int = 0


class Virtual(VirtualRun):
    """One run.

    Parameters are the scheduler's and: ``lengths(row)``, the work in a row (1 is usual); ``killers``, row to the
    ``Trouble`` it makes wherever it is accepted; ``limited``, row to budget; ``books``, the number of events between
    two audits of the scheduler's books (0: none); ``changes``, ``(time, endpoint, whether it is added)`` for those that
    come and go, and ``removed``, those that are not there at first; ``texts``, the prompts, laid out by ``order``;
    ``deadline``, seconds; ``beside``, another run on the same servers, and ``begins``, when this one does; ``places``,
    what their pool knows of its runs, and its ``priority``; ``looks``, whether servers are asked for their queues.
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
        limited=None,
        lengths=None,
        killers=None,
        books=0,
        trace=None,
        expected=True,
        rate_of=lambda index: None,
        tokens=lambda row: 1,
        changes=(),
        removed=(),
        texts=None,
        order="auto",
        deadline=None,
        beside=None,
        begins=0.0,
        places=None,
        priority=0,
        looks=False,
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
        self.limited = limited or {}
        there = [i for i in range(len(servers)) if i not in removed]
        runs = prefix_order(texts, range(rows), len(there), self.limited, order=order) if texts else None
        self.parts = runs.parts if runs else None
        homes = runs.queues if runs else home_queues(range(rows), len(there), [1] * rows, self.limited)
        queues = dict(zip(there, homes, strict=True))
        fleet = Fleet(
            len(servers),
            max_size=max_size,
            max_in_flight=max_in_flight,
            retry=self.retry,
            draw=self.rng.random,
            resting=[i for i in resting if i in queues],
            removed=removed,
            concurrency=concurrency,
            rate_of=rate_of,
            deadline=None if deadline is None else Deadline(deadline, "now"),
            taken=(lambda index: places.taken(priority, lambda: str(index))) if places else lambda index: None,
        )
        self.deadline = INF if deadline is None else deadline
        scheduler = Scheduler(
            fleet,
            [queues.get(i, []) for i in range(len(servers))],
            rows,
            limited=self.limited,
            hedge=hedge,
            expected=expected,
            tokens=tokens,
            parts=self.parts,
        )
        blocks = [blocks_of(text) for text in texts] if texts else None
        prompts = blocks.__getitem__ if blocks else None
        super().__init__(servers, scheduler, lengths, by_rows, prompts=prompts, beside=beside)
        self.begins = begins
        self.leave = places.enter(priority, scheduler, int) if places else lambda: None
        self.looks = Looks(fleet) if looks else None
        if beside:
            self.at(begins, self.start)
        self.unfinished: dict[int, set[int]] = {}  # ticket -> rows, as the server knows them
        self.holders: dict[int, set[int]] = {}  # row -> tickets that carry it
        self.requests_at = [0] * len(servers)
        self.not_before = [0.0] * len(servers)
        self.denials = [0] * len(servers)  # of endpoints that never answered; those in flight together count once
        self.sent_at: dict[int, float] = {}  # by ticket
        self.answered_at = begins
        self.refused_alone: set[tuple[int, int]] = set()
        self.outcome = Outcome()
        for index, server in enumerate(servers):
            for begins, _ in server.down:
                self.at(begins, self.die, index)
        for time, index, is_added in changes:
            self.at(time, self.change, index, is_added)

    def change(self, index, is_added):
        """An endpoint comes or goes; one that is new to the run is busy at once, while there is unsent work."""
        if self.over:
            return
        scheduler, fleet = self.scheduler, self.scheduler.fleet
        if is_added:
            self.denials[index], self.not_before[index] = 0, 0.0
        requests, is_due = scheduler.sent, is_added and scheduler._queues.unsent and not fleet[index].requests
        self.tell(Added(index) if is_added else Removed(index))
        is_due = is_due and (fleet.last_sends is None or self.now < fleet.last_sends.closes_at(index))
        if is_due and self.concurrency == INF and fleet.rate_of(index) is None and fleet._taken(index) is None:
            assert scheduler.sent > requests, "an endpoint was added, and gets nothing"

    def stepped(self):
        self.outcome.events += 1
        if self.books and self.outcome.events % self.books == 0:
            self.scheduler.validate()
        rows = sum(run.rows for run in self.runs)
        assert self.outcome.events < 50_000 + 200 * rows, "the run does not end"

    def start(self):
        super().start()
        if self.looks:
            self.at(self.now + LOOK_S, self.look)

    def look(self):
        for index in self.looks.due() if not self.over else ():
            server = self.servers[index]
            if not server.is_down(self.now):
                waiting = sum(ticket in run.open for run, ticket, _ in server.waiting)
                self.looks.told(index, server.busy, waiting)
        if not self.over:
            self.at(self.now + LOOK_S, self.look)

    def run(self):
        super().run()
        return self.outcome

    def ended(self):
        self.leave()
        self.scheduler.rations.release()  # as a pool does after a run
        self.outcome.time_s = self.now - self.begins
        self.outcome.failure = self.failure
        self.outcome.attempts = bytes(self.scheduler.attempts)
        self.scheduler.validate()
        self.check_outcome()

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
                self.denials[endpoint] = -(10**9)
                self.answered_at = self.now
            case Ended(ticket):
                self.denials[self.open[ticket].endpoint] = -(10**9)
            case Failed(ticket, failure):
                self.failed(ticket, failure)
        super().tell(event)

    def carry_out(self, messages):
        for message in messages if self.trace else ():
            self.trace(self.now, message)
        self.dropped_last = bool(self.open)
        was_over = self.over
        super().carry_out(messages)
        if self.over and not was_over:
            self.ended()

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
        assert len(batch.rows) <= self.max_size
        assert self.requests_at[index] <= self.max_in_flight, f"endpoint {index} has {self.requests_at[index]} requests"
        assert self.denials[index] < 3, "an endpoint that denied three requests and answered none is asked again"
        assert self.not_before[index] <= self.now, "asked again before its Retry-After was over"
        e = self.scheduler.fleet[index]
        taken = self.scheduler.fleet._taken(index)
        at_once = e.works_on or e.slots or self.scheduler.fleet._first_rows
        rate = self.scheduler.fleet.rate_of(index)
        assert taken is None or rate or taken < at_once, "sent where a run that goes first has filled all places"
        if rate is not None:
            assert rate._rpm is None or len(rate._log) <= rate._rpm, "more requests a minute than its gateway takes"
            assert rate.open <= rate._connections, "more requests in flight than its gateway takes"
        assert e.ready, f"sent to an endpoint whose breaker is {e.breaker}"
        if (last := self.scheduler.fleet.last_sends) is not None:
            assert self.now < last.closes_at(index), "sent although there is no time for it"
        assert e.breaker is not Breaker.HALF_OPEN or self.requests_at[index] == 1, "half-open: one request"
        assert len({row in self.limited for row in batch.rows}) <= 1, "tight rows ride with roomy ones"
        assert len(set(batch.rows)) == len(batch.rows)
        self.unfinished[ticket] = set(batch.rows)
        self.sent_at[ticket] = self.now
        outcome.requests += 1
        outcome.sizes.append(len(batch.rows))
        outcome.most_in_flight = max(outcome.most_in_flight, len(self.open) + 1)
        assert len(self.open) < self.concurrency
        if not any(map(self.scheduler.wants, batch.rows)):
            assert len(batch.rows) <= 1, "a probe is one row that is known to be good, or the plain prompt"
            assert outcome.answered.keys() >= set(batch.rows)
            assert batch.rows or not outcome.answered, "the plain prompt probes only where no row is known to be good"
            outcome.probes += 1
            self.unfinished[ticket] = set()
            return super().send(batch)
        outcome.alone += len(batch.rows) == 1
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
        return super().send(batch)

    def accept(self, server, batch):
        ticket = batch.ticket
        if not server.is_down(self.now):
            self.outcome.prompts += len(batch.rows)
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
            for run in self.runs:
                run.die(index)

    def die(self, index):
        server = self.servers[index]
        if not server.silent:
            return super().die(index)
        for ticket in [ticket for ticket, batch in self.open.items() if batch.endpoint == index]:
            server.running.pop((self, ticket), None)
            self.at(self.now + server.timeout_s, self.fail, ticket, FailureKind.HANG)
        server.waiting.clear()
        ends = [call for run in self.runs for call in (run.done, run.begin)]
        self.clock.heap[:] = [h for h in self.clock.heap if not (h[2] in ends and h[3][0] is server)]
        heapq.heapify(self.clock.heap)
        server.busy = 0
        return None

    def failed(self, ticket, failure):
        batch, kind = self.open[ticket], failure.kind
        index = batch.endpoint
        for row in self.unfinished[ticket]:
            if self.scheduler.wants(row):
                self.outcome.saw.setdefault(row, Counter())[kind] += 1
                if len(batch.rows) == 1:
                    self.outcome.failed_alone.add(row)
        self.outcome.refused_short += kind is FailureKind.REJECTED and not batch.rows
        fault_at = self.scheduler.fleet[index].fault_at
        self.denials[index] += kind is FailureKind.DENIED and self.sent_at[ticket] >= fault_at
        if kind is FailureKind.REJECTED and len(batch.rows) == 1:
            self.refused_alone.add((batch.rows[0], index))
        if kind is FailureKind.BUSY and failure.retry_after_s:
            self.not_before[index] = max(self.not_before[index], self.now + failure.retry_after_s)

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
        assert self.now <= self.deadline, "the run goes on after its deadline"
        if run.failure is None:
            assert len(run.answered) + len(run.failed) == self.rows, "rows were lost"
        elif run.failure.kind is FailureKind.DEADLINE:
            fleet = self.scheduler.fleet
            taking_part = [i for i, e in enumerate(fleet) if e.breaker not in (Breaker.OUT, Breaker.REMOVED)]
            assert self.now == self.deadline or (
                not self.dropped_last and self.now >= fleet.last_sends.latest(taking_part)
            )
        else:
            present = [e for e in self.scheduler.fleet if e.breaker is not Breaker.REMOVED]
            out = present and all(e.breaker is Breaker.OUT for e in present)
            waits = run.answered or not present
            patience = retry.give_up_s if waits else min(retry.give_up_s, 60 * retry.base_s)
            assert out or self.now >= self.answered_at + patience, "the run ended while endpoints may come back"
        copies = sum(run.copied.values())
        assert copies == counts.duplicates
        assert self.hedge or not copies
        for row, copied in run.copied.items():
            assert copied <= 1 + run.saw.get(row, Counter()).total(), f"row {row}: one duplicate at a time"
        for row, saw in run.saw.items():
            # Each request of a row after its first is the consequence of a failure, or its one duplicate.
            assert len(run.met[row]) <= 1 + saw.total() + run.copied[row], f"row {row} went out for no reason"
            # Refusals: a whole batch, its halves, the row alone, one other endpoint; a duplicate rides with others.
            halvings = math.ceil(math.log2(self.max_size)) + 1
            assert saw[FailureKind.REJECTED] <= (1 + run.copied[row]) * halvings + 1, f"row {row}: {saw}"
        for row, failure in run.failed.items():
            saw = run.saw.get(row, Counter())
            assert row in run.failed_alone or run.refused_short, f"row {row} fails for what happened in company"
            if failure.kind is FailureKind.BUSY:
                assert self.now >= self.answered_at + retry.give_up_s, f"row {row} gave up early: {failure}"
            elif failure.kind in REFUSALS:
                assert any(saw[kind] for kind in REFUSALS), f"row {row} was refused by no endpoint"
            else:
                # The first stale connection of a row is free, the others are faults of all rows of the request.
                stale = saw[FailureKind.STALE] and saw[FailureKind.STALE] + saw[FailureKind.CONNECT]
                crashes = sum(saw[kind] for kind in KILLS) + stale
                faults = sum(n for kind, n in saw.items() if REACTIONS[kind].counts) + stale
                assert faults >= retry.max_attempts or crashes >= 3, f"row {row} gave up early: {failure} {saw}"


def ideal_s(servers, rows):
    """Total work over total speed."""
    return rows / sum(s.rows_per_s for s in servers)
