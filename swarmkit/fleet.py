"""The endpoints of a run as the scheduler sees them: how fast, how full, how well.

How much an endpoint may hold: one request until it has answered, then more with every row it delivers, up to
``max_in_flight`` requests, and never more rows than its share, by measured speed, of all that is left (with a
little slack). That share keeps a slow endpoint from sitting on the end of a run, and makes requests small as the
work runs out ("guided self-scheduling", Polychronopoulos and Kuck 1987, weighed by speed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from .policy import BREAKER, REACTIONS, Breaker, RetryPolicy, Signal, backoff_s
from .records import Failure, FailureKind

__all__ = ["Endpoint", "Fleet"]

_SLACK = 1.25  # an endpoint may hold this much more than its share: rates are estimates
_FIRST_ROWS = 32  # an endpoint may hold so many rows, or one request, before it has answered


@dataclass(slots=True)
class Endpoint:
    """What is known of one endpoint in one run.

    Attributes
    ----------
    max_bite : int
        Rows a request, at most; smaller than the policy's after "queue full".
    requests, held : int
        Requests in flight, and the unfinished rows in them.
    done : int
        Rows delivered.
    proven : bool
        It has answered in this run.
    busy_s, busy_since : float
        Seconds with requests in flight before the present spell, and when that began.
    rate : float
        Rows a second while busy; 0 while unknown.
    breaker : Breaker
        State of its circuit breaker.
    faults, opens, busy : int
        Faults, openings of the breaker and "queue full" answers since its last success.
    rest_until : float
        Not to be sent anything before this time.
    """

    max_bite: int
    requests: int = 0
    held: int = 0
    done: int = 0
    proven: bool = False
    busy_since: float = 0.0
    busy_s: float = 0.0
    rate: float = 0.0
    breaker: Breaker = Breaker.CLOSED
    faults: int = 0
    opens: int = 0
    busy: int = 0
    rest_until: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether its breaker lets anything through."""
        return self.breaker in (Breaker.CLOSED, Breaker.HALF_OPEN)


class Fleet(list[Endpoint]):
    """The endpoints of a run, by index, and what they are together.

    Parameters
    ----------
    size : int
        Number of endpoints.
    max_size, max_in_flight : int
        Rows a request and requests an endpoint, at most.
    retry : RetryPolicy
        Budgets and pauses.
    draw : callable
        Gives a random number from 0 to 1, for the jitter of pauses.
    resting : iterable of int
        Endpoints that begin with an open breaker.
    """

    def __init__(
        self,
        size: int,
        *,
        max_size: int,
        max_in_flight: int,
        retry: RetryPolicy,
        draw: Callable[[], float],
        resting: Iterable[int] = (),
    ) -> None:
        super().__init__(Endpoint(max_size) for _ in range(size))
        for index in resting:
            self[index].breaker = Breaker.OPEN
        self.max_size = max_size
        self._max_in_flight = max_in_flight
        self._retry = retry
        self._draw = draw
        self.ready = sum(e.ready for e in self)
        self._rate_sum = 0.0
        self._rated = 0

    # ---- books ------------------------------

    def sent(self, index: int, rows: int, now: float) -> None:
        """A request with so many rows goes out."""
        e = self[index]
        if not e.requests:
            e.busy_since = now
        e.requests += 1
        e.held += rows

    def delivered(self, index: int, rows: int, now: float) -> None:
        """Rows have come: the endpoint works, and is so fast."""
        e = self[index]
        e.held -= rows
        e.done += rows
        e.proven = True
        e.faults = e.opens = e.busy = 0
        e.max_bite = min(self.max_size, e.max_bite * 2)
        if e.breaker is not Breaker.CLOSED:
            self._signal(e, Signal.SUCCESS)
        busy = e.busy_s + now - e.busy_since
        if busy > 0 and e.done:
            self._set_rate(e, e.done / busy)

    def excused(self, index: int) -> None:
        """A row that an endpoint holds has been answered by another."""
        self[index].held -= 1

    def landed(self, index: int, unfinished: int, now: float) -> None:
        """A request is over, with so many rows unfinished."""
        e = self[index]
        e.held -= unfinished
        e.requests -= 1
        if not e.requests:
            e.busy_s += now - e.busy_since

    def _set_rate(self, e: Endpoint, rate: float) -> None:
        self._rated += (rate > 0) - (e.rate > 0)
        self._rate_sum += rate - e.rate
        e.rate = rate

    # ---- health ------------------------------

    def failed(self, index: int, failure: Failure, rows: int, now: float) -> float | None:
        """A request with so many rows failed; return when the endpoint is to be looked at again, if it rests."""
        e, reaction = self[index], REACTIONS[failure.kind]
        if failure.kind is FailureKind.DENIED:
            self._signal(e, Signal.DENIED)
            return None
        blamed, trips = reaction.blamed, reaction.trips
        if failure.kind is FailureKind.BUSY:
            e.busy += 1
            e.max_bite = max(1, rows // 2)
            blamed = trips = e.busy >= self._retry.max_busy
        if blamed:
            return self._fault(e, trips, now)
        if reaction.pause:
            pause = backoff_s(max(e.busy, 1), self._retry, self._draw())
            return self._rest(e, failure.retry_after_s or pause, now)
        return None

    def _fault(self, e: Endpoint, trips: bool, now: float) -> float | None:
        e.faults += 1
        was = e.breaker
        self._signal(e, Signal.TRIP if trips or e.faults >= self._retry.breaker_threshold else Signal.FAULT)
        if e.breaker is not Breaker.OPEN or was is Breaker.OPEN:
            return None
        e.opens += 1
        if e.opens >= self._retry.max_opens:
            self._signal(e, Signal.DENIED)
            return None
        return self._rest(e, backoff_s(e.opens, self._retry, self._draw()), now)

    def rest(self, index: int, now: float) -> float:
        """Give an endpoint its first pause; return when it is over."""
        return self._rest(self[index], backoff_s(1, self._retry, self._draw()), now)

    def _rest(self, e: Endpoint, pause: float, now: float) -> float:
        e.rest_until = max(e.rest_until, now + pause)
        return e.rest_until

    def rested(self, now: float) -> list[int]:
        """The endpoints that may be sent something again."""
        for e in self:
            if e.breaker is Breaker.OPEN and e.rest_until <= now:
                self._signal(e, Signal.PAUSE_OVER)
        return [i for i, e in enumerate(self) if e.ready and e.rest_until <= now]

    def _signal(self, e: Endpoint, signal: Signal) -> None:
        was = e.ready
        e.breaker = BREAKER[e.breaker, signal]
        self.ready += e.ready - was
        if e.breaker is Breaker.OUT:
            self._set_rate(e, 0.0)

    @property
    def gone(self) -> bool:
        """Whether every endpoint is out for the run."""
        return not self.ready and all(e.breaker is Breaker.OUT for e in self)

    def others_ready(self, avoid: Collection[int]) -> bool:
        """Whether an endpoint besides these is ready."""
        return self.ready > sum(self[i].ready for i in avoid)

    # ---- room ------------------------------

    def room(self, index: int, left: int, now: float) -> int:
        """Rows an endpoint may be sent in one request now, with ``left`` rows unfinished in the run; 0: none."""
        e = self[index]
        if not e.ready or e.rest_until > now:
            return 0
        size = min(self.max_size, e.max_bite)
        if e.breaker is Breaker.HALF_OPEN:
            return 0 if e.requests else max(1, size // 10)
        first = max(self.max_size, _FIRST_ROWS)
        if e.requests >= (self._max_in_flight if e.proven else first // self.max_size):
            return 0
        # As in TCP's slow start every row delivered opens the window by one, so that an endpoint whose speed is
        # not known yet is trusted with little.
        hold = min(self.max_size * self._max_in_flight, first + e.done, self._share(e, left))
        free = hold - e.held
        # Rows finish one by one. Topping up by as few as have just finished would shred the work into tiny
        # requests, so an endpoint that holds work waits until a whole batch, or half its share, fits.
        if e.held and free < min(size, (hold + 1) // 2):
            return 0
        return min(size, max(free, 0 if e.held else 1))

    def _share(self, e: Endpoint, left: int) -> int:
        """Rows that are an endpoint's part, by speed, of all that is left."""
        if self.ready < 2 or not e.rate or 2 * self._rated < self.ready:
            return left
        mean = self._rate_sum / self._rated
        total = self._rate_sum + mean * max(0, self.ready - self._rated)
        return math.ceil(left * e.rate / total * _SLACK)
