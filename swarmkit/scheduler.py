"""Which rows go where, and when: a state machine without I/O, clock or randomness of its own.

Events go in (``Delivered``, ``Ended``, ``Failed``, ``Tick``), each with the time, and instructions come out
(``Send``, ``Settle``, ``Drop``, ``Wake``, ``Stop``). Times are seconds on any clock that does not go back.

The rules, in the order an endpoint looking for work applies them:

1. Rows that failed elsewhere go first, never to the endpoint that failed them while another one is ready.
2. Then its own home queue, a batch at a time.
3. When that is dry, it steals from the end of the longest queue, in ever smaller bites.

How much an endpoint may hold: one request until it has answered, ``max_in_flight`` afterwards, and never more
rows than its share, by measured speed, of all that is left (with a little slack). The last rule is what keeps a
slow endpoint from sitting on the end of a run, and what makes bites small as the work runs out ("guided
self-scheduling", Polychronopoulos and Kuck 1987, with the share weighed by speed).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from .batches import halves
from .policy import BREAKER, REACTIONS, Breaker, Reaction, RetryPolicy, Signal, backoff_s
from .records import Batch, Failure, FailureKind

__all__ = [
    "Delivered",
    "Drop",
    "Ended",
    "Event",
    "Failed",
    "Instruction",
    "Scheduler",
    "Send",
    "Settle",
    "Stop",
    "Tick",
    "Wake",
]


@dataclass(frozen=True, slots=True)
class Delivered:
    """Rows of a request are complete; the request goes on."""

    ticket: int
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over and all its rows were delivered."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request is over; the rows not delivered so far are unfinished."""

    ticket: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Tick:
    """Nothing but time has passed."""


Event = Delivered | Ended | Failed | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Put this batch on the wire. ``same_again`` marks the resending after a stale connection."""

    batch: Batch
    same_again: bool = False


@dataclass(frozen=True, slots=True)
class Settle:
    """This row ends with an error."""

    row: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Drop:
    """Cancel this request: nobody needs its rows any more."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Wake:
    """Send a ``Tick`` at this time."""

    at: float


@dataclass(frozen=True, slots=True)
class Stop:
    """The run is over: with ``failure`` None all rows are settled, else no endpoint is left."""

    failure: Failure | None = None


Instruction = Send | Settle | Drop | Wake | Stop

_SLACK = 1.25  # an endpoint may hold this much more than its share: rates are estimates
_FIRST_SINGLES = 32  # one-row requests an endpoint holds before it has answered


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Rows that failed somewhere and travel on together, with what must be remembered of them."""

    rows: tuple[int, ...]
    avoid: frozenset[int] = frozenset()
    deaths: int = 0
    refused: bool = False
    alone: bool = False  # from quarantine: the one row under suspicion


@dataclass(slots=True)
class _Flight:
    batch: Batch
    unfinished: set[int]
    sent_at: float
    parcel: _Parcel | None
    same_again: bool


@dataclass(slots=True)
class _Endpoint:
    queue: deque[int]
    max_bite: int
    requests: int = 0
    held: int = 0
    done: int = 0
    proven: bool = False
    busy_since: float = 0.0
    busy_s: float = 0.0
    rate: float = 0.0  # rows a second while busy; 0: not known yet
    breaker: Breaker = Breaker.CLOSED
    faults: int = 0
    opens: int = 0
    busy: int = 0
    rest_until: float = 0.0

    @property
    def ready(self) -> bool:
        return self.breaker in (Breaker.CLOSED, Breaker.HALF_OPEN)


@dataclass(slots=True)
class Counts:
    """What the scheduler did beyond sending each row once."""

    steals: int = 0
    halvings: int = 0
    retries: int = 0
    quarantined: int = 0
    opens: dict[int, int] = field(default_factory=dict)


class Scheduler:
    """The decisions of one run.

    Parameters
    ----------
    queues : sequence of sequence of int
        Per endpoint, the positions it starts with (``batches.home_queues``).
    size : int
        Length of the column: positions are below it.
    max_size, max_in_flight : int
        Rows a request and requests an endpoint, at most.
    retry : RetryPolicy
        Budgets and pauses.
    draw : callable
        Gives a random number from 0 to 1, for the jitter of pauses.
    concurrency : int, optional
        Requests in flight over all endpoints, at most.
    tight : mapping of int to int, optional
        Budgets of the rows that may not share a request with others (``batches.home_queues``).
    resting : iterable of int
        Endpoints that begin with an open breaker: they did not answer in time when they were last asked.

    Examples
    --------
    >>> s = Scheduler([[0, 2], [1]], 3, max_size=10, max_in_flight=2, retry=RetryPolicy(), draw=lambda: 0.0)
    >>> [(i.batch.endpoint, i.batch.rows) for i in s.start(now=0.0)]
    [(0, (0, 2)), (1, (1,))]
    >>> s.handle(Delivered(0, [0, 2]), now=1.0), s.handle(Ended(0), now=1.0)
    ([], [])
    >>> s.handle(Delivered(1, [1]), now=1.0)
    [Stop(failure=None)]
    """

    def __init__(
        self,
        queues: Sequence[Iterable[int]],
        size: int,
        *,
        max_size: int,
        max_in_flight: int,
        retry: RetryPolicy,
        draw: Callable[[], float],
        concurrency: int | None = None,
        tight: Mapping[int, int] | None = None,
        resting: Iterable[int] = (),
    ) -> None:
        self._endpoints = [_Endpoint(deque(q), max_size) for q in queues]
        self._lengths = [len(e.queue) for e in self._endpoints]
        self._unsent = sum(self._lengths)
        self._left = self._unsent
        self._max_size = max_size
        self._max_in_flight = max_in_flight
        self._retry = retry
        self._draw = draw
        self._concurrency = concurrency or math.inf
        self._tight = tight or {}
        self._settled = bytearray(size)
        self.attempts = bytearray(size)
        self.counts = Counts()
        self._faulted: dict[int, int] = {}
        self._parcels: deque[_Parcel] = deque()
        self._quarantine: deque[_Parcel] = deque()
        self._ward: int | None = None  # the one endpoint that meets suspects
        self._suspect: int | None = None  # the ticket of the suspect in flight
        self._flights: dict[int, _Flight] = {}
        self._hungry: dict[int, None] = {}
        self._tickets = 0
        self._rate_sum = 0.0
        self._rated = 0
        for index in resting:
            self._endpoints[index].breaker = Breaker.OPEN
        self._ready = sum(e.ready for e in self._endpoints)
        self._last_failure: Failure | None = None
        self._stopped = False

    # ---- questions ------------------------------

    def wants(self, row: int) -> bool:
        """Whether an answer for this row is still looked for: the first answer wins."""
        return not self._settled[row]

    def budget(self, rows: Iterable[int]) -> int | None:
        """The ``max_tokens`` these rows share if they are tight, else None."""
        return min((self._tight[r] for r in rows if r in self._tight), default=None) if self._tight else None

    @property
    def alive(self) -> int:
        """Endpoints that are given work now."""
        return self._ready

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return len(self._flights)

    def states(self) -> list[Breaker]:
        """The breaker state of each endpoint."""
        return [e.breaker for e in self._endpoints]

    # ---- events ------------------------------

    def start(self, now: float) -> list[Instruction]:
        """Begin: the first batch of every endpoint."""
        out: list[Instruction] = []
        if not self._left:
            self._stopped = True
            return [Stop()]
        for index, e in enumerate(self._endpoints):
            if e.breaker is Breaker.OPEN:
                self._rest(e, backoff_s(1, self._retry, self._draw()), now, out)
            self._fill(index, now, out)
        return out

    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Take one event at time ``now`` (seconds); return what is to be done about it, in order."""
        out: list[Instruction] = []
        if self._stopped:
            return out
        match event:
            case Delivered(ticket, rows):
                self._delivered(ticket, rows, now, out)
            case Ended(ticket):
                self._ended(ticket, now, out)
            case Failed(ticket, failure):
                self._failed(ticket, failure, now, out)
            case Tick():
                self._rested(now)
        self._feed(now, out)
        self._finish(out)
        return out

    def _delivered(self, ticket: int, rows: Sequence[int], now: float, out: list[Instruction]) -> None:
        flight = self._flights.get(ticket)
        if flight is None:
            return
        index = flight.batch.endpoint
        e = self._endpoints[index]
        before = len(flight.unfinished)
        flight.unfinished.difference_update(rows)
        for row in rows:
            if not self._settled[row]:
                self._settled[row] = 1
                self._left -= 1
        got = before - len(flight.unfinished)
        e.held -= got
        e.done += got
        self._measure(e, now)
        self._succeeded(e)
        self._fill(index, now, out)

    def _ended(self, ticket: int, now: float, out: list[Instruction]) -> None:
        flight = self._flights.get(ticket)
        if flight is None:
            return
        if flight.unfinished:
            missing = Failure(FailureKind.MALFORMED, f"the reply lacks {len(flight.unfinished)} of its rows")
            self._failed(ticket, missing, now, out)
            return
        at_limit = len(self._flights) >= self._concurrency
        self._land(flight, now)
        if at_limit:  # others have waited longer for this place
            self._hungry[flight.batch.endpoint] = None
        else:
            self._fill(flight.batch.endpoint, now, out)

    def _failed(self, ticket: int, failure: Failure, now: float, out: list[Instruction]) -> None:
        flight = self._flights.get(ticket)
        if flight is None:
            return
        index = flight.batch.endpoint
        self._land(flight, now)
        self._last_failure = failure
        rows = tuple(r for r in flight.batch.rows if r in flight.unfinished and not self._settled[r])
        reaction = REACTIONS[failure.kind]
        self._blame(index, failure, reaction, len(flight.batch.rows), now, out)
        if not rows:
            return
        if reaction.attempt:
            rows = self._spend_attempts(rows, failure, out)
        if rows:
            self._resend(flight, rows, failure, reaction, now, out)
        self._fill(index, now, out)

    def _rested(self, now: float) -> None:
        for index, e in enumerate(self._endpoints):
            if e.breaker is Breaker.OPEN and e.rest_until <= now:
                self._signal(e, Signal.PAUSE_OVER)
            if e.ready and e.rest_until <= now:
                self._hungry[index] = None

    # ---- the fate of unfinished rows ------------------------------

    def _spend_attempts(self, rows: tuple[int, ...], failure: Failure, out: list[Instruction]) -> tuple[int, ...]:
        """Count a fault against each row; settle those whose budget is spent, return the others."""
        kept = []
        for row in rows:
            spent = self._faulted[row] = self._faulted.get(row, 0) + 1
            if spent >= self._retry.max_attempts:
                self._settle(row, failure, out)
            else:
                kept.append(row)
        return tuple(kept)

    def _resend(
        self,
        flight: _Flight,
        rows: tuple[int, ...],
        failure: Failure,
        reaction: Reaction,
        now: float,
        out: list[Instruction],
    ) -> None:
        index = flight.batch.endpoint
        parcel = flight.parcel or _Parcel(rows)
        self.counts.retries += 1
        if reaction.rows == "same" and not flight.same_again:
            self._send(index, rows, now, out, parcel=flight.parcel, same_again=True)
        elif reaction.rows == "halve":
            self._halve(index, rows, parcel, failure, out)
        elif reaction.rows == "any" and flight.parcel is None:
            self._requeue(index, rows)
        elif failure.kind in (FailureKind.DISCONNECT, FailureKind.SERVER, FailureKind.HANG):
            self._suspected(index, rows, parcel, failure, out)
        else:
            self._parcels.append(_Parcel(rows, parcel.avoid | {index}, parcel.deaths, parcel.refused, parcel.alone))

    def _halve(
        self, index: int, rows: tuple[int, ...], parcel: _Parcel, failure: Failure, out: list[Instruction]
    ) -> None:
        """A refused batch is split; a refused lone row gets a second opinion, if there is anyone to ask."""
        if len(rows) > 1:
            self.counts.halvings += 1
            self._parcels.extendleft(_Parcel(part, deaths=parcel.deaths) for part in reversed(halves(rows)))
            return
        avoid = parcel.avoid | {index}
        if parcel.refused or not self._others_ready(avoid):
            self._settle(rows[0], failure, out)
        else:
            self._parcels.append(_Parcel(rows, avoid, refused=True))

    def _suspected(
        self, index: int, rows: tuple[int, ...], parcel: _Parcel, failure: Failure, out: list[Instruction]
    ) -> None:
        """A batch died with its endpoint. Once: bad luck. Twice: one of its rows may be the cause."""
        if parcel.alone:
            self._settle(rows[0], failure, out)
        elif parcel.deaths:
            self.counts.quarantined += len(rows)
            self._quarantine.extend(_Parcel((r,), deaths=2, alone=True) for r in rows)
        else:
            self._parcels.append(_Parcel(rows, parcel.avoid | {index}, deaths=1, refused=parcel.refused))

    def _requeue(self, index: int, rows: tuple[int, ...]) -> None:
        e = self._endpoints[index]
        e.queue.extendleft(reversed(rows))
        self._lengths[index] += len(rows)
        self._unsent += len(rows)

    def _settle(self, row: int, failure: Failure, out: list[Instruction]) -> None:
        self._settled[row] = 1
        self._left -= 1
        out.append(Settle(row, failure))

    # ---- endpoints: speed, pauses, breakers ------------------------------

    def _measure(self, e: _Endpoint, now: float) -> None:
        busy = e.busy_s + (now - e.busy_since if e.requests else 0.0)
        if busy <= 0 or not e.done:
            return
        if not e.rate:
            self._rated += 1
        rate = e.done / busy
        self._rate_sum += rate - e.rate
        e.rate = rate

    def _succeeded(self, e: _Endpoint) -> None:
        e.proven = True
        e.faults = e.opens = e.busy = 0
        if e.max_bite < self._max_size:
            e.max_bite = min(self._max_size, e.max_bite * 2)
        if e.breaker is not Breaker.CLOSED:
            self._signal(e, Signal.SUCCESS)

    def _blame(
        self, index: int, failure: Failure, reaction: Reaction, rows: int, now: float, out: list[Instruction]
    ) -> None:
        e = self._endpoints[index]
        if failure.kind is FailureKind.DENIED:
            self._signal(e, Signal.DENIED)
            return
        blamed, trips = reaction.blamed, reaction.trips
        if failure.kind is FailureKind.BUSY:
            e.busy += 1
            e.max_bite = max(1, rows // 2)
            blamed = trips = e.busy >= self._retry.max_busy
        if blamed:
            e.faults += 1
            trips = trips or e.faults >= self._retry.breaker_threshold
            was_open = e.breaker is Breaker.OPEN
            self._signal(e, Signal.TRIP if trips else Signal.FAULT)
            if e.breaker is not Breaker.OPEN or was_open:
                return
            e.opens += 1
            self.counts.opens[index] = self.counts.opens.get(index, 0) + 1
            if e.opens >= self._retry.max_opens:
                self._signal(e, Signal.DENIED)
                return
            self._rest(e, backoff_s(e.opens, self._retry, self._draw()), now, out)
        elif reaction.pause:
            pause = backoff_s(max(e.busy, 1), self._retry, self._draw())
            self._rest(e, failure.retry_after_s or pause, now, out)

    def _rest(self, e: _Endpoint, pause: float, now: float, out: list[Instruction]) -> None:
        e.rest_until = max(e.rest_until, now + pause)
        out.append(Wake(e.rest_until))

    def _signal(self, e: _Endpoint, signal: Signal) -> None:
        was = e.ready
        e.breaker = BREAKER[e.breaker, signal]
        self._ready += e.ready - was
        if e.breaker is Breaker.OUT and e.rate:
            self._rate_sum -= e.rate
            self._rated -= 1
            e.rate = 0.0

    def _others_ready(self, avoid: Collection[int]) -> bool:
        return self._ready > sum(self._endpoints[i].ready for i in avoid)

    # ---- handing out work ------------------------------

    def _fill(self, index: int, now: float, out: list[Instruction]) -> None:
        """Send to one endpoint while it has room and there is work; remember it as hungry otherwise."""
        e = self._endpoints[index]
        while e.ready and e.rest_until <= now:
            room = self._room(e)
            if room < 1:
                return
            if len(self._flights) >= self._concurrency:
                self._hungry[index] = None
                return
            rows, parcel = self._take(index, room)
            if not rows:
                self._hungry[index] = None
                return
            self._send(index, rows, now, out, parcel=parcel)

    def _room(self, e: _Endpoint) -> int:
        """Rows this endpoint may be sent in one request now; 0 when it holds enough."""
        size = min(self._max_size, e.max_bite)
        if e.breaker is Breaker.HALF_OPEN:
            return max(1, size // 10) if not e.requests else 0
        if e.proven:
            requests = self._max_in_flight
        else:
            requests = min(self._max_in_flight, _FIRST_SINGLES) if self._max_size == 1 else 1
        if e.requests >= requests:
            return 0
        hold = min(self._max_size * requests, self._share(e))
        free = hold - e.held
        # Rows finish one by one. Topping up by as few as have just finished would shred the work into tiny
        # requests, so an endpoint that holds work waits until a whole batch, or half its share, fits.
        if e.held and free < min(size, (hold + 1) // 2):
            return 0
        return min(size, max(free, 0 if e.held else 1))

    def _share(self, e: _Endpoint) -> int:
        """Rows that are this endpoint's part, by speed, of all that is left."""
        if self._ready < 2 or not e.rate or 2 * self._rated < self._ready:
            return self._left
        mean = self._rate_sum / self._rated
        total = self._rate_sum + mean * max(0, self._ready - self._rated)
        return math.ceil(self._left * e.rate / total * _SLACK)

    def _take(self, index: int, room: int) -> tuple[tuple[int, ...], _Parcel | None]:
        parcel = self._take_suspect(index) or self._take_parcel(index, room)
        if parcel is not None:
            return parcel.rows, parcel
        if self._unsent:
            if self._lengths[index]:
                return self._cut(index, room, steal=False), None
            return self._steal(room), None
        return (), None

    def _take_suspect(self, index: int) -> _Parcel | None:
        while self._quarantine and self._settled[self._quarantine[0].rows[0]]:
            self._quarantine.popleft()
        if not self._quarantine or self._suspect is not None:
            return None
        if self._ward is not None and self._ward != index and self._endpoints[self._ward].ready:
            return None
        self._ward = index
        self._suspect = self._tickets  # the ticket that the next _send will take
        return self._quarantine.popleft()

    def _take_parcel(self, index: int, room: int) -> _Parcel | None:
        for _ in range(len(self._parcels)):
            parcel = self._parcels.popleft()
            rows = tuple(r for r in parcel.rows if not self._settled[r])
            if not rows:
                continue
            if index in parcel.avoid and self._others_ready(parcel.avoid):
                self._parcels.append(parcel)
                continue
            if len(rows) > room:
                rest = _Parcel(rows[room:], parcel.avoid, parcel.deaths, parcel.refused)
                self._parcels.appendleft(rest)
                rows = rows[:room]
            return _Parcel(rows, parcel.avoid, parcel.deaths, parcel.refused, parcel.alone)
        return None

    def _steal(self, room: int) -> tuple[int, ...]:
        longest = max(self._lengths)
        victim = self._lengths.index(longest)
        # Half of an equal part of what is unsent: the bites shrink as the work does, so the last ones are small
        # and all endpoints finish together.
        bite = min(room, max(1, math.ceil(self._unsent / max(1, self._ready) / 2)))
        self.counts.steals += 1
        return self._cut(victim, bite, steal=True)

    def _cut(self, index: int, size: int, *, steal: bool) -> tuple[int, ...]:
        """Take up to ``size`` rows off a queue, its front for its owner, its end for a thief; never mixing
        tight rows with roomy ones."""
        queue = self._endpoints[index].queue
        pop = queue.pop if steal else queue.popleft
        if not self._tight:
            rows = [pop() for _ in range(min(size, len(queue)))]
        else:
            rows = [pop()]
            end = -1 if steal else 0
            is_tight = rows[0] in self._tight
            while queue and len(rows) < size and (queue[end] in self._tight) == is_tight:
                rows.append(pop())
        if steal:
            rows.reverse()
        self._lengths[index] -= len(rows)
        self._unsent -= len(rows)
        return tuple(rows)

    def _send(
        self,
        index: int,
        rows: tuple[int, ...],
        now: float,
        out: list[Instruction],
        *,
        parcel: _Parcel | None,
        same_again: bool = False,
    ) -> None:
        e = self._endpoints[index]
        if not e.requests:
            e.busy_since = now
        e.requests += 1
        e.held += len(rows)
        for row in rows:
            if self.attempts[row] < 255:
                self.attempts[row] += 1
        batch = Batch(self._tickets, index, rows)
        self._tickets += 1
        self._flights[batch.ticket] = _Flight(batch, set(rows), now, parcel, same_again)
        out.append(Send(batch, same_again))

    def _land(self, flight: _Flight, now: float) -> None:
        """A request is over: take it off the books."""
        e = self._endpoints[flight.batch.endpoint]
        del self._flights[flight.batch.ticket]
        if self._suspect == flight.batch.ticket:
            self._suspect = None
        e.held -= len(flight.unfinished)
        e.requests -= 1
        if not e.requests:
            e.busy_s += now - e.busy_since

    def _feed(self, now: float, out: list[Instruction]) -> None:
        """Offer work that has come up (requeued rows, freed capacity) to the endpoints that had none."""
        if not self._hungry or not (self._unsent or self._parcels or self._quarantine):
            return
        for index in list(self._hungry):
            if len(self._flights) >= self._concurrency:
                return
            del self._hungry[index]
            self._fill(index, now, out)

    def _finish(self, out: list[Instruction]) -> None:
        if not self._left:
            self._stopped = True
            # Requests whose rows have all come only have their closing words left; the others are copies.
            out.extend(Drop(ticket) for ticket, flight in self._flights.items() if flight.unfinished)
            out.append(Stop())
        elif not self._flights and all(e.breaker is Breaker.OUT for e in self._endpoints):
            self._stopped = True
            out.append(Stop(self._last_failure or Failure(FailureKind.CONNECT, "there is no endpoint")))
