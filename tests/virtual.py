"""The real scheduler against simulated endpoints, in virtual time: thousands of rows in milliseconds."""

import heapq
import itertools
import random
from dataclasses import dataclass, field

from swarmkit.batches import home_queues
from swarmkit.policy import RetryPolicy
from swarmkit.records import Failure, FailureKind
from swarmkit.scheduler import Delivered, Drop, Ended, Failed, Scheduler, Send, Settle, Stop, Tick, Wake


@dataclass
class Server:
    """An endpoint with continuous batching: ``slots`` rows at once, each ``row_s`` seconds.

    ``fault(batch, rng)`` gives None, or ``(kind, seconds, share of the rows delivered before)``.
    """

    row_s: float = 1.0
    slots: int = 64
    latency_s: float = 0.0
    fault: object = None
    dies_at: float = float("inf")
    free_at: list = field(default_factory=list)

    @property
    def rows_per_s(self):
        return self.slots / self.row_s


@dataclass
class Outcome:
    time_s: float
    failure: Failure | None
    answered: dict
    failed: dict
    requests: int
    most_in_flight: int
    attempts: bytes
    met: dict  # row -> endpoints it was sent to
    sizes: list


class Virtual:
    def __init__(
        self, servers, rows, *, by_rows=True, max_size=100, max_in_flight=4, concurrency=None, seed=0, retry=None
    ):
        self.rng = random.Random(seed)
        self.servers = servers
        self.by_rows = by_rows
        queues, tight = home_queues(range(rows), len(servers), lambda row: None)
        self.scheduler = Scheduler(
            queues,
            rows,
            max_size=max_size,
            max_in_flight=max_in_flight,
            retry=retry or RetryPolicy(),
            draw=self.rng.random,
            concurrency=concurrency,
            tight=tight,
        )
        self.heap = []
        self.order = itertools.count()
        self.now = 0.0
        self.open = {}
        self.outcome = Outcome(0.0, None, {}, {}, 0, 0, b"", {}, [])
        self.over = False
        for server in servers:
            server.free_at = [0.0] * server.slots

    def at(self, time, event, ticket=None):
        heapq.heappush(self.heap, (time, next(self.order), ticket, event))

    def run(self):
        self.do(self.scheduler.start(0.0))
        while self.heap and not self.over:
            self.now, _, ticket, event = heapq.heappop(self.heap)
            if ticket is not None and ticket not in self.open:
                continue  # the connection was dropped
            if isinstance(event, Delivered):
                for row in event.rows:
                    if self.scheduler.wants(row):
                        assert row not in self.outcome.answered
                        assert row not in self.outcome.failed
                        self.outcome.answered[row] = self.open[ticket].endpoint
            if isinstance(event, (Ended, Failed)):
                del self.open[ticket]
            self.do(self.scheduler.handle(event, self.now))
        assert self.over, "the run stalled: nothing is under way and nothing is planned"
        self.outcome.time_s = self.now
        self.outcome.attempts = bytes(self.scheduler.attempts)
        return self.outcome

    def do(self, instructions):
        for instruction in instructions:
            match instruction:
                case Send(batch):
                    self.send(batch)
                case Settle(row, failure):
                    assert row not in self.outcome.answered
                    assert row not in self.outcome.failed
                    self.outcome.failed[row] = failure
                case Drop(ticket):
                    del self.open[ticket]
                case Wake(at):
                    self.at(max(at, self.now), Tick())
                case Stop(failure):
                    self.outcome.failure = failure
                    self.over = True

    def send(self, batch):
        server = self.servers[batch.endpoint]
        self.open[batch.ticket] = batch
        self.outcome.requests += 1
        self.outcome.sizes.append(len(batch.rows))
        self.outcome.most_in_flight = max(self.outcome.most_in_flight, len(self.open))
        for row in batch.rows:
            self.outcome.met.setdefault(row, []).append(batch.endpoint)
        fault = server.fault(batch, self.rng) if server.fault else None
        if fault is None and self.now >= server.dies_at:
            fault = (FailureKind.CONNECT, 0.0, 0)
        if fault is not None:
            kind, seconds, share = fault
            done = batch.rows[: int(share * len(batch.rows))]
            if done:
                self.at(self.now + seconds / 2, Delivered(batch.ticket, done), batch.ticket)
            failure = Failure(kind, "simulated", f"endpoint {batch.endpoint}")
            self.at(self.now + seconds, Failed(batch.ticket, failure), batch.ticket)
            return
        last = self.now
        for row in batch.rows:
            begins = max(heapq.heappop(server.free_at), self.now + server.latency_s)
            ends = begins + server.row_s
            heapq.heappush(server.free_at, ends)
            last = max(last, ends)
            if ends > server.dies_at:
                failure = Failure(FailureKind.DISCONNECT, "died", f"endpoint {batch.endpoint}")
                self.at(max(server.dies_at, self.now), Failed(batch.ticket, failure), batch.ticket)
                return
            if self.by_rows:
                self.at(ends, Delivered(batch.ticket, (row,)), batch.ticket)
        if not self.by_rows:
            self.at(last, Delivered(batch.ticket, batch.rows), batch.ticket)
        self.at(last, Ended(batch.ticket), batch.ticket)


def ideal_s(servers, rows):
    """Total work over total speed."""
    return rows / sum(s.rows_per_s for s in servers)
